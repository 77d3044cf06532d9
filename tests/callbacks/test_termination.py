"""SIGTERM ends a run with a checkpoint from which it goes on as if nothing had happened."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_multinorm.callbacks import RandomState, TerminationCheckpoint
from lightning_multinorm.checkpoints.io import CheckpointFiles

from .dropout import fit

pytestmark = [
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
]


class Send(Callback):
    """Sends SIGTERM to its own process, twice, in the middle of a step, of a validation, or of writing a checkpoint."""

    def __init__(self, step: int, during: str = "step") -> None:
        self.step, self.during = step, during

    def send(self, trainer: Any, during: str) -> None:
        if trainer.global_step == self.step and self.during == during:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)

    def on_before_backward(self, trainer: Any, *_: Any) -> None:
        self.send(trainer, "batch")  # with accumulation, the first of several

    def on_before_optimizer_step(self, trainer: Any, *_: Any) -> None:
        self.send(trainer, "step")

    def on_validation_batch_start(self, trainer: Any, *_: Any) -> None:
        self.send(trainer, "validation" if not trainer.sanity_checking else "check")

    def on_save_checkpoint(self, trainer: Any, *_: Any) -> None:
        self.send(trainer, "saving")


def callbacks(folder: Path, *more: Callback, **options: Any) -> dict[str, Any]:
    saving = TerminationCheckpoint(folder, "{step}", **{"save_last": True, "every_n_train_steps": 100, **options})
    return {"callbacks": [RandomState(), *more, saving], "plugins": [CheckpointFiles()]}


def stopped(folder: Path, *more: Callback, **options: Any) -> Any:
    """Fit until it is ended; the model."""
    saving = ("save_last", "save_weights_only", "every_n_train_steps")
    chosen = {key: options.pop(key) for key in saving if key in options}
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        fit(folder, **callbacks(folder, *more, **chosen), **options)
    assert ended.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize(
    ("step", "during", "options", "saved"),
    [
        (1, "batch", {}, 2),
        (1, "step", {}, 2),
        (2, "validation", {}, 2),
        (1, "saving", {"every_n_train_steps": 1}, 1),
        (1, "step", {"save_last": "link"}, 2),
        (1, "step", {"save_weights_only": True}, 2),
    ],
)
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(
    tmp_path: Path, step: int, during: str, options: dict[str, Any], saved: int, accumulate: int
) -> None:
    schedule = {"accumulate_grad_batches": accumulate, "val_check_interval": 2 * accumulate}
    _, whole = fit(tmp_path / "whole", **callbacks(tmp_path / "whole"), **schedule)
    stopped(tmp_path / "a", Send(step, during), **options, **schedule)
    name = "last.ckpt" if options.keys() <= {"every_n_train_steps"} else f"stopped-step={saved}.ckpt"
    assert torch.load(tmp_path / "a" / name, weights_only=True)["global_step"] == saved
    _, rest = fit(tmp_path / "b", tmp_path / "a" / name, **callbacks(tmp_path / "b"), **schedule)
    rest_of_it = {at: loss for at, loss in whole.losses.items() if at >= saved}
    assert rest.losses == rest_of_it != {}


def test_a_check_before_training_has_nothing_to_save(tmp_path: Path) -> None:
    stopped(tmp_path, Send(0, "check"), num_sanity_val_steps=2)
    assert list(tmp_path.iterdir()) == []


class Fail(Callback):
    def __init__(self, hook: str) -> None:
        setattr(self, hook, self.fail)

    def fail(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 2:
            raise RuntimeError("power cut")


@pytest.mark.parametrize(("hook", "saved"), [("on_before_zero_grad", False), ("on_validation_start", True)])
def test_half_a_step_is_not_saved(tmp_path: Path, hook: str, saved: bool) -> None:
    options = callbacks(tmp_path, Fail(hook), save_on_exception=True)
    with pytest.raises(RuntimeError, match="power cut"):
        if saved:
            fit(tmp_path, val_check_interval=2, **options)
        else:
            with pytest.warns(UserWarning, match="in the middle of a step"):
                fit(tmp_path, **options)
    assert (tmp_path / "last.ckpt").exists() == saved


def test_it_is_lightnings_otherwise(tmp_path: Path) -> None:
    for kind in (ModelCheckpoint, TerminationCheckpoint):
        saving = kind(tmp_path / kind.__name__, "{step}", every_n_train_steps=2, save_top_k=-1, save_last=True)
        fit(tmp_path, callbacks=[saving])
        names = sorted(path.name for path in (tmp_path / kind.__name__).iterdir())
        assert names == ["last.ckpt", *(f"step={step}.ckpt" for step in (10, 12, 2, 4, 6, 8))]
