"""What a run prints and counts: throughput, progress lines, summary, perplexity of documents."""

import csv
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from parts import LENGTH, Recorder, loader, tiny_llama, trainer
from torch.utils.data import DataLoader

from lightning_multinorm.callbacks import DocumentPerplexity, RunSummary, Throughput, TrainingProgress
from lightning_multinorm.errors import UsageError
from lightning_multinorm.llama.loss import IGNORE
from lightning_multinorm.quantities import duration, quantity

TOKENS = 4 * LENGTH  # in a batch of `loader()`


def test_tokens_are_counted_and_survive_a_checkpoint(tmp_path: Path) -> None:
    recorder, throughput = Recorder(), Throughput()
    run = trainer(tmp_path, 3, logger=recorder, callbacks=[throughput], accumulate_grad_batches=2)
    run.fit(tiny_llama(), loader())
    assert recorder.values("tokens") == {0: 2 * TOKENS, 1: 4 * TOKENS, 2: 6 * TOKENS}
    assert all(rate > 0 for rate in recorder.values("throughput/tokens_per_second").values())
    seconds = list(recorder.values("seconds").values())
    assert 0 < seconds[0] < seconds[1] < seconds[2]
    again, recorder = Throughput(), Recorder()
    again.load_state_dict(throughput.state_dict())
    assert again.tokens == 6 * TOKENS
    trainer(tmp_path, 1, logger=recorder, callbacks=[again]).fit(tiny_llama(), loader())
    assert recorder.values("seconds")[0] > seconds[2]


def test_memory_and_parameters_are_counted(tmp_path: Path) -> None:
    recorder, model = Recorder(), tiny_llama(optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-3))
    run = trainer(tmp_path, 3, logger=recorder, callbacks=[Throughput()], accumulate_grad_batches=2)
    run.fit(model, loader())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert recorder.values("parameters") == {0: parameters}
    counters = len(list(model.parameters()))  # AdamW's step, a float32 each
    mib = (2 * parameters + counters) * 4 / 2**20
    assert recorder.values("memory/optimizer_state_mib") == dict.fromkeys(range(3), pytest.approx(mib))
    resident = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])  # type: ignore[index]
    assert recorder.values("memory/peak_mib")[2] == pytest.approx(resident / 1024, rel=0.05)


def test_rate_is_of_the_last_batches_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 10.0, 14.0, 20.0, 24.0])
    monkeypatch.setattr("lightning_multinorm.callbacks.throughput.time.perf_counter", lambda: next(clock))
    throughput, logged = Throughput(window=2), list[Any]()
    strategy = SimpleNamespace(reduce=lambda count, reduce_op: 2 * count)
    shares = {"num_replicas": 2, "rank": 0}
    parts = {"strategy": strategy, "callbacks": [], "optimizers": []}
    trainer_ = SimpleNamespace(distributed_sampler_kwargs=shares, world_size=2, global_step=0, **parts)
    log = SimpleNamespace(device=torch.device("cpu"), log_dict=lambda values, on_epoch: logged.append(values))
    batch = {"labels": torch.zeros(4, LENGTH)}
    for index in range(3):
        throughput.on_train_batch_start(trainer_, log, batch, index)  # type: ignore[arg-type]
        throughput.on_train_batch_end(trainer_, log, None, batch, index)  # type: ignore[arg-type]
    rates = [values["throughput/tokens_per_second"] for values in logged]
    assert rates == [2 * TOKENS / 1, 4 * TOKENS / 5, 4 * TOKENS / 8]
    assert [values["seconds"].item() for values in logged] == [1, 5, 9]


def test_filling_is_no_token(tmp_path: Path) -> None:
    throughput = Throughput()
    rows = [{**batch, "labels": batch["labels"].clone()} for batch in loader()]
    for batch in rows:
        batch["labels"][:, LENGTH // 2 :] = IGNORE
    trainer(tmp_path, 3, callbacks=[throughput]).fit(tiny_llama(), DataLoader(rows, batch_size=None))
    assert throughput.tokens == 3 * 4 * (LENGTH // 2)


def test_a_run_without_a_terminal_prints_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    callbacks: list[Any] = [Throughput(), TrainingProgress(lines=4), RunSummary(), ModelCheckpoint(tmp_path)]
    options = {"enable_progress_bar": True, "enable_checkpointing": True, "accumulate_grad_batches": 2}
    run = trainer(tmp_path, 8, callbacks=callbacks, **options)
    run.fit(tiny_llama(), loader(), loader(10))
    lines = [line for line in capsys.readouterr().out.splitlines() if " · " in line]
    assert "SinkGD" in lines[0] and f"{2 * TOKENS} tokens per step · 8 steps" in lines[0]
    steps = [line for line in lines if line.startswith("step")]
    assert [line.split("/")[0].split()[1] for line in steps] == ["1", "2", "4", "6", "8"]
    assert [line.endswith(" left") for line in steps] == [False, True, True, True, True]  # the first step compiles
    assert f"tokens {quantity(16 * TOKENS)}" in steps[-1] and steps[-1].endswith("0 s left") and "loss" in steps[-1]


def test_the_bar_of_a_run_of_steps_counts_no_epochs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal, as Rich takes it
    progress = TrainingProgress(refresh_rate=1)
    trainer(tmp_path, 2, callbacks=[progress], enable_progress_bar=True).fit(tiny_llama(), loader())
    assert [task.description for task in progress.progress.tasks] == ["Training  "]


def test_summary_says_what_was_reached_and_where_it_lies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = ModelCheckpoint(tmp_path, monitor="val/loss", filename="best-{step}")
    run = trainer(tmp_path, 4, callbacks=[Throughput(), RunSummary(), checkpoint], enable_checkpointing=True)
    run.fit(tiny_llama(), loader(16), loader(10))
    reached, weights, logs = capsys.readouterr().out.splitlines()[-3:]
    assert logs.split()[:2] == ["Logs", str(tmp_path)]
    assert f"val/loss {run.callback_metrics['val/loss'].item():.4g}" in reached and "val/bits_per_byte" in reached
    assert "4 steps" in reached
    assert Path(weights.removeprefix("Weights").strip()).is_file()


def test_documents_are_added_up_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "perplexity.csv"
    callback = DocumentPerplexity(out)
    callback._sums = torch.zeros(2, 3, dtype=torch.float64)
    nats = torch.tensor([1.0, 2.0, 4.0, 99.0])
    output = {"nats": nats, "tokens": torch.tensor([1, 2, 2, 9]), "bytes": torch.tensor([3, 3, 4, 9])}
    output["document"] = torch.tensor([0, 0, 1, -100])
    callback.on_predict_batch_end(None, None, output, None, 0)  # type: ignore[arg-type]
    run = SimpleNamespace(
        strategy=SimpleNamespace(reduce=lambda sums, reduce_op: sums),
        is_global_zero=True,
        datamodule=SimpleNamespace(predict_names=["a.txt", "b.txt"]),
    )
    callback.on_predict_end(run, SimpleNamespace(device="cpu"))  # type: ignore[arg-type]
    with out.open() as file:
        rows = {row["document"]: row for row in csv.DictReader(file)}
    assert float(rows["a.txt"]["nats_per_token"]) == 1.0
    assert float(rows["b.txt"]["perplexity"]) == pytest.approx(math.exp(2))
    assert float(rows["b.txt"]["bits_per_byte"]) == pytest.approx(4 / math.log(2) / 4)
    assert (rows["all"]["tokens"], rows["all"]["bytes"]) == ("5", "10")


def test_an_existing_table_is_not_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "perplexity.csv"
    out.write_text("mine")
    with pytest.raises(UsageError, match=r"perplexity.csv exists"):
        DocumentPerplexity(out).on_predict_start(None, None)  # type: ignore[arg-type]
    assert out.read_text() == "mine"


@pytest.mark.parametrize(
    ("number", "text"), [(0.5, "0.5"), (999, "999"), (1234, "1.23 k"), (2_620_000, "2.62 M"), (13.1e9, "13.1 B")]
)
def test_quantities(number: float, text: str) -> None:
    assert quantity(number) == text


@pytest.mark.parametrize(("seconds", "text"), [(7.4, "7 s"), (67, "1 min 07 s"), (7500, "2 h 05 min")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
