"""A resumed run draws the random numbers that the uninterrupted one draws."""

import logging
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_multinorm.callbacks import RandomState
from lightning_multinorm.callbacks.random_state import KEY

from .dropout import fit

pytestmark = [
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """With a checkpoint after each step."""
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    _, whole = fit(tmp_path, callbacks=[RandomState(), saving])
    torch.save(whole.losses, tmp_path / "losses.pt")
    return tmp_path


def test_resumed_is_uninterrupted(run: Path) -> None:
    whole = torch.load(run / "losses.pt")
    _, rest = fit(run, run / "step=5.ckpt", callbacks=[RandomState()])
    assert rest.losses == {step: loss for step, loss in whole.items() if step >= 5}
    _, other = fit(run, run / "step=5.ckpt", callbacks=[])
    assert other.losses.keys() == rest.losses.keys() and other.losses != rest.losses  # the numbers do matter


def test_only_plain_values_and_tensors_are_kept(run: Path) -> None:
    (state,) = torch.load(run / "step=1.ckpt", weights_only=True)[KEY]
    assert state.keys() == {"python", "numpy", "torch"}


def test_on_other_ranks_all_go_on_from_the_first(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = torch.load(run / "step=5.ckpt", weights_only=True)
    other = torch.get_rng_state()
    checkpoint[KEY] = [checkpoint[KEY][0], {**checkpoint[KEY][0], "torch": other}]
    torch.save(checkpoint, run / "two.ckpt")
    with caplog.at_level(logging.INFO):
        _, rest = fit(run, run / "two.ckpt", callbacks=[RandomState()])
    assert "random states of 2 rank(s), this run has 1: all go on from the first's" in caplog.text
    assert rest.losses[6] == torch.load(run / "losses.pt")[6]


def test_a_checkpoint_without_states_is_resumed(run: Path) -> None:
    checkpoint = torch.load(run / "step=5.ckpt", weights_only=True)
    del checkpoint[KEY]
    torch.save(checkpoint, run / "without.ckpt")
    _, rest = fit(run, run / "without.ckpt", callbacks=[RandomState()])
    assert 6 in rest.losses
