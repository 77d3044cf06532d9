"""What was logged of matrices, gathered by layer and kind, against numbers found by hand."""

import math
from pathlib import Path

import pytest

from lightning_multinorm.report import matrices
from lightning_multinorm.report.matrices import MEASURES, residual
from lightning_multinorm.report.runs import Run, open_runs

Q, K, OTHER = (
    "model.layers.0.attn.q_proj.weight",
    "model.layers.0.attn.k_proj.weight",
    "model.layers.1.attn.q_proj.weight",
)
BY_PREFIX = {measure.prefix: measure for measure in MEASURES}


def run(folder: Path, metrics: dict[str, float]) -> Run:
    names, values = ",".join(metrics), ",".join(map(str, metrics.values()))
    (folder / "metrics.csv").write_text(f"{names},step\n{values},0\n")
    return open_runs([folder])[0]


@pytest.mark.parametrize(
    ("name", "layer", "kind"),
    [(Q, 0, "q_proj"), ("h.12.mlp.0.weight", 12, "0"), ("head.weight", None, "head"), ("weight", None, "weight")],
)
def test_layer_and_kind_of_a_name(name: str, layer: int | None, kind: str) -> None:
    assert (matrices.layer_of(name), matrices.kind_of(name)) == (layer, kind)


def test_matrices_are_combined(tmp_path: Path) -> None:
    values = {Q: 3.0, K: 4.0, OTHER: 1.0, "head.weight": 9.0}
    prefixes = ("gradient_norm", "update_to_weight", "tail_index", "dead_rows")
    logged = run(tmp_path, {f"{prefix}/{name}": value for prefix in prefixes for name, value in values.items()})
    expected = {"gradient_norm": 5.0, "update_to_weight": math.sqrt(12.5), "tail_index": 3.5, "dead_rows": 7.0}
    for prefix, value in expected.items():
        layers = matrices.by_layer(logged, BY_PREFIX[prefix])
        assert {layer: series.last for layer, series in layers.items()} == {0: pytest.approx(value), 1: 1.0}
    kinds = matrices.by_kind(logged, BY_PREFIX["dead_rows"])
    assert {kind: series.last for kind, series in kinds.items()} == {"head": 9, "k_proj": 4, "q_proj": 4}
    placed = matrices.last_by_layer_and_kind(logged, BY_PREFIX["dead_rows"])
    assert placed == {(0, "q_proj"): 3, (0, "k_proj"): 4, (1, "q_proj"): 1}


def test_residuals_by_norm_and_iteration(tmp_path: Path) -> None:
    metrics = {f"norm_convergence/{Q}/row": 0.3, f"norm_convergence/{K}/row": 0.4, f"norm_convergence/{Q}/spectral": 2}
    metrics |= {
        f"norm_convergence/{Q}/row/1": 0.6,
        f"norm_convergence/{K}/row/1": 0.8,
        f"norm_convergence/{Q}/row/2": 1,
    }
    logged = run(tmp_path, metrics)
    assert matrices.norms(logged) == ["row", "spectral"]
    assert matrices.by_layer(logged, residual("row"))[0].last == pytest.approx(math.sqrt(0.125))
    assert matrices.last_by_iteration(logged, "row") == {(0, 1): pytest.approx(math.sqrt(0.5)), (0, 2): 1}
    assert matrices.last_by_iteration(logged, "spectral") == {}


def test_what_a_run_combined_itself_is_taken(tmp_path: Path) -> None:
    own = {"norm_convergence_by_layer/0/row": 0.7, "norm_convergence_by_kind/q_proj/row": 0.8}
    logged = run(tmp_path, {f"norm_convergence/{Q}/row": 0.3, **own})
    assert matrices.norms(logged) == ["row"]
    assert matrices.by_layer(logged, residual("row"))[0].last == 0.7
    assert matrices.by_kind(logged, residual("row"))["q_proj"].last == 0.8
