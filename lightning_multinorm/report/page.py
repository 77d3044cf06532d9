"""The page: everything that it needs lies in it, and nothing that a run wrote is taken for markup."""

import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from lightning_multinorm.quantities import duration, quantity
from lightning_multinorm.report import comparison
from lightning_multinorm.report.charts import RUNS, SMOOTHING, Canvas
from lightning_multinorm.report.contents import Figure, Section
from lightning_multinorm.report.files import MARK
from lightning_multinorm.report.runs import Run
from lightning_multinorm.report.tables import AXES

Links = Mapping[str, Sequence[str]]


def page(runs: Sequence[Run], sections: Sequence[Section], canvas: Canvas, libraries: str, links: Links) -> str:
    """The HTML of a report.

    Args:
        runs: in the order of their colours.
        sections: of figures.
        canvas: what they were drawn on.
        libraries: JavaScript of vega, vega-lite and vega-embed.
        links: to the files of a figure, by its name.
    """
    parts = files("lightning_multinorm.report")
    figures = [figure for section in sections for figure in section.figures if figure.spec]
    usable = [axis for axis in AXES if axis == "step" or any(_metric(axis) in run.metrics for run in runs)]
    data = {
        "figures": [{"name": figure.name, "spec": figure.spec} for figure in figures],
        "axes": {field: encoding for field, encoding in canvas.axes().items() if field in usable},
        "axis": canvas.axis,
        "smoothing": SMOOTHING,
    }
    title = ", ".join(run.name for run in runs)
    return Template((parts / "page.html").read_text(encoding="utf-8")).substitute(
        mark=MARK,
        title=escape(title),
        style=(parts / "page.css").read_text(encoding="utf-8"),
        headline=_headline(runs),
        cards="".join(_card(run, index) for index, run in enumerate(runs)),
        axes="".join(
            f'<option value="{axis}"{" selected" * (axis == canvas.axis)}>{escape(_AXIS_WORDS[axis])}</option>'
            for axis in usable
        ),
        smoothing=SMOOTHING,
        chips="".join(_chip(run, index) for index, run in enumerate(runs)) if len(runs) > 1 else "",
        ratios=_ratios(runs),
        sections="".join(_section(section, runs, links) for section in sections),
        differences=_differences(runs),
        data=json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
        libraries=re.sub(r"</(?=script)", r"<\\/", libraries, flags=re.IGNORECASE),
        script=(parts / "page.js").read_text(encoding="utf-8"),
    )


_AXIS_WORDS = {"tokens": "Tokens", "time": "Time", "step": "Steps"}


def _metric(axis: str) -> str:
    return "seconds" if axis == "time" else axis


def _colour(index: int) -> str:
    return f"--run:{RUNS[index % len(RUNS)]}"


def _chip(run: Run, index: int) -> str:
    return (
        f'<label class="chip" style="{_colour(index)}"><input type="checkbox" checked '
        f'data-toggles="{escape(run.name)}"><i></i>{escape(run.name)}</label>'
    )


def optimizer_of(run: Run) -> str | None:
    """The class of a run's optimizer, from its configuration or the names of its learning rates."""
    both = [run.config.get(f"model.optimizer.init_args.{part}.class_path") for part in ("matrices", "rest")]
    paths = both if all(both) else [run.config.get("model.optimizer.class_path", run.config.get("model.optimizer"))]
    if all(paths):
        return " + ".join(str(path).rpartition(".")[2] for path in paths)
    rates = (re.match(r"lr-(\w+)", name) for name in run.metrics)
    return next((rate[1] for rate in rates if rate), None)


def _card(run: Run, index: int) -> str:
    """What a run came to: one large number, and the others."""
    loss, bits, train = (run.last(name) for name in ("val/loss", "val/bits_per_byte", "train/loss"))
    big, what = (loss, "validation loss") if loss is not None else (train, "training loss, not validated")
    if not run.metrics:
        what = "nothing logged yet"
    steps = max((series.steps[-1] for series in run.metrics.values()), default=None)
    facts: dict[str, tuple[float | None, Any]] = {
        "Bits per byte": (bits, lambda value: f"{value:.4g}"),
        "Tokens": (run.last("tokens"), quantity),
        "Steps": (None if steps is None else float(steps) + 1, lambda value: f"{value:,.0f}"),
        "Time": (run.last("seconds"), duration),
        "Tokens per second": (run.last("throughput/tokens_per_second"), quantity),
        "Parameters": (run.last("parameters"), quantity),
        "Peak memory": (run.last("memory/peak_mib"), lambda value: f"{value:,.0f} MiB"),
        "Optimizer state": (run.last("memory/optimizer_state_mib"), lambda value: f"{value:,.1f} MiB"),
    }
    rows = [("Optimizer", optimizer_of(run))]
    rows += [(name, words(value)) for name, (value, words) in facts.items() if value is not None]
    listed = "".join(f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>" for name, value in rows if value)
    number = "–" if big is None else f"{big:.4g}"
    return (
        f'<article class="card" style="{_colour(index)}" data-run="{escape(run.name)}"><h2>{escape(run.name)}</h2>'
        f'<p class="big">{number}</p><p class="unit">{what}</p><dl>{listed}</dl>'
        f'<p class="path">{escape(str(run.folder))}</p></article>'
    )


def _headline(runs: Sequence[Run]) -> str:
    """The comparison in a sentence: the fewest tokens to where another ended."""
    metric = comparison.target_metric(runs)
    found = comparison.compare(runs, metric) if metric and len(runs) > 1 else []
    reached = [one for one in found if one.tokens is not None and one.tokens < 1]
    if not reached:
        return ""
    best = min(reached, key=lambda one: one.tokens or 0)
    return (
        f'<p class="headline"><b>{escape(best.run)}</b> reached {escape(best.other)}’s {best.target:.4g} after '
        f"<strong>{best.tokens:.0%}</strong> of its tokens.</p>"
    )


def _ratios(runs: Sequence[Run]) -> str:
    """Runs against targets."""
    metric = comparison.target_metric(runs)
    if len(runs) < 2:
        return ""
    if metric is None:
        return '<p class="note">Not every run has been validated, so that there is no common target to compare at.</p>'
    cells = {(one.run, one.other): _cell(one) for one in comparison.compare(runs, metric)}
    head = "".join(
        f'<th scope="col">{escape(run.name)}’s<br><b>{run.metrics[metric].last:.4g}</b></th>' for run in runs
    )
    body = "".join(
        f'<tr><th scope="row" style="{_colour(index)}"><i></i>{escape(run.name)}</th>'
        + "".join(cells.get((run.name, other.name), "<td>·</td>") for other in runs)
        + "</tr>"
        for index, run in enumerate(runs)
    )
    table = f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>"
    named = "validation loss" if metric == comparison.LOSS else "bits per byte, as their vocabularies differ"
    return (
        '<section id="targets"><h2>Tokens to target</h2><p class="note">How much of the other run’s tokens, and time, '
        f"a run took to where the other ended ({named}).</p>"
        f'<div class="scroll">{table}</div></section>'
    )


def _cell(one: comparison.Reached) -> str:
    if one.tokens is None and one.seconds is None:
        return f"<td>not reached<br><small>best {one.best:.4g}</small></td>"
    parts = [f"<strong>{one.tokens:.0%}</strong> of its tokens"] if one.tokens is not None else []
    parts += [f"<small>{one.seconds:.0%} of its time</small>"] if one.seconds is not None else []
    return f"<td>{'<br>'.join(parts)}</td>"


def _section(section: Section, runs: Sequence[Run], links: Links) -> str:
    of_run, named = "", ""
    if section.run is not None:
        colour = _colour([run.name for run in runs].index(section.run))
        of_run = f' data-run="{escape(section.run)}" style="{colour}"'
        named = f'<span class="of"><i></i>{escape(section.run)}</span>' if len(runs) > 1 else ""
    drawn = "".join(_figure(figure, links.get(figure.name, ())) for figure in section.figures if figure.spec)
    notes = "".join(
        f'<p class="note"><b>{escape(figure.title)}.</b> {escape(figure.caption)}</p>'
        for figure in section.figures
        if not figure.spec
    )
    grid = f'<div class="grid">{drawn}</div>' if drawn else ""
    return f"<section{of_run}><h2>{escape(section.title)}{named}</h2>{grid}{notes}</section>"


def _figure(figure: Figure, links: Sequence[str]) -> str:
    files = " · ".join(f'<a href="{escape(link)}">{link.rpartition(".")[2].upper()}</a>' for link in links)
    below = f'<p class="files">{files}</p>' if files else ""
    return (
        f"<figure><figcaption><h3>{escape(figure.title)}</h3><p>{escape(figure.caption)}</p></figcaption>"
        f'<div class="plot" id="{figure.name}"></div>{below}</figure>'
    )


def _differences(runs: Sequence[Run]) -> str:
    if len(runs) < 2:
        return ""
    found = comparison.differences(runs)
    heading = '<section id="differences"><h2>Where the configurations differ</h2>'
    if not found:
        kept = sum(bool(run.config) for run in runs)
        why = "In nothing." if kept > 1 else "Fewer than two of the runs have kept a config.yaml."
        return f'{heading}<p class="note">{why}</p></section>'
    head = "".join(f'<th scope="col">{escape(run.name)}</th>' for run in runs)
    body = "".join(
        f'<tr><th scope="row">{escape(key)}</th>'
        + "".join(f"<td>{'–' if value is None else escape(_plain(value))}</td>" for value in values)
        + "</tr>"
        for key, values in found
    )
    return (
        f'{heading}<div class="scroll"><table class="keys"><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div></section>"
    )


def _plain(value: object) -> str:
    """As YAML writes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)
