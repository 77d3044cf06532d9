"""The study of tokens to a loss: its protocols, which runs it makes and which not again, and what it finds in them."""

import csv
import math
import os
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from benchmarks.tokens_to_loss import report, runs
from benchmarks.tokens_to_loss.__main__ import chosen, main
from benchmarks.tokens_to_loss.plan import Job, Result, best_rate, job, rates, read, wanted
from benchmarks.tokens_to_loss.protocol import PROTOCOLS, Optimizer, Protocol, load
from benchmarks.tokens_to_loss.runs import Processes, command, harvest
from benchmarks.tokens_to_loss.study import Study
from benchmarks.tokens_to_loss.summary import along_curve, share_text, summarise
from lightning_multinorm.cli import MultiNormCLI, PlanningTrainer
from lightning_multinorm.configurations import resolve_configs
from lightning_multinorm.errors import UsageError

NAMES = sorted(path.stem for path in PROTOCOLS.glob("*.yaml"))
SMALL: dict[str, Any] = {
    "configs": ["quickstart.yaml"],
    "steps": 100,
    "set": {"trainer.val_check_interval": 10},
    "budgets": [0.3, 0.5],
    "targets": ["adamw"],
    "optimizers": {
        "adamw": {"configs": ["optimizer/adamw.yaml"], "grid": [0.001, 0.002, 0.004]},
        "sinkgd": {"grid": [0.01, 0.02, 0.04], "budgets": True},
    },
}


def write(folder: Path, **changes: Any) -> str:
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(SMALL | changes))
    return str(path)


@pytest.fixture
def protocol(tmp_path: Path) -> Protocol:
    return load(write(tmp_path))


class Fake:
    """Runs whose loss falls on a straight line; lowest where the rate is the best one, faster for SinkGD."""

    def __init__(self, best: float = 0.002, speed: float = 2.0) -> None:
        self.best, self.speed, self.made = best, speed, list[Job]()

    def __call__(self, job: Job) -> Result:
        self.made.append(job)
        sinkgd = job.optimizer == "sinkgd"
        slope = self.speed if sinkgd else 1.0
        distance = abs(math.log2(job.lr / (0.02 if sinkgd else self.best)))
        steps = np.arange(10, job.steps + 1, 10)
        losses = 10 + job.seed + distance - slope * steps / 100
        return result(job, [int(step) for step in steps], losses.tolist())


def result(job: Job, steps: list[int], losses: list[float], failure: str | None = None) -> Result:
    fields = {name: value for name, value in asdict(job).items() if name != "options"}
    columns: dict[str, list[float]] = {"step": [*steps], "tokens": [2048.0 * step for step in steps], "loss": losses}
    columns |= {"bits_per_byte": [loss / 2 for loss in losses], "seconds": [0.5 * step for step in steps]}
    measured = {"optimizer_state_mib": 1.5, "wall_seconds": 9.0, "commit": "0123"}
    loss = None if failure else losses[-1]
    return Result(**fields, loss=loss, failure=failure, validation=columns, train={}, measured=measured)


def make(protocol: Protocol, folder: Path, run: Callable[[Job], Result], jobs: int = 1) -> Study:
    study = Study(protocol, folder, run)
    for _ in study.make(list(protocol.optimizers.values()), jobs):
        pass
    return study


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stepps": 3}, r"the key stepps is not known; there are configs, steps"),
        ({"steps": "many"}, r"steps='many' must be a whole number"),
        ({"seeds": [0]}, r"seeds=\(0,\) must be whole numbers above 0"),
        ({"seeds": 1}, r"seeds=1 must be a list"),
        ({"budgets": [1.5]}, r"budgets=\(1.5,\) must be fractions between 0 and 1"),
        ({"budgets": [0.33]}, r"the budget 0.33 is 33 steps, but validations are every 10"),
        ({"targets": ["muon"]}, r"targets='muon' must be one of the optimizers \(adamw, sinkgd\)"),
        ({"configs": ["quikstart.yaml"]}, r"Did you mean quickstart.yaml"),
        ({"set": {"trainer.val_check_interval": 0.5}}, r"val_check_interval=0.5 must be a whole number"),
        ({"set": {"trainer.val_check_interval": 5}}, r"log_every_n_steps=10 must divide the 5 steps"),
        ({"optimizers": {}}, r"optimizers=\{\} must be a mapping"),
        ({"optimizers": {"adamw": {}}}, r"optimizers.adamw: the key grid is missing"),
        ({"optimizers": {"adamw": {"grid": ["1e-3"]}}}, r"optimizers.adamw.grid=\('1e-3',\).*not 1e-3"),
        ({"optimizers": {"adamw": {"grid": [0.1, 0.3]}}}, r"optimizers.adamw.grid.*0.3 is 3 times 0.1.*grid_ratio=2"),
        ({"optimizers": {"adamw": {"grid": [0.2, 0.1]}}}, r"neighbours must differ by grid_ratio=2"),
    ],
)
def test_a_protocol_is_checked_when_it_is_read(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        load(write(tmp_path, **changes))


def test_an_unknown_protocol_is_met_with_those_there_are() -> None:
    with pytest.raises(UsageError, match="protocol nanno: no such file, and none of 130m, 60m, nano, paper, small"):
        load("nanno")


class Idle(PlanningTrainer):
    """A trainer that is built as configured, and does not train."""

    def fit(self, model: Any, datamodule: Any = None, ckpt_path: str | None = None) -> None:  # type: ignore[override]
        """Leave everything as it was built."""


@pytest.mark.parametrize("name", NAMES)
def test_packaged_protocols_tune_all_alike_by_a_command_that_there_is(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    protocol = load(name)
    assert {len(row.grid) for row in protocol.optimizers.values()} == {3}
    assert {round(b / a, 9) for row in protocol.optimizers.values() for a, b in pairwise(row.grid)} == {2.0}
    monkeypatch.setattr("sys.argv", ["lightning_multinorm"])
    row = protocol.optimizers["muon"]
    first = wanted(protocol, row, {})[0]
    cli = MultiNormCLI(resolve_configs(command(first, tmp_path)[3:]), trainer_class=Idle)
    assert cli.trainer.max_steps == protocol.steps
    assert cli.datamodule.batch_size * cli.datamodule.sequence_length * cli.trainer.accumulate_grad_batches == (
        protocol.tokens_per_step
    )
    init = cli.config.fit.model.optimizer.init_args
    assert {init.matrices.init_args.lr, init.rest.init_args.lr} == {row.grid[0]}


@pytest.mark.parametrize(
    ("best", "tried"),
    [
        (0.002, [0.001, 0.002, 0.004]),
        (0.008, [0.001, 0.002, 0.004, 0.008, 0.016]),
        (0.0005, [0.00025, 0.0005, 0.001, 0.002, 0.004]),
        (1.0, [0.001, 0.002, 0.004, 0.008, 0.016, 0.032]),  # no more than three
    ],
)
def test_a_grid_grows_where_its_best_rate_is_at_the_edge(
    best: float, tried: list[float], protocol: Protocol, tmp_path: Path
) -> None:
    study = make(protocol, tmp_path / "results", Fake(best))
    adamw = protocol.optimizers["adamw"]
    assert list(rates(protocol, adamw, study.known)) == pytest.approx(tried)
    assert best_rate(protocol, adamw, study.known) == pytest.approx(min(best, 0.032))
    (row,) = (row for row in summarise(protocol, study.known) if row.name == "adamw")
    assert row.at_edge == (best == 1.0)


def test_where_every_rate_fails_lower_ones_are_tried(protocol: Protocol, tmp_path: Path) -> None:
    study = make(protocol, tmp_path / "results", lambda job: result(job, [10], [9.0], failure="exit status 1"))
    assert min(rates(protocol, protocol.optimizers["adamw"], study.known)) == 0.001 / 8
    rows = summarise(protocol, study.known)
    assert all(set(row.losses) == {math.inf} for row in rows) and all(len(row.failures) >= 6 for row in rows)
    assert rows[0].reached["adamw"].along == [None] * 3  # a failed target is reached by nobody
    assert "failed (3 of 3 seeds)" in report.markdown(protocol, rows)


@pytest.mark.parametrize("jobs", [1, 4])
def test_makes_tuning_then_seeds_then_budgets_and_nothing_twice(jobs: int, protocol: Protocol, tmp_path: Path) -> None:
    fake = Fake()
    study = make(protocol, tmp_path / "results", fake, jobs)
    sinkgd = [(job.lr, job.seed, job.steps) for job in fake.made if job.optimizer == "sinkgd"]
    tuning = {(0.01, 1, 100), (0.02, 1, 100), (0.04, 1, 100)}
    compared = {(0.02, seed, steps) for seed in (1, 2, 3) for steps in (100, 30, 50)}
    assert len(sinkgd) == len(set(sinkgd)) and set(sinkgd) == tuning | compared
    assert set(sinkgd[:3]) == tuning
    assert not any(wanted(protocol, row, study.known) for row in protocol.optimizers.values())


def test_what_has_ended_is_not_run_again(protocol: Protocol, tmp_path: Path) -> None:
    first = make(protocol, tmp_path / "results", Fake())
    again = Fake()
    assert make(protocol, tmp_path / "results", again).known == first.known and again.made == []
    name = sorted(first.known)[-1]
    (tmp_path / "results" / f"{name}.json").unlink()
    make(protocol, tmp_path / "results", again)
    assert [job.name for job in again.made] == [name]
    assert read(tmp_path / "results") == first.known


def test_a_refused_row_stops_and_the_others_go_on(protocol: Protocol, tmp_path: Path) -> None:
    fake = Fake()

    def run(job: Job) -> Result:
        if job.optimizer == "adamw":
            raise UsageError("no such option")
        return fake(job)

    study = make(protocol, tmp_path / "results", run)
    assert study.refused == {"adamw": "no such option"} and len(fake.made) == 11
    (row,) = summarise(protocol, study.known)
    assert row.complete and row.reached == {}  # the target is not there


def test_the_key_is_of_options_and_of_what_configurations_say(tmp_path: Path) -> None:
    config = tmp_path / "mine.yaml"

    def key(content: str, changed: int, **options: Any) -> str:
        config.write_text(content)
        os.utime(config, (changed, changed))
        loaded = load(write(tmp_path, configs=["quickstart.yaml", str(config)]))
        row = Optimizer("sinkgd", (0.01,), **options)
        return job(loaded, row, 0.01, 1).key

    keys = [
        key("data: {batch_size: 16}\n", 1),
        key("# the same\ndata: {batch_size: 16}\n", 2),
        key("data: {batch_size: 8}\n", 3),
        key("data: {batch_size: 8}\n", 3, set={"data.mix_rows": 0}),
    ]
    assert keys[0] == keys[1] and len(set(keys)) == 3


def test_tokens_to_a_loss_lie_on_the_line_between_validations(protocol: Protocol) -> None:
    first = job(protocol, protocol.optimizers["sinkgd"], 0.02, 1)
    run = result(first, [10, 20, 30], [5.0, 4.0, 2.0])
    for loss, step in ((5.0, 10), (4.75, 12.5), (4.0, 20), (3.0, 25), (2.0, 30)):
        assert along_curve(run, loss, "tokens") == pytest.approx(2048 * step)
        assert along_curve(run, loss, "seconds") == pytest.approx(0.5 * step)
    assert along_curve(run, 1.9, "tokens") is None


def test_finds_the_speed_that_runs_were_made_with(protocol: Protocol, tmp_path: Path) -> None:
    """Along a line that falls twice as fast, half of the tokens are enough; so are those of a budget of a half."""
    study = make(protocol, tmp_path / "results", Fake(speed=2.0))
    rows = {row.name: row for row in summarise(protocol, study.known)}
    assert list(rows) == ["sinkgd", "adamw"]  # the lowest loss first
    reached = rows["sinkgd"].reached["adamw"]
    assert reached.along == pytest.approx([0.5] * 3) and reached.own == pytest.approx([0.5] * 3)
    assert reached.along_seconds == pytest.approx([0.5] * 3)
    assert rows["adamw"].reached["adamw"].along == pytest.approx([1.0] * 3)
    assert rows["sinkgd"].losses == pytest.approx([9.0, 10.0, 11.0])
    assert rows["sinkgd"].state_mib == 1.5
    text = report.markdown(protocol, list(rows.values()))
    assert "| sinkgd | 0.02 | 10.000 ± 1.000 | 5.000 ± 0.500 | 0.50 | 0.50 | 0.50 | 1.50 |" in text


def test_a_slower_row_never_comes_there(protocol: Protocol, tmp_path: Path) -> None:
    study = make(protocol, tmp_path / "results", Fake(speed=0.5))
    reached = next(row for row in summarise(protocol, study.known) if row.name == "sinkgd").reached["adamw"]
    assert reached.along == reached.own == [None] * 3
    assert share_text(reached.along) == "not within budget"
    assert share_text([0.5, None, 0.7]) == "0.60 (2 of 3 seeds)"


def _log(folder: Path, version: int, rows: list[dict[str, Any]]) -> None:
    target = folder / f"version_{version}" / "metrics.csv"
    target.parent.mkdir(parents=True)
    with target.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["step", "tokens", "seconds", "train/loss", "val/loss", "val/bits_per_byte"])
        writer.writeheader()
        writer.writerows(rows)


@pytest.mark.parametrize("last", ["4.5", "nan"])
def test_a_run_that_was_interrupted_is_read_as_one(last: str, protocol: Protocol, tmp_path: Path) -> None:
    begun = replace(job(protocol, protocol.optimizers["sinkgd"], 0.02, 1), steps=30)
    for version, steps in ((0, (9, 19)), (1, (29,))):
        values = {9: "6.0", 19: "5.0", 29: last}
        logged = [{"step": s, "tokens": 2048 * (s + 1), "seconds": s + 1, "train/loss": 5.5} for s in steps]
        losses = [{"step": s, "val/loss": values[s], "val/bits_per_byte": values[s]} for s in steps]
        _log(tmp_path, version, [*logged, *losses])
    found = harvest(begun, tmp_path, 0, {})
    if last == "nan":
        assert found.loss is None and str(found.failure).startswith("no finite validation loss at its last step; if")
        return
    assert (found.loss, found.failure) == (4.5, None)
    assert found.validation["step"] == [10, 20, 30] and found.validation["seconds"] == [10, 20, 30]
    assert found.validation["tokens"] == [20480, 40960, 61440]
    assert harvest(begun, tmp_path, 1, {}).failure == "exit status 1"


def test_what_a_process_ends_with(protocol: Protocol, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = job(protocol, protocol.optimizers["sinkgd"], 0.02, 1)

    def shell(line: str) -> Processes:
        monkeypatch.setattr(runs, "command", lambda job, root: ["sh", "-c", line])
        return Processes(tmp_path, threads=3)

    failed = shell("echo $OMP_NUM_THREADS threads in $PWD; exit 1")(begun)
    assert failed.failure == "exit status 1" and failed.measured["log"][0].startswith("3 threads")
    with pytest.raises(UsageError, match=r"was refused: error: no such option"):
        shell("echo error: no such option; exit 2")(begun)
    with pytest.raises(UsageError, match=r"ended from outside 3 times, status -15"):
        shell("echo tried; kill -TERM $$")(begun)
    assert (tmp_path / begun.name / "log.txt").read_text().count("tried") == 3


def test_stopping_ends_what_runs(protocol: Protocol, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first result is an interruption: the run beside it is ended, for it would sleep for a minute."""
    monkeypatch.setattr(runs, "command", lambda job, root: ["sh", "-c", "exec sleep 60"])
    started = threading.Event()

    class Announced(Processes):
        def _wait(self, process: Any) -> int:
            started.set()
            return super()._wait(process)

    processes = Announced(tmp_path, threads=1)

    class Interrupted:
        stop = staticmethod(processes.stop)

        def __call__(self, job: Job) -> Result:
            if job.lr != 0.001:
                return processes(job)
            started.wait(30)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(protocol, tmp_path / "results", Interrupted(), jobs=2)
    assert started.is_set() and not processes._running and read(tmp_path / "results") == {}


def test_rows_are_chosen_by_name_and_by_what_is_installed(
    protocol: Protocol, capsys: pytest.CaptureFixture[str]
) -> None:
    lacking = replace(protocol.optimizers["adamw"], needs=("no_such_package",))
    protocol = replace(protocol, optimizers={**protocol.optimizers, "adamw": lacking})
    assert [row.name for row in chosen(protocol, None)] == ["sinkgd"]
    assert "SKIPPED adamw: needs no_such_package" in capsys.readouterr().err
    assert chosen(protocol, []) == []
    with pytest.raises(UsageError, match="--only muon: the protocol small has adamw, sinkgd"):
        chosen(protocol, ["muon"])


def test_writes_tables_and_picture_of_what_there_is(protocol: Protocol, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    make(protocol, tmp_path / "small", Fake())
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path / "small.yaml"), "--only", "--out", str(tmp_path)])
    assert ended.value.code == 0
    assert {path.suffix for path in tmp_path.glob("small.*")} == {".yaml", ".json", ".md", ".png", ".svg"}
