"""LossSpikes: made-up curves for the running estimate, real trainings for what is noted and where."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from parts import Rows, trainer
from torch.utils.data import DataLoader

from lightning_multinorm import LossSpikes, TextDataModule
from lightning_multinorm.callbacks.spikes import FILE, WINDOW
from lightning_multinorm.errors import UsageError

SEASONED = {"steps": 100, "expected": 2.0, "deviation": 0.1}  # a spike is above 2.6


def spikes_of(curve: Callable[[int], float], steps: int, noise: float = 0.05) -> list[int]:
    callback, draw = LossSpikes(), random.Random(0)
    found = []
    for step in range(steps):
        loss = curve(step) + draw.gauss(0, noise)
        if callback.is_spike(loss):
            found.append(step)
        callback.update(loss)
    return found


def steep(step: int) -> float:
    """From 9 to 3, as a language model's."""
    return 3 + 6 * math.exp(-step / 60)


def test_a_steep_beginning_and_noise_are_no_spikes() -> None:
    assert spikes_of(steep, 2000) == []
    assert spikes_of(lambda step: steep(min(step, 100)), 2000, noise=0.2) == []


@pytest.mark.parametrize(("at", "height"), [(200, 3.0), (300, 1.0), (1000, 0.5)])
def test_a_spike_is_found_and_does_not_hide_the_next(at: int, height: float) -> None:
    def curve(step: int) -> float:
        return steep(step) + (height if step in (at, at + 1, at + 5) else 0)

    assert spikes_of(curve, 1200) == [at, at + 1, at + 5]


def test_none_is_told_before_the_estimate_stands() -> None:
    for at in (WINDOW - 1, WINDOW):
        found = spikes_of(lambda step, at=at: 9.0 if step == at else 3.0, 40)
        assert found == ([at] if at == WINDOW else [])


def test_a_loss_that_stays_up_becomes_the_expected_one() -> None:
    found = spikes_of(lambda step: 3.0 if step < 300 else 6.0, 600)
    assert found == list(range(300, 300 + len(found)))
    assert 1 < len(found) < 20
    constant = spikes_of(lambda step: 0.0 if step < 300 else 1.0, 600, noise=0.0)
    assert len(constant) < 20


def test_less_than_a_hundredth_is_never_a_spike() -> None:
    assert spikes_of(lambda step: 3.0 + (0.029 if step == 300 else 0), 400, noise=1e-5) == []
    assert spikes_of(lambda step: 3.0 + (0.032 if step == 300 else 0), 400, noise=1e-5) == [300]


def test_the_threshold_is_in_mean_deviations() -> None:
    callback = LossSpikes(threshold=3.0)
    callback.load_state_dict(SEASONED)
    assert [callback.is_spike(loss) for loss in (2.29, 2.31, -9.0, math.nan, math.inf)] == [
        False,
        True,
        False,
        True,
        True,
    ]
    callback.update(math.nan)
    assert callback.state_dict() == SEASONED
    callback.update(2.1)
    assert callback.state_dict() == {"steps": 101, "expected": 2.0 + 0.1 / WINDOW, "deviation": pytest.approx(0.1)}
    callback.load_state_dict(SEASONED)
    callback.update(9.0)  # as if it had been 2.3
    assert callback.state_dict()["expected"] == pytest.approx(2.0 + 0.3 / WINDOW)
    with pytest.raises(ValueError, match="threshold=0"):
        LossSpikes(threshold=0)


class Scripted(LightningModule):
    """Its losses are told, one a batch; it notes what it has seen."""

    def __init__(self, losses: list[float]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.losses = losses
        self.seen: list[torch.Tensor] = []

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.seen.append(batch["input_ids"])
        return self.weight.sum() + self.losses[batch_idx]

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        """Nothing: the text has a part that is held out."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def fit(folder: Path, losses: list[float], steps: int, **arguments: Any) -> tuple[Scripted, Any]:
    module, callback = Scripted(losses), LossSpikes()
    callback.load_state_dict(SEASONED)
    data = arguments.pop("data", DataLoader(Rows(), batch_size=4))
    run = trainer(folder, steps, callbacks=[callback], limit_val_batches=0, **arguments)
    run.fit(module, data)
    return module, run


def lines_of(run: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(run.log_dir) / FILE).read_text().splitlines()]


def test_the_batches_of_a_spike_can_be_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": f"line {k} " * 9}) for k in range(200)))
    data = TextDataModule(str(tmp_path / "text.jsonl"), vocab_size=300, sequence_length=16, batch_size=2)
    losses = [2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 8.0, 2.0, 2.0, 2.0, 2.0]
    logger = CSVLogger(tmp_path)
    module, run = fit(tmp_path, losses, 4, data=data, logger=logger, accumulate_grad_batches=3)
    [line] = lines_of(run)
    assert (line["step"], line["loss"]) == (2, 4.0)
    assert (line["expected"], line["deviation"]) == (pytest.approx(2.0), pytest.approx(0.1 * (1 - 1 / WINDOW) ** 2))
    assert [(entry["rank"], entry["batch"], entry["loss"]) for entry in line["batches"]] == [
        (0, 7, 2.0), (0, 8, 8.0), (0, 9, 2.0),
    ]  # fmt: skip
    for entry in line["batches"]:
        assert data.replay(entry["position"])["input_ids"].equal(module.seen[entry["batch"] - 1])
    [record] = [record for record in caplog.records if "spike" in record.getMessage()]
    path = Path(run.log_dir) / FILE
    assert record.getMessage() == f"step 2: the loss 4 is a spike; expected 2; its batches are noted in {path}"


def test_a_loss_that_is_no_number_is_noted_and_others_after_it(tmp_path: Path) -> None:
    _, run = fit(tmp_path, [2.0, math.nan, 9.0, 2.0], 4, logger=CSVLogger(tmp_path))
    first, second = lines_of(run)
    assert (first["step"], first["loss"], first["batches"][0]["loss"]) == (1, None, None)
    assert (second["step"], second["loss"], second["batches"][0]["position"]) == (2, 9.0, None)


def test_without_a_logger_there_is_a_line_and_no_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fit(tmp_path, [2.0, 9.0], 2, logger=False)
    assert "step 1: the loss 9 is a spike; expected 2" in caplog.text
    assert not list(tmp_path.rglob(FILE))


def test_losses_are_not_those_that_float16_has_scaled(tmp_path: Path) -> None:
    scaling = [MixedPrecision("16-mixed", "cpu")]
    window = {"accumulate_grad_batches": 2, "plugins": scaling}
    _, run = fit(tmp_path, [2.0, 2.0, 9.0, 3.0], 2, logger=CSVLogger(tmp_path), **window)
    [line] = lines_of(run)
    assert (line["loss"], [entry["loss"] for entry in line["batches"]]) == (6.0, [9.0, 3.0])


def test_manual_optimization_is_refused(tmp_path: Path) -> None:
    module = Scripted([])
    module.automatic_optimization = False
    with pytest.raises(UsageError, match=r"the losses of Scripted.*leave this callback out"):
        trainer(tmp_path, 1, callbacks=[LossSpikes()]).fit(module, DataLoader(Rows()))
