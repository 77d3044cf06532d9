"""All results of a folder in one figure: cost of a step, and its ratio to AdamW, against the number of parameters."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.optimizer_step.contenders import CONTENDERS, REFERENCE
from benchmarks.optimizer_step.matrices import DTYPES

COLOURS = {
    "this package": "#d1495b",
    "SinkGD and RACS elsewhere": "#2e6f95",
    "others with state": "#6a994e",
    "torch, fused": "#444444",
}
_LEFT_OUT = ("tiny",)  # tries of the benchmark itself
_TABLE_ONLY = ("sinkgd-l1", "sinkgd-l3", "sinkgd-l10", "sinkgd-eager", "swan-k5")  # variants, too many for a figure
_Line = tuple[str, list[float], list[float]]


def plot(folder: Path) -> list[Path]:
    """Draw ``optimizer_step.png`` and ``.svg`` from the results in ``folder``, a row for each device and dtype.

    Returns:
        The files written; none if there are no results but those of "tiny".
    """
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "optimizer_step"})
    from matplotlib import pyplot

    rows = _results(folder)
    if not rows:
        return []
    figure, axes = pyplot.subplots(len(rows), 2, figsize=(13, 6.5 * len(rows)), squeeze=False, layout="constrained")
    for (left, right), ((device, dtype), results) in zip(axes, rows.items(), strict=True):
        machine = results[0]["machine"]
        where = (
            machine["accelerator"] if device == "cuda" else f"{machine['processor']}, {results[0]['threads']} thread(s)"
        )
        sizes = {result["parameters"]: f"{result['model']}\n{result['parameters'] / 1e6:.0f} M" for result in results}
        _draw(left, _lines(results, lambda row: row["median_ms"]), sizes, "ms a step")
        _draw(right, _lines(results, lambda row: row["ratio"][1]), sizes, "time over that of fused AdamW")
        right.axhline(1, color=COLOURS["torch, fused"], linewidth=0.8, linestyle=":", zorder=0)
        left.set_title(f"{dtype}, {where}", loc="left")
    handles = [pyplot.Line2D([], [], color=colour, marker="o", label=family) for family, colour in COLOURS.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(COLOURS), frameon=False)
    targets = [folder / f"optimizer_step.{suffix}" for suffix in ("png", "svg")]
    for target in targets:
        figure.savefig(target, dpi=150, metadata={"Date": None} if target.suffix == ".svg" else None)
    pyplot.close(figure)
    return targets


def _results(folder: Path) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Results by device and dtype, each from the smallest model to the largest."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("optimizer_step_*.json")):
        content = json.loads(path.read_text())
        if content["model"] not in _LEFT_OUT:
            found.setdefault((content["device"], content["dtype"]), []).append(content)
    keys = sorted(found, key=lambda key: (key[0], DTYPES.index(key[1])))
    return {key: sorted(found[key], key=lambda result: result["parameters"]) for key in keys}


def _lines(results: Sequence[Mapping[str, Any]], value: Any) -> list[_Line]:
    lines = []
    for key in (key for key in CONTENDERS if key not in _TABLE_ONLY):
        points = [
            (result["parameters"], value(result["contenders"][key]))
            for result in results
            if key in result["contenders"]
        ]
        if points:
            lines.append((key, [x for x, _ in points], [y for _, y in points]))
    return lines


def _draw(axes: Any, lines: Sequence[_Line], sizes: Mapping[float, str], label: str) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    left, right = min(sizes), max(sizes)
    low, high = min(min(y) for _, _, y in lines), max(max(y) for _, _, y in lines)
    axes.set(xscale="log", yscale="log", xlabel="model, parameters in its matrices", ylabel=label)
    axes.set_xticks(list(sizes), sizes.values())
    axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    span = max(right / left, 4)
    axes.set_xlim(left / span**0.1, right * span**0.7)  # room for the labels
    axes.set_ylim(low / 1.25, high * 1.25)
    for key, xs, ys in lines:
        family = CONTENDERS[key].family
        wide = key in ("sinkgd", REFERENCE)
        axes.plot(xs, ys, "o-", color=COLOURS[family], linewidth=2.2 if wide else 1, markersize=6 if wide else 3.5)
    ends = sorted((ys[-1], xs[-1], key) for key, xs, ys in lines)
    places = _spread([math.log(y) for y, _, _ in ends], math.log(low / 1.2), math.log(high * 1.2))
    for (y, x, key), place in zip(ends, places, strict=True):
        contender = CONTENDERS[key]
        axes.annotate(
            f"{contender.title}  {y:,.0f}" if y >= 100 else f"{contender.title}  {y:.3g}",
            (x, y),
            (right * span**0.12, math.exp(place)),
            va="center",
            color=COLOURS[contender.family],
            weight="bold" if key in ("sinkgd", REFERENCE) else "normal",
            fontsize=8.5,
            arrowprops={
                "arrowstyle": "-",
                "color": COLOURS[contender.family],
                "linewidth": 0.5,
                "shrinkB": 3,
                "relpos": (0, 0.5),
            },
        )
    axes.grid(True, which="both", axis="y", color="#e6e6e6", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _spread(places: Sequence[float], low: float, high: float) -> list[float]:
    """Move sorted places apart to a least distance, as little as possible in total, within [low, high]."""
    gap = (high - low) / max(26, len(places))
    blocks: list[list[float]] = []  # neighbours that touch: the sum of their wishes for the lowest, and their number
    for i, place in enumerate(places):
        blocks.append([place - i * gap, 1])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            total, count = blocks.pop()
            blocks[-1][0] += total
            blocks[-1][1] += count
    lowest = [total / count for total, count in blocks for _ in range(int(count))]
    top = high - (len(places) - 1) * gap
    return [min(max(place, low), top) + i * gap for i, place in enumerate(lowest)]
