"""NormConvergence in foreign Lightning projects: its values against a float64 recomputation from saved gradients."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from parts import Recorder, loader, tiny_llama, trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_multinorm import SWAN, MultiNormGD, NormConvergence, SinkGD
from lightning_multinorm.callbacks.telemetry import Telemetry
from lightning_multinorm.errors import UsageError
from lightning_multinorm.norms import ColumnNorm, Norm, RowNorm


class Vision(LightningModule):
    """Somebody else's project: a small convolutional classifier with one attention layer."""

    def __init__(self, make_optimizer: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Conv2d(1, 12, 4, stride=4)
        self.mixer = nn.TransformerEncoderLayer(12, 2, 24, dropout=0.0, batch_first=True)
        self.head = nn.Linear(12, 3)
        self.make_optimizer = make_optimizer

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        images, classes = batch
        tokens = self.patches(images).flatten(2).mT
        return nn.functional.cross_entropy(self.head(self.mixer(tokens).mean(1)), classes)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make_optimizer(self.named_parameters())


class Gradients(Callback):
    """Saves the gradients that the optimizer is about to see, by step and name."""

    def __init__(self) -> None:
        self.saved: dict[int, dict[str, torch.Tensor]] = {}

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.saved[trainer.global_step] = {n: p.grad.clone() for n, p in pl_module.named_parameters()}


def images() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(3)
    data = TensorDataset(torch.randn(48, 1, 8, 8, generator=generator), torch.randint(0, 3, (48,), generator=generator))
    return DataLoader(data, batch_size=8)


def train(folder: Path, make_optimizer: Any, *callbacks: Callback, steps: int = 6, **arguments: Any) -> Any:
    recorder, gradients, module = Recorder(), Gradients(), Vision(make_optimizer)
    run = trainer(folder, steps, logger=recorder, callbacks=[gradients, *callbacks], max_epochs=3, **arguments)
    run.fit(module, images())
    return recorder, gradients.saved, module


def alternate(gradient: torch.Tensor, norms: list[Norm], iterations: int) -> list[list[float]]:
    """Residuals after each iteration, in float64, from the definition ‖X − P(X)‖_F / √(mn)."""
    X, residuals = gradient.double(), []
    for _ in range(iterations):
        for norm in norms:
            X = norm.project(X)
        residuals.append([((X - norm.project(X)).square().mean().sqrt()).item() for norm in norms])
    return residuals


MATRICES = {
    "mixer.linear1.weight": (24, 12),
    "mixer.linear2.weight": (12, 24),
    "mixer.self_attn.out_proj.weight": (12, 12),
    "patches.weight": (12, 16),
}
CASES = {
    "sinkgd": (lambda named: SinkGD(named, lr=0.1, iterations=3), [RowNorm(), ColumnNorm()], 3),
    "multinormgd": (
        lambda named: MultiNormGD(named, norms=[ColumnNorm(), RowNorm()], lr=0.1, iterations=2),
        [ColumnNorm(), RowNorm()],
        2,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_values_are_the_residuals_of_the_gradients_seen(case: str, tmp_path: Path) -> None:
    make_optimizer, norms, iterations = CASES[case]
    recorder, gradients, _ = train(tmp_path, make_optimizer, NormConvergence(every_n_steps=2, per_iteration=True))
    for step in (0, 2, 4):
        for name, shape in MATRICES.items():
            expected = alternate(gradients[step][name].reshape(shape), norms, iterations)
            for k, norm in enumerate(norms):
                key = f"norm_convergence/{name}/{norm.name}"
                for iteration in range(iterations):
                    value = recorder.values(f"{key}/{iteration + 1}")[step]
                    assert value == pytest.approx(expected[iteration][k], rel=1e-4, abs=1e-6)
                assert recorder.values(key)[step] == pytest.approx(expected[-1][k], rel=1e-4, abs=1e-6)


def test_packed_qkv_is_the_root_mean_square_of_its_three_matrices(tmp_path: Path) -> None:
    recorder, gradients, _ = train(tmp_path, CASES["sinkgd"][0], NormConvergence(every_n_steps=3))
    name = "mixer.self_attn.in_proj_weight"
    parts = gradients[3][name].chunk(3)
    rows = torch.tensor([alternate(part, [RowNorm(), ColumnNorm()], 3)[-1][0] for part in parts])
    value = recorder.values(f"norm_convergence/{name}/row")[3]
    assert value == pytest.approx(rows.square().mean().sqrt().item(), rel=1e-4)


@pytest.mark.parametrize(("whitening", "low", "high"), [("svd", 0.0, 1e-5), ("newton_schulz", 0.05, 0.6)])
def test_swan_reports_how_white_its_update_is(whitening: Any, low: float, high: float, tmp_path: Path) -> None:
    recorder, _, _ = train(tmp_path, lambda named: SWAN(named, whitening=whitening), NormConvergence(every_n_steps=1))
    spectral = recorder.values("norm_convergence/patches.weight/spectral")  # of a gradient of full rank
    assert len(spectral) == 6 and all(low < value < high for value in spectral.values())
    assert recorder.values("norm_convergence/patches.weight/row").keys() == spectral.keys()


def test_only_matrices_and_only_every_nth_step_are_logged(tmp_path: Path) -> None:
    recorder, _, _ = train(tmp_path, SinkGD, NormConvergence(every_n_steps=4))
    names = {key.removeprefix("norm_convergence/").rpartition("/")[0] for key in recorder.keys("norm_convergence/")}
    assert names == {*MATRICES, "mixer.self_attn.in_proj_weight"}
    assert set(recorder.values("norm_convergence/patches.weight/row")) == {0, 4}


def test_under_accumulation_it_is_the_accumulated_gradient_that_counts(tmp_path: Path) -> None:
    recorder, gradients, _ = train(
        tmp_path, CASES["sinkgd"][0], NormConvergence(every_n_steps=1), steps=3, accumulate_grad_batches=2
    )
    values = recorder.values("norm_convergence/mixer.linear1.weight/row")
    assert set(values) == {0, 1, 2}
    for step, value in values.items():
        expected = alternate(gradients[step]["mixer.linear1.weight"], [RowNorm(), ColumnNorm()], 3)[-1][0]  # type: ignore[index]
        assert value == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("shadow", [False, True])
def test_watching_changes_no_weight(shadow: bool, tmp_path: Path) -> None:
    make_optimizer: Any = (lambda named: torch.optim.AdamW(named)) if shadow else SinkGD
    _, _, watched = train(tmp_path, make_optimizer, NormConvergence(every_n_steps=1, shadow=shadow))
    _, _, alone = train(tmp_path, make_optimizer)
    assert all(torch.equal(a, b) for a, b in zip(watched.parameters(), alone.parameters(), strict=True))


def test_shadow_computes_what_the_scheme_would_do(tmp_path: Path) -> None:
    callback = NormConvergence(every_n_steps=5, shadow=True, per_iteration=True, iterations=4)
    recorder, gradients, _ = train(tmp_path, torch.optim.AdamW, callback)
    expected = alternate(gradients[5]["mixer.linear2.weight"], [RowNorm(), ColumnNorm()], 4)
    for iteration in range(4):
        value = recorder.values(f"norm_convergence/mixer.linear2.weight/row/{iteration + 1}")[5]
        assert value == pytest.approx(expected[iteration][0], rel=1e-4, abs=1e-6)


def test_statistics_are_those_of_the_gradients_seen(tmp_path: Path) -> None:
    recorder, gradients, _ = train(tmp_path, SinkGD, NormConvergence(every_n_steps=3))
    for step, saved in ((0, gradients[0]), (3, gradients[3])):
        for name, (m, n) in MATRICES.items():
            rows = saved[name].double().reshape(m, n).norm(dim=1).sort(descending=True).values
            k = -(-m // 10)
            expected = {
                "gradient_norm": rows.norm().item(),
                "tail_index": 1 / (rows[:k] / rows[k]).log().mean().item(),
                "dead_rows": 0,
                "dead_columns": 0,
                "update_rms": 0.001,
            }
            for statistic, value in expected.items():
                assert recorder.values(f"{statistic}/{name}")[step] == pytest.approx(value, rel=1e-4)


def test_layers_and_kinds_are_root_mean_squares_over_their_parameters(tmp_path: Path) -> None:
    recorder, module = Recorder(), tiny_llama()
    watch = NormConvergence(every_n_steps=2)
    trainer(tmp_path, 3, logger=recorder, callbacks=[watch]).fit(module, loader())
    metrics = next(
        metrics for step, metrics in recorder.records if step == 2 and "norm_convergence_by_layer/1/row" in metrics
    )
    single = {
        key: value for key, value in metrics.items() if key.startswith("norm_convergence/") and key.endswith("row")
    }
    assert len(single) == 14
    for aggregate, part in (("layer/1", ".layers.1."), ("kind/q_proj", ".q_proj."), ("kind/down_proj", ".down_proj.")):
        squares = [value**2 for key, value in single.items() if part in key]
        wanted = (sum(squares) / len(squares)) ** 0.5
        assert metrics[f"norm_convergence_by_{aggregate}/row"] == pytest.approx(wanted, rel=1e-6)
    assert watch.metrics == metrics


def test_names_choose_what_is_logged(tmp_path: Path) -> None:
    watch = NormConvergence(every_n_steps=1, include=r"mixer\.", exclude="linear|in_proj")
    recorder, _, _ = train(tmp_path, SinkGD, watch, steps=1)
    assert set(recorder.keys("norm_convergence/")) == {
        f"norm_convergence/mixer.self_attn.out_proj.weight/{norm}" for norm in ("row", "column")
    }


def test_what_has_not_converged_is_told_once_and_not_again_after_resuming(tmp_path: Path) -> None:
    watch = NormConvergence(every_n_steps=1, include="linear1", warn_above=1e-9)
    with pytest.warns(
        UserWarning, match=r"mixer.linear1.weight has not converged: residual .* after 1 iterations"
    ) as told:
        train(tmp_path, lambda named: SinkGD(named, iterations=1), watch, steps=3)
    assert len([warning for warning in told if "converged" in str(warning.message)]) == 1
    resumed = NormConvergence(every_n_steps=1, include="linear1", warn_above=1e-9)
    resumed.load_state_dict(watch.state_dict())
    assert resumed.metrics == watch.metrics != {}
    train(tmp_path, lambda named: SinkGD(named, iterations=1), resumed, steps=3)  # where warnings are errors


def test_a_layer_is_named_as_people_do() -> None:
    assert Telemetry.title("model.model.layers.3.self_attn.o_proj.weight") == "layer 3 o_proj"


def test_gradient_release_tells_the_same(tmp_path: Path) -> None:
    records = []
    for released in (False, True):
        recorder = Recorder()
        watch = NormConvergence(every_n_steps=1)
        trainer(tmp_path, 3, logger=recorder, callbacks=[watch]).fit(tiny_llama(gradient_release=released), loader())
        records.append({step: metrics for step, metrics in recorder.records if any("row" in key for key in metrics)})
    assert records[0].keys() == records[1].keys() == {0, 1, 2}
    for step, metrics in records[0].items():
        assert metrics == pytest.approx(records[1][step], rel=1e-6)


def test_chosen_iterations_are_logged(tmp_path: Path) -> None:
    make_optimizer = lambda named: SinkGD(named, iterations="auto", tolerance=0.2, max_iterations=4)  # noqa: E731
    recorder, gradients, _ = train(tmp_path, make_optimizer, NormConvergence(every_n_steps=1), steps=2)
    for name, shape in MATRICES.items():
        residuals = alternate(gradients[0][name].reshape(shape), [RowNorm(), ColumnNorm()], 4)
        needed = next((k for k, found in enumerate(residuals, 1) if max(found) <= 0.2), 4)
        assert recorder.values(f"iterations/{name}") == {0: needed, 1: needed}


def test_tensorboard_and_csv_get_all_of_it(tmp_path: Path) -> None:
    loggers = [TensorBoardLogger(tmp_path, name="board"), CSVLogger(tmp_path, name="table")]
    watch = NormConvergence(every_n_steps=1, per_iteration=True)
    trainer(tmp_path, 2, logger=loggers, callbacks=[watch]).fit(tiny_llama(), loader())
    events = EventAccumulator(loggers[0].log_dir)
    events.Reload()
    with (Path(loggers[1].log_dir) / "metrics.csv").open() as file:
        logged = [row for row in csv.DictReader(file) if row["norm_convergence_by_kind/q_proj/row"]]
    first, last = ({key: float(value) for key, value in row.items() if value} for row in logged)
    for key, value in watch.metrics.items():
        assert last[key] == pytest.approx(value)
        if key.startswith("norm_convergence_by_"):
            assert [event.step for event in events.Scalars(key)] == [0, 1]
            assert events.Scalars(key)[1].value == pytest.approx(value)
        else:  # every tenth step is enough for what its writer takes long to write
            assert [event.step for event in events.Scalars(key)] == [0]
            assert events.Scalars(key)[0].value == pytest.approx(first[key])
    for name, size in (("kinds", (7 * 16, 2 * 16)), ("iterations", (5 * 16, 2 * 16))):
        (image,) = events.Images(f"norm_convergence_layers_by_{name}/row")
        assert (image.width, image.height) == size
    assert "custom_scalars__config__" in events.Tags()["tensors"]


def test_without_an_optimizer_to_listen_to_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"trains with AdamW; set shadow=True"):
        train(tmp_path, torch.optim.AdamW, NormConvergence())


@pytest.mark.parametrize("arguments", [{"every_n_steps": 0}, {"iterations": 0}, {"include": "("}])
def test_arguments_out_of_range_are_refused_by_name(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        NormConvergence(**arguments)
