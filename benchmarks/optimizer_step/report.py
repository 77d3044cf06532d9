"""From timings and surveys to a results file and a table."""

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from rich import box
from rich.table import Table

from benchmarks.machine import describe
from benchmarks.optimizer_step.contenders import CONTENDERS
from benchmarks.optimizer_step.matrices import Matrices
from benchmarks.optimizer_step.measure import Timing
from benchmarks.optimizer_step.survey import Survey

RESULTS = Path(__file__).parents[1] / "results"
UPKEEP_EVERY = 200
EXPLANATIONS = {
    "ratio": "time over that of a step of fused AdamW right before or after it: median, and quartiles in brackets",
    "ratio_thirds": (
        "the same in the third of the pairs in which AdamW was fastest, and in that in which it was slowest: how far "
        "it depends on the memory's speed, somewhat overdrawn, as AdamW's own noise chooses the pairs; null for few "
        "rounds"
    ),
    "state": "bytes of all tensors that optimizer.state reaches",
    "peak": "most bytes held during a step beyond weights, gradients and state, over the bytes of the weights",
    "floor": (
        "time of moving the least number of bytes at the speed of a large copy: gradient and weight read, weight "
        "written, state read and written; so 3 times the weights' bytes for SinkGD, SWAN and SGD, 7 times for AdamW. "
        "A gradient that does not stay in cache is read up to L + 1 times by SinkGD, which this does not count"
    ),
    "GB/s": "the bytes of the floor over the time",
    "first": "seconds of the first step, with compilation as far as its disk cache is empty; a fresh process on CPU",
}


def entry(key: str, timing: Timing, survey: Survey, matrices: Matrices, bandwidth: float) -> dict[str, Any]:
    """All that is reported of one contender."""
    contender = CONTENDERS[key]
    seconds = median(timing.seconds)
    least = 3 * matrices.bytes + 2 * survey.state
    return {
        "title": contender.title,
        "family": contender.family,
        "settings": contender.settings,
        "library": _library(contender.package),
        "median_ms": seconds * 1e3,
        "ratio": _quartiles(timing.ratios),
        "ratio_thirds": _thirds(timing),
        "state_bytes": survey.state,
        "peak_bytes": survey.peak,
        "peak_fraction": survey.peak / matrices.bytes,
        "peak_resident_bytes": survey.peak_resident,
        "peak_allocated_bytes": survey.peak_allocated,
        "floor_bytes": least,
        "floor_ms": least / bandwidth * 1e3,
        "gb_per_s": least / seconds / 1e9,
        "time_over_floor": seconds * bandwidth / least,
        "first_step_s": survey.first_step,
        "notes": _notes(survey, len(timing.pairs)),
        "upkeep_ms_per_step": None if survey.upkeep is None else survey.upkeep / UPKEEP_EVERY * 1e3,
        "seconds": timing.seconds,
        "reference_seconds": [reference for _, reference in timing.pairs],
    }


def result(
    options: Mapping[str, Any],
    matrices: Matrices,
    bandwidth: float,
    blocks: Sequence[Sequence[str]],
    entries: Mapping[str, Any],
    missing: Mapping[str, str],
    orthogonality: Mapping[str, Any],
) -> dict[str, Any]:
    """The content of a results file."""
    machine = describe()
    packages = {contender.package for contender in CONTENDERS.values() if contender.package} | {"numba", "triton"}
    machine["versions"] |= {package: _version(package) for package in sorted(packages) if _version(package)}
    return {
        "machine": machine,
        **options,
        "shapes": matrices.shapes,
        "parameters": matrices.count,
        "parameter_bytes": matrices.bytes,
        "copy_gb_per_s": bandwidth / 1e9,
        "blocks": [list(block) for block in blocks],
        "explanations": EXPLANATIONS,
        "contenders": dict(entries),
        "missing": dict(missing),
        "orthogonality": dict(orthogonality),
    }


def path(folder: Path, model: str, dtype: str, device: str) -> Path:
    """Where a result lies."""
    return folder / f"optimizer_step_{model}_{dtype}_{device}.json"


def write(folder: Path, content: Mapping[str, Any]) -> Path:
    """Write a result, into the file named after what was measured."""
    target = path(folder, content["model"], content["dtype"], content["device"])
    folder.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(content, indent=1) + "\n")
    return target


def table(content: Mapping[str, Any]) -> Table:
    """Fastest first; then those that are missing, and why. If fast, if slow: the ratio's thirds, by AdamW's speed."""
    view = Table(
        box=box.SIMPLE,
        title=f"One step of the {content['model']}'s matrices, {content['dtype']}, {content['device']}",
        caption=(
            f"{content['parameters'] / 1e6:.1f} M parameters, {content['parameter_bytes'] / 1e6:.1f} MB; "
            f"{content['threads']} threads; {content['rounds']} rounds; copies at {content['copy_gb_per_s']:.1f} GB/s"
        ),
    )
    view.add_column("optimizer", no_wrap=True)
    for heading in ("ms", "× AdamW", "if fast", "if slow", "state", "peak", "GB/s", "time/floor", "first"):
        view.add_column(heading, justify="right", no_wrap=True)
    view.add_column("notes", min_width=20)
    for row in sorted(content["contenders"].values(), key=lambda row: row["median_ms"]):
        low, middle, high = row["ratio"]
        view.add_row(
            row["title"],
            f"{row['median_ms']:.2f}",
            f"{middle:.2f} ({low:.2f}-{high:.2f})",
            *("-" if ratio is None else f"{ratio:.2f}" for ratio in row["ratio_thirds"] or (None, None)),
            f"{row['state_bytes'] / 1e6:.1f} MB",
            f"{row['peak_fraction']:.0%}",
            f"{row['gb_per_s']:.1f}",
            f"{row['time_over_floor']:.1f}",
            f"{row['first_step_s']:.1f} s",
            "; ".join(row["notes"]),
        )
    for key, reason in content["missing"].items():
        view.add_row(CONTENDERS[key].title, *["-"] * 9, reason, style="dim")
    return view


def _notes(survey: Survey, rounds: int) -> list[str]:
    notes = [f"{rounds} rounds"] if rounds < 5 else []
    if survey.changes_gradient:
        notes.append("rewrites the gradient")
    if survey.upkeep is not None:
        amortised = survey.upkeep / UPKEEP_EVERY * 1e3
        notes.append(f"without its SVD every {UPKEEP_EVERY} steps: +{amortised:.3g} ms a step")
    return notes


def _thirds(timing: Timing) -> list[float] | None:
    """The median ratio where the reference was fastest, and where it was slowest."""
    third = len(timing.pairs) // 3
    if third < 3:
        return None
    pairs = sorted(timing.pairs, key=lambda pair: pair[1])
    return [median(own / reference for own, reference in part) for part in (pairs[:third], pairs[-third:])]


def _quartiles(values: Sequence[float]) -> list[float]:
    """Lower quartile, median and upper quartile."""
    return quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3


def _library(package: str | None) -> str | None:
    return None if package is None else f"{package} {_version(package)}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
