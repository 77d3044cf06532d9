"""NonFiniteGradients: NaN and infinity made in a real backward pass; weights and states to the last bit."""

import copy
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from parts import Recorder, loader, tiny_llama, trainer

from lightning_multinorm import SWAN, MultiNormGD, NonFiniteGradients, SinkGD
from lightning_multinorm.callbacks.nonfinite import IN_A_ROW
from lightning_multinorm.errors import UsageError
from lightning_multinorm.norms import ColumnNorm, RowNorm

MATRIX, EMBEDDING = "model.model.layers.1.mlp.up_proj.weight", "model.model.embed_tokens.weight"
NORM = "model.model.norm.weight"
OPTIMIZERS: dict[str, Any] = {
    "sinkgd": partial(SinkGD, weight_decay=0.1),
    "swan": partial(SWAN, weight_decay=0.1),
    "multinormgd": partial(MultiNormGD, norms=[RowNorm(), ColumnNorm()], weight_decay=0.1),
    "adamw": torch.optim.AdamW,
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1),
}


class Poison(Callback):
    """Puts a value into one entry of a parameter's gradient, while it is made in chosen batches.

    Keeps weights and the optimizer's state of before and after each batch.
    """

    def __init__(self, batches: set[int], name: str = MATRIX, value: float = math.nan) -> None:
        self.batches, self.name, self.value = batches, name, value
        self.batch = -1
        self.kept: list[tuple[Any, Any]] = []

    def on_train_start(self, trainer: Any, module: Any) -> None:
        dict(module.named_parameters())[self.name].register_hook(self._poisoned)

    def _poisoned(self, gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        if self.batch in self.batches:
            gradient.flatten()[3] = self.value
        return gradient

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        self.batch = index
        self.before = _copies(trainer, module)

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        self.kept.append((self.before, _copies(trainer, module)))

    def changed(self, batch: int) -> set[str]:
        """Parameters that, or whose state, changed in a batch."""
        (weights, states), (later, later_states) = self.kept[batch]
        return {n for n in weights if not torch.equal(weights[n], later[n]) or not _equal(states[n], later_states[n])}


def _copies(trainer: Any, module: Any) -> Any:
    named = dict(module.named_parameters())
    state = trainer.optimizers[0].state
    return {n: p.detach().clone() for n, p in named.items()}, {n: copy.deepcopy(state[p]) for n, p in named.items()}


def _equal(one: dict[str, Any], two: dict[str, Any]) -> bool:
    tensors = ({k: torch.as_tensor(v) for k, v in state.items() if v is not None} for state in (one, two))
    first, second = tensors
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def fit(folder: Path, poison: Poison, guard: NonFiniteGradients, *, steps: int = 3, **arguments: Any) -> Any:
    ckpt = arguments.pop("ckpt_path", None)
    model = {k: arguments.pop(k) for k in ("optimizer", "gradient_release") if k in arguments}
    recorder = Recorder()
    run = trainer(folder, steps, logger=recorder, callbacks=[poison, guard], **arguments)
    module = tiny_llama(**model)
    run.fit(module, loader(), ckpt_path=ckpt)
    return run, recorder, {name for name, _ in module.named_parameters()}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_skipped_step_changes_no_bit(optimizer: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    poison, guard = Poison({1}), NonFiniteGradients()
    _, recorder, names = fit(tmp_path, poison, guard, optimizer=OPTIMIZERS[optimizer])
    assert poison.changed(1) == set()
    assert poison.changed(2) == names
    assert all(parameter.isfinite().all() for parameter in poison.kept[-1][1][0].values())
    assert recorder.values("skipped_steps") == {0: 0, 1: 1, 2: 1}
    [line] = [record.getMessage() for record in caplog.records if record.name.startswith("lightning_multinorm")]
    expected = f"step 1: NaN or infinity in the gradients of 1 of {len(names)} parameters ({MATRIX}: 1 entries)"
    assert line == f"{expected}; no weight was changed; skipped so far: 1"


@pytest.mark.parametrize(("name", "value"), [(MATRIX, math.inf), (EMBEDDING, -math.inf), (NORM, math.nan)])
def test_one_entry_of_any_parameter_is_enough(name: str, value: float, tmp_path: Path) -> None:
    poison, guard = Poison({1}, name, value), NonFiniteGradients()
    fit(tmp_path, poison, guard, steps=2, precision="bf16-true")
    assert guard.skipped == 1
    assert poison.changed(1) == set()


@pytest.mark.parametrize(("precision", "value"), [("32-true", 3e38), ("bf16-true", 1e38), ("32-true", 1e15)])
@pytest.mark.parametrize("release", [False, True])
def test_a_finite_gradient_is_never_skipped(precision: Any, value: float, release: bool, tmp_path: Path) -> None:
    poison, guard = Poison({1}, value=value), NonFiniteGradients("stop")
    _, recorder, names = fit(tmp_path, poison, guard, steps=2, precision=precision, gradient_release=release)
    assert guard.skipped == 0
    assert poison.changed(1) == names
    expected = value if value < 1e19 else math.inf
    assert recorder.values("train/gradient_norm")[1] == pytest.approx(expected, rel=1e-6)


def test_the_whole_window_of_accumulation_is_dropped(tmp_path: Path) -> None:
    poison, guard = Poison({2}), NonFiniteGradients()
    _, recorder, names = fit(tmp_path, poison, guard, accumulate_grad_batches=2)
    assert [bool(poison.changed(batch)) for batch in range(6)] == [False, True, False, False, False, True]
    assert recorder.values("skipped_steps") == {0: 0, 1: 1, 2: 1}
    assert poison.changed(5) == names


def test_the_norm_is_of_all_gradients_and_clipping_goes_on_after_it(tmp_path: Path) -> None:
    poison, guard = Poison({1}), NonFiniteGradients()
    _, recorder, names = fit(tmp_path, poison, guard, gradient_clip_val=1e-3)
    module = tiny_llama()
    module.configure_model()
    batch = next(iter(loader()))
    losses = torch.nn.functional.cross_entropy(module(batch["input_ids"]).mT, batch["labels"])
    losses.backward()
    expected = torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0).item()
    norms = recorder.values("train/gradient_norm")
    assert norms[0] == pytest.approx(expected, rel=1e-5)
    assert math.isnan(norms[1])
    assert poison.changed(1) == set()
    assert poison.changed(2) == names


@pytest.mark.parametrize("release", [False, True])
def test_it_stops_before_a_weight_is_changed(release: bool, tmp_path: Path) -> None:
    poison = Poison({1}, EMBEDDING)
    with pytest.raises(UsageError, match=rf"step 1: NaN .* \({EMBEDDING}: 1 entries\).*nonfinite.action=skip"):
        fit(tmp_path, poison, NonFiniteGradients("stop"), gradient_release=release)
    assert len(poison.kept) == 1


def test_steps_skipped_in_a_row_stop_in_the_end(tmp_path: Path) -> None:
    guard = NonFiniteGradients()
    guard.load_state_dict({"skipped": 200, "in_a_row": IN_A_ROW - 2})
    fit(tmp_path, Poison({0, 2}), guard)  # one between them was taken
    assert guard.skipped == 202
    guard.load_state_dict({"skipped": 200, "in_a_row": IN_A_ROW - 2})
    poison = Poison({0, 1})
    with pytest.raises(UsageError, match=f"step 1: .*; so it was in {IN_A_ROW} steps in a row"):
        fit(tmp_path, poison, guard)
    assert poison.changed(0) == set()


@pytest.mark.filterwarnings("ignore:.*dataloader is not resumable")
def test_the_count_goes_on_after_a_resume(tmp_path: Path) -> None:
    run, _, _ = fit(tmp_path, Poison({0, 1}), NonFiniteGradients(), steps=2)
    run.save_checkpoint(tmp_path / "saved.ckpt")
    again = NonFiniteGradients()
    _, recorder, _ = fit(tmp_path, Poison({2}), again, steps=4, ckpt_path=tmp_path / "saved.ckpt")
    assert recorder.values("skipped_steps") == {2: 3, 3: 3}


@pytest.mark.parametrize("name", [MATRIX, EMBEDDING])
def test_under_release_that_parameter_is_left_alone(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    poison, guard = Poison({1}, name), NonFiniteGradients()
    optimizer = OPTIMIZERS["sinkgd"]
    _, recorder, names = fit(tmp_path, poison, guard, optimizer=optimizer, gradient_release=True)
    assert poison.changed(1) == names - {name}
    assert poison.changed(2) == names
    assert recorder.values("skipped_steps") == {0: 0, 1: 1, 2: 1}
    assert "these were not updated" in caplog.text


def test_the_norm_under_release_is_that_without(tmp_path: Path) -> None:
    norms = []
    for release in (False, True):
        _, recorder, _ = fit(tmp_path, Poison(set()), NonFiniteGradients(), gradient_release=release)
        norms.append(recorder.values("train/gradient_norm"))
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_a_loss_scaler_skips_by_itself(tmp_path: Path) -> None:
    poison, guard = Poison({1}), NonFiniteGradients("stop")
    run, _, names = fit(
        tmp_path, poison, guard, optimizer=torch.optim.AdamW, plugins=[MixedPrecision("16-mixed", "cpu")]
    )
    assert guard.skipped == 1
    assert poison.changed(1) == set()
    assert poison.changed(2) == names
    assert run.precision_plugin.scaler.get_scale() == 2.0**15  # halved, so it has seen the NaN


def test_an_unknown_action_is_refused() -> None:
    with pytest.raises(ValueError, match='action=\'ignore\' must be "skip" or "stop"'):
        NonFiniteGradients("ignore")  # type: ignore[arg-type]
