"""The answer of a study as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.tokens_to_loss.plan import Result
from benchmarks.tokens_to_loss.protocol import Protocol
from benchmarks.tokens_to_loss.summary import Row
from lightning_multinorm.report.runs import Numbers

_COLOURS = (
    *("#d1495b", "#2e6f95", "#6a994e", "#b26a00", "#7b5ea7", "#444444", "#00838f", "#ad1457", "#8d6e63", "#5c6bc0"),
    *("#9e9d24", "#26a69a", "#ef6c00", "#90a4ae", "#c2185b", "#1b5e20", "#795548", "#0277bd", "#6a1b9a", "#bf360c"),
)


def draw(protocol: Protocol, rows: Sequence[Row], folder: Path) -> list[Path]:
    """Draw ``<protocol>.png`` and ``.svg``: loss over tokens, and what each needs to come to the first target.

    Returns:
        The files written; none while no row is tuned.
    """
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "tokens_to_loss"})
    from matplotlib import pyplot

    # A colour belongs to a name, not to its place among the others today.
    colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(protocol.optimizers)}
    rows = [row for row in rows if row.losses and all(np.isfinite(row.losses))]
    if not rows:
        return []
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(13, 6.2), layout="constrained", gridspec_kw={"width_ratios": [1.7, 1]}
    )
    _curves(left, rows, colours, protocol)
    _shares(right, rows, colours, protocol)
    targets = [folder / f"{protocol.name}.{suffix}" for suffix in ("png", "svg")]
    for target in targets:
        figure.savefig(target, dpi=150, metadata={"Date": None} if target.suffix == ".svg" else None)
    pyplot.close(figure)
    return targets


def _curves(axes: Any, rows: Sequence[Row], colours: dict[str, str], protocol: Protocol) -> None:
    """Mean over the seeds, from the least to the most; dots are the ends of shorter budgets."""
    lowest = min(min(row.losses) for row in rows)
    highest = max(max(row.losses) for row in rows if row.name in protocol.targets or min(row.losses) < lowest + 1.0)
    ends = []
    for row in rows:
        tokens = _millions(row.results[0])
        # On one axis: an interrupted run may lack a validation.
        losses = np.array([np.interp(tokens, _millions(run), run.validation["loss"]) for run in row.results])
        wide = row.name in protocol.targets
        style = {"color": colours[row.name], "linewidth": 2.2 if wide else 1.4}
        axes.plot(tokens, losses.mean(0), "--" if wide else "-", **style)
        axes.fill_between(tokens, losses.min(0), losses.max(0), color=colours[row.name], alpha=0.12, linewidth=0)
        for fraction, finals in row.budgets.items():
            if fraction < 1 and all(np.isfinite(finals)):
                axes.plot(tokens[-1] * fraction, np.mean(finals), "o", color=colours[row.name], markersize=5)
        ends.append((float(losses.mean(0)[-1]), float(tokens[-1]), row.name))
    span = highest - lowest
    bottom, top = lowest - 0.08 * span - 0.02, highest + 0.5 * span + 0.1
    places = _apart([end for end, _, _ in ends], 0.035 * (top - bottom))
    for (end, x, name), place in zip(ends, places, strict=True):
        text, where = f"{name}  {end:.3f}", (x * 1.03, min(place, top))
        arrow = {"arrowstyle": "-", "color": colours[name], "linewidth": 0.5, "relpos": (0, 0.5)}
        axes.annotate(text, (x, min(end, top)), where, va="center", color=colours[name], arrowprops=arrow)
    axes.set(xlabel="tokens, millions", ylabel="validation loss, nats/token", ylim=(bottom, top))
    axes.set_xlim(0.2 * ends[0][1], ends[0][1] * 1.2)
    axes.set_title("Mean over seeds at the tuned rate; dots: budgets with schedules of their own", loc="left")
    _plain(axes, "y")


def _millions(run: Result) -> Numbers:
    return np.array(run.validation["tokens"]) / 1e6


def _shares(axes: Any, rows: Sequence[Row], colours: dict[str, str], protocol: Protocol) -> None:
    """Bars: tokens to the first target's loss; pale along the curve, full by the shortest own budget."""
    target = protocol.targets[0] if protocol.targets else ""
    shown = [row for row in rows if row.reached.get(target)]
    for place, row in enumerate(reversed(shown)):
        reached = row.reached[target]
        bars = [(reached.along, 0.4)] + [(reached.own, 1.0)] * (len(row.budgets) > 1)
        for (shares, alpha), shift in zip(bars, (0.19, -0.19) if len(bars) > 1 else (0.0,), strict=True):
            found = [share for share in shares if share is not None]
            value = float(np.mean(found)) if len(found) == len(shares) else 0.0
            axes.barh(place + shift, value, 0.34, color=colours[row.name], alpha=alpha, linewidth=0)
            text = f"{value:.2f}" if value else f"{len(found)} of {len(shares)} seeds come there"
            axes.text(value + 0.01, place + shift, text, va="center", fontsize=8)
    axes.set_yticks(range(len(shown)), [row.name for row in reversed(shown)])
    axes.axvline(1, color="#444444", linewidth=0.8, linestyle=":")
    axes.set(xlim=(0, 1.15), ylim=(-0.6, len(shown) - 0.4), xlabel=f"share of {target}'s tokens")
    axes.set_title(f"To the final loss of tuned {target}\npale: along the curve; full: own schedule", loc="left")
    _plain(axes, "x")


def _plain(axes: Any, grid: str) -> None:
    axes.grid(True, axis=grid, color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _apart(places: Sequence[float], gap: float) -> list[float]:
    """Ascending places moved up where they are closer than a gap."""
    moved: list[float] = []
    for place in places:
        moved.append(max(place, moved[-1] + gap) if moved else place)
    return moved
