"""How Sphinx builds these pages: ``python -m sphinx -W --keep-going -n docs public``, without a network."""

from lightning_multinorm import __version__

project = "lightning-multinorm"
author = "lightning-multinorm contributors"
version = release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"lightning-multinorm {version}"

myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_use_ivar = True

# What other projects document, and names of types that are not listed here.
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|lightning|transformers|datasets|collections|typing|pathlib|jsonargparse)(\..*)?"),
    (
        r"py:.*",
        r"UsageError|DataError|Released|MakeOptimizer|datetime\.timedelta|.*\b(Tensor|ParamsT|Group|Kernel|Rule|Policy)\b.*",
    ),
]
