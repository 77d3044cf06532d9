"""``python -m lightning_multinorm report``: from the logs of runs to a page, and its figures as files."""

from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from rich.console import Console

from lightning_multinorm.arguments import OneLineParser
from lightning_multinorm.errors import UsageError
from lightning_multinorm.report import contents
from lightning_multinorm.report.charts import Spec
from lightning_multinorm.report.drawing import EXTRA, draw, installed
from lightning_multinorm.report.files import marked_png, marked_svg, refuse_others, write
from lightning_multinorm.report.page import page
from lightning_multinorm.report.runs import Run, open_runs

_WIDTH = 640  # of a figure in a file, in pixels of which a PNG has two by two


def report(args: Sequence[str]) -> None:
    """Write a page, and its figures as files, of one run or of several beside each other, from their logs.

    Args:
        args: of the command line, after its name.

    Raises:
        UsageError: for what is no run, or a file that no report wrote and that this one would replace.
    """
    parser = OneLineParser(prog="python -m lightning_multinorm report", description=str(report.__doc__).split("\n")[0])
    parser.add_argument("runs", nargs="+", help="Folders of runs: runs/quickstart/version_0, or runs/quickstart.")
    parser.add_argument("--out", type=str, default="report.html", help="The page; its figures lie beside it.")
    config = parser.parse_args(list(args))
    out = Path(config.out)
    if out.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--out {out} is no name of a page; end it in .html")
    refuse_others([out])
    runs = open_runs(config.runs)
    try:
        written = write_report(runs, out)
    except RuntimeError as error:
        raise UsageError(str(error)) from error
    console = Console(soft_wrap=True)
    for run in runs:
        console.print(f"Run      {run.name}  ({run.folder})", highlight=False, markup=False)
    console.print(f"Report   {out}  ({written} figures, also in {figures_folder(out)})", highlight=False, markup=False)


def figures_folder(out: Path) -> Path:
    """Beside the page, and named after it."""
    return out.with_name(f"{out.stem}_figures")


def write_report(runs: Sequence[Run], out: Path, figures: bool = True) -> int:
    """Write a page, and each of its figures as SVG and PNG.

    Args:
        runs: in the order of their colours.
        out: the page.
        figures: whether figures are written as files, too. Default: true.

    Returns:
        The number of figures.

    Raises:
        UsageError: if the extra is not installed, or a file is there that no report wrote.
        RuntimeError: if figures cannot be drawn here.
    """
    if not installed():
        raise UsageError(f"a report needs vl-convert, which is not installed: {EXTRA}")
    canvas, sections = contents.canvas(runs), contents.sections(runs)
    specs = {figure.name: figure.spec for section in sections for figure in section.figures if figure.spec}
    folder = figures_folder(out)
    paths = {folder / f"{name}.{suffix}": name for name in specs for suffix in ("svg", "png")} if figures else {}
    drawn = draw({name: _on_paper(spec) for name, spec in specs.items()} if figures else {})
    files = {folder / f"{name}.svg": marked_svg(svg) for name, svg in drawn.svg.items()}
    files |= {folder / f"{name}.png": marked_png(png) for name, png in drawn.png.items()}
    links: dict[str, list[str]] = {}
    for path, name in paths.items():
        links.setdefault(name, []).append(f"{quote(folder.name)}/{quote(path.name)}")
    html = page(runs, sections, canvas, drawn.libraries, links)
    write({**files, out: html.encode()}, folder)
    return len(specs)


def _on_paper(spec: Spec) -> Spec:
    """On white, and without what only answers a pointer."""
    layers = {"layer": [part for part in spec["layer"] if "params" not in part]} if "layer" in spec else {}
    return {**spec, **layers, "width": _WIDTH, "config": {**spec["config"], "background": "white"}}
