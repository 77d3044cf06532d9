"""Vega's library and figures, by vl-convert, in a process of its own.

Its JavaScript engine ends the process that it runs in where address space is limited (``ulimit -v``, as on clusters),
and a training that writes its report at the end must not end so. `_draw` runs there, and needs nothing of this package.
"""

import base64
import json
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

EXTRA = "pip install 'lightning-multinorm[report]'"


class Drawn(NamedTuple):
    """Attributes:
    libraries: JavaScript of vega, vega-lite and vega-embed.
    svg: the figures, by name.
    png: likewise.
    """

    libraries: str
    svg: dict[str, str]
    png: dict[str, bytes]


def installed() -> bool:
    """Whether the extra is there that draws figures."""
    return find_spec("vl_convert") is not None


def draw(specs: Mapping[str, Any], scale: float = 2) -> Drawn:
    """Draw figures.

    Args:
        specs: of Vega-Lite, by name.
        scale: pixels of a PNG for each of its figure. Default: 2.

    Raises:
        RuntimeError: if the process that draws has ended otherwise than it should.
    """
    command = [sys.executable, "-P", str(Path(__file__)), str(scale)]
    done = subprocess.run(command, input=json.dumps(specs), capture_output=True, encoding="utf-8")
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1:] or ["nothing"]
        raise RuntimeError(
            f"vl-convert ended with status {done.returncode} and said: {said[0][:200]}. Where address space is limited "
            "(ulimit -v), write the report elsewhere: python -m lightning_multinorm report RUN"
        )
    found = json.loads(done.stdout)
    return Drawn(found["libraries"], found["svg"], {k: base64.b64decode(png) for k, png in found["png"].items()})


def _draw() -> None:
    import vl_convert

    specs, scale = json.load(sys.stdin), float(sys.argv[1])
    svg = {name: vl_convert.vegalite_to_svg(spec) for name, spec in specs.items()}
    png = {name: base64.b64encode(vl_convert.svg_to_png(text, scale=scale)).decode() for name, text in svg.items()}
    libraries = vl_convert.javascript_bundle()  # type: ignore[call-arg]  # its stub forgets the default
    json.dump({"libraries": libraries, "svg": svg, "png": png}, sys.stdout)


if __name__ == "__main__":
    _draw()
