"""Gradient release by one flag: the same training, and refused where it would be another."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from parts import Recorder, loader, tiny_llama, trainer

from lightning_multinorm import SWAN, NormConvergence
from lightning_multinorm.errors import UsageError


class Gradients(Callback):
    """Counts the gradients that are alive after backward and after the step."""

    def __init__(self) -> None:
        self.after_backward: list[int] = []
        self.after_step: list[int] = []

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.after_backward.append(sum(p.grad is not None for p in module.parameters()))

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        self.after_step.append(sum(p.grad is not None for p in module.parameters()))


def fit(folder: Path, *, steps: int = 6, release: bool = True, optimizer: Any = None, **arguments: Any) -> Any:
    ckpt = arguments.pop("ckpt_path", None)
    given = {} if optimizer is None else {"optimizer": optimizer}
    module, recorder, gradients = tiny_llama(gradient_release=release, **given), Recorder(), Gradients()
    callbacks = [gradients, NormConvergence(every_n_steps=2), *arguments.pop("callbacks", [])]
    run = trainer(folder, steps, logger=recorder, callbacks=callbacks, **arguments)
    run.fit(module, loader(), ckpt_path=ckpt)
    return module, recorder, gradients


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_training_is_the_same(tmp_path: Path, precision: Any) -> None:
    module, recorder, gradients = fit(tmp_path, precision=precision)
    other, expected, kept = fit(tmp_path, release=False, precision=precision)
    assert recorder.values("train/loss") == expected.values("train/loss")
    for parameter, value in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(parameter, value)
    assert set(gradients.after_backward) == {0}
    assert min(kept.after_backward) == len(list(module.parameters()))
    [key, *_] = sorted(recorder.keys("norm_convergence/"))
    assert recorder.values(key) == expected.values(key)


def test_gradients_are_freed_before_the_next_forward_pass(tmp_path: Path) -> None:
    _, _, gradients = fit(tmp_path, release=False)
    assert set(gradients.after_step) == {0}


def test_accumulated_gradients_are_kept_until_the_step(tmp_path: Path) -> None:
    _, _, gradients = fit(tmp_path, release=False, steps=2, accumulate_grad_batches=2)
    assert [bool(count) for count in gradients.after_step] == [True, False, True, False]


@pytest.mark.filterwarnings(
    "ignore:Checkpoint directory .* exists and is not empty", "ignore:.*dataloader is not resumable"
)
def test_a_released_run_resumes(tmp_path: Path) -> None:
    def saving() -> dict[str, Any]:
        checkpoint = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1)
        return {"callbacks": [checkpoint], "enable_checkpointing": True}

    whole, _, _ = fit(tmp_path, **saving())
    [path] = tmp_path.rglob("step=3.ckpt")
    assert path.is_file()
    rest, _, _ = fit(tmp_path, ckpt_path=path, **saving())
    assert rest.trainer.global_step == whole.trainer.global_step == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"accumulate_grad_batches": 2}, "accumulate_grad_batches=1"),
        ({"gradient_clip_val": 1.0}, "gradient_clip_val=1.0"),
        ({"precision": "16-true"}, "bf16-true"),
        ({"optimizer": torch.optim.AdamW}, "not for AdamW"),
    ],
)
def test_what_would_change_the_training_is_refused(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        fit(tmp_path, **arguments)


def test_other_optimizers_of_the_family_release_too(tmp_path: Path) -> None:
    module, _, gradients = fit(tmp_path, optimizer=SWAN)
    other, _, _ = fit(tmp_path, optimizer=SWAN, release=False)
    assert set(gradients.after_backward) == {0}
    for parameter, value in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(parameter, value)
