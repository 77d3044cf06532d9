"""The figures of a report: which of them its runs have logged enough for, and a sentence in place of those that not."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from lightning_multinorm.report import matrices
from lightning_multinorm.report.charts import (
    Canvas,
    Spec,
    bars,
    heat_map,
    kinds_colour,
    layers_colour,
    over_training,
)
from lightning_multinorm.report.matrices import Measure
from lightning_multinorm.report.runs import Run, Series
from lightning_multinorm.report.tables import Row, clock, points

LOSS_POINTS, LINE_POINTS = 800, 160
"""The most points of a line: of a run's losses, and of one of many lines."""
EXACT = 1e-6
"""A norm that is never further off is met exactly, but for rounding."""


@dataclass(frozen=True)
class Figure:
    """A figure, or the sentence that stands for it.

    Attributes:
        name: of its files.
        title: in words.
        caption: what it shows, and how to read it.
        spec: of Vega-Lite; None if what it needs was not logged.
    """

    name: str
    title: str
    caption: str
    spec: Spec | None = None


@dataclass(frozen=True)
class Section:
    """Figures under one heading.

    Attributes:
        title: in words.
        run: that they are of alone; None if they compare all.
        figures: of it.
    """

    title: str
    run: str | None = None
    figures: list[Figure] = field(default_factory=list)


def canvas(runs: Sequence[Run]) -> Canvas:
    """What the figures have in common; training is drawn over tokens where they were logged."""
    axis = "tokens" if any("tokens" in run.metrics for run in runs) else "step"
    return Canvas([run.name for run in runs], clock(runs), axis)


def sections(runs: Sequence[Run]) -> list[Section]:
    """All of a report, in reading order."""
    common = canvas(runs)
    found = [Section("Training", None, list(_training(runs, common)))]
    for index, run in enumerate(runs):
        found.append(Section("Convergence of the norms", run.name, list(_residuals(run, index, common))))
        if others := list(_measures(run, index, common)):
            found.append(Section("Gradients and updates", run.name, others))
    found.append(Section("Speed and memory", None, list(_resources(runs, common))))
    return found


def _training(runs: Sequence[Run], common: Canvas) -> Iterator[Figure]:
    caption = "Faint: as logged. Line: moving mean of it. Points on the dashed line: validation."
    loss = [("train/loss", "line"), ("val/loss", "point")]
    yield _of_runs(runs, common, "loss", "Loss", "Loss (nats per token)", caption, loss, smooth=True)
    caption = "Of the validation text; it does not depend on the tokenizer, so that any two runs compare in it."
    bits = [("val/bits_per_byte", "point")]
    yield _of_runs(runs, common, "bits_per_byte", "Bits per byte", "Bits per byte", caption, bits)
    norm = [("train/gradient_norm", "line")]
    caption = "Of all gradients together, before they are clipped."
    name = "Gradient norm of the model"
    yield _of_runs(runs, common, "train_gradient_norm", name, "Gradient norm", caption, norm, log=True)


def _resources(runs: Sequence[Run], common: Canvas) -> Iterator[Figure]:
    rate = [("throughput/tokens_per_second", "line")]
    caption = "Over the last batches, of all ranks together, without validation and saving."
    yield _of_runs(runs, common, "tokens_per_second", "Throughput", "Tokens per second", caption, rate)
    caption = "Of the first rank: the most that was in use, and the states of the optimizer."
    kinds = {"peak": "memory/peak_mib", "optimizer state": "memory/optimizer_state_mib"}
    rows: list[Row] = [
        (run.name, what, run.metrics[name].last) for what, name in kinds.items() for run in runs if name in run.metrics
    ]
    spec = bars(common, rows, "Memory (MiB)") if rows else None
    yield Figure("memory", "Memory", caption if rows else "No memory was logged.", spec)


def _of_runs(
    runs: Sequence[Run],
    common: Canvas,
    name: str,
    title: str,
    axis: str,
    caption: str,
    metrics: list[tuple[str, str]],
    *,
    log: bool = False,
    smooth: bool = False,
) -> Figure:
    """A figure with the lines of every run."""
    rows = [
        row
        for run in runs
        for metric, mark in metrics
        if metric in run.metrics
        for row in points(run, _positive(run.metrics[metric], log), common.clock, LOSS_POINTS, run.name, mark)
    ]
    if not rows:
        return Figure(name, title, f"No {' or '.join(metric for metric, _ in metrics)} was logged.")
    missing = [run.name for run in runs if not any(metric in run.metrics for metric, _ in metrics)]
    caption += f" Not logged by {', '.join(missing)}." if missing else ""
    return Figure(name, title, caption, over_training(common, rows, axis, common.colours(), log=log, smooth=smooth))


def _residuals(run: Run, index: int, common: Canvas) -> Iterator[Figure]:
    norms = matrices.norms(run)
    if not norms:
        yield Figure(f"residuals_{index}", "Residuals", "No norm_convergence was logged; NormConvergence does so.")
    for norm in norms:
        measure = matrices.residual(norm)
        lines = matrices.by_layer(run, measure) or matrices.by_kind(run, measure)
        iterations = matrices.last_by_iteration(run, norm)
        worst = max([*(s.values.max() for s in lines.values()), *iterations.values()], default=0.0)
        if worst <= EXACT:
            caption = f"Met exactly, but for rounding: nowhere above {worst:.0e}. It is the norm projected on last."
            yield Figure(f"{measure.name}_{index}", measure.title, caption)
            continue
        yield from _iterations(norm, index, iterations)
        yield from _heat_map(run, measure, index)
        yield from _lines(run, measure, index, common)


def _iterations(norm: str, index: int, found: dict[tuple[int, int], float]) -> Iterator[Figure]:
    title, name = f"Residual of the {norm} norm by iteration", f"{matrices.residual(norm).name}_iterations_{index}"
    if not found:
        yield Figure(name, title, "Not logged: set norm_convergence.per_iteration to true.")
        return
    rows: list[Row] = [(iteration, layer, value) for (layer, iteration), value in found.items()]
    caption = "After each iteration of the last logged step."
    yield Figure(name, title, caption, heat_map(rows, "Iteration", "Layer", "Residual", log=True))


def _heat_map(run: Run, measure: Measure, index: int) -> Iterator[Figure]:
    found = matrices.last_by_layer_and_kind(run, measure)
    if len(found) > 1:
        rows: list[Row] = [(kind, layer, value) for (layer, kind), value in found.items()]
        rows.sort(key=lambda row: matrices.place_of_kind(str(row[0])))
        spec = heat_map(rows, "Matrix", "Layer", measure.axis, log=measure.log)
        yield Figure(f"{measure.name}_matrices_{index}", f"{measure.title} by matrix", "In the last logged step.", spec)


def _lines(run: Run, measure: Measure, index: int, common: Canvas) -> Iterator[Figure]:
    """Over training, by layer and by kind."""
    layers, kinds = matrices.by_layer(run, measure), matrices.by_kind(run, measure)
    groups: list[tuple[str, dict[int, Series] | dict[str, Series], Callable[[], Spec]]] = [
        ("layer", layers, layers_colour),
        ("kind", kinds, lambda: kinds_colour(list(kinds))),
    ]
    how = {"rms": "Root mean square", "mean": "Mean", "sum": "Sum", "norm": "Norm"}[measure.combine]
    for by, lines, colour in groups:
        if len(lines) > 1:
            rows = [
                row
                for label, series in lines.items()
                for row in points(run, _positive(series, measure.log), common.clock, LINE_POINTS, label, "line")
            ]
            spec = over_training(common, rows, measure.axis, colour(), log=measure.log)
            caption = f"{how} over the matrices of a {by}."
            yield Figure(f"{measure.name}_by_{by}_{index}", f"{measure.title} by {by}", caption, spec)


def _measures(run: Run, index: int, common: Canvas) -> Iterator[Figure]:
    for measure in matrices.MEASURES:
        found = matrices.by_kind(run, measure) or matrices.by_layer(run, measure)
        if found and measure.combine == "sum" and not any(series.values.any() for series in found.values()):
            yield Figure(f"{measure.name}_{index}", measure.title, "There was none.")
        else:
            yield from _lines(run, measure, index, common)


def _positive(series: Series, log: bool) -> Series:
    """Without what a logarithm has no place for."""
    keep = series.values > 0 if log else slice(None)
    return Series(series.steps[keep], series.values[keep])
