"""Logs are read as far as they were written, and runs are told apart by name."""

from pathlib import Path

import numpy as np
import pytest

from lightning_multinorm.errors import UsageError
from lightning_multinorm.report.runs import Series, find_log, open_runs, read_metrics
from lightning_multinorm.report.tables import as_csv, clock, points, thinned
from report import logs


def log(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.csv").write_text(text)
    return folder


def steps(series: Series) -> list[float]:
    return list(series.steps)


def test_what_a_logger_wrote_is_read(tmp_path: Path) -> None:
    [run] = open_runs([logs.write(tmp_path, "one", steps=40, config={"a": {"b": [1], "c": None}, "d": {}})])
    assert (run.name, run.last("tokens"), run.last("parameters")) == ("one", 40_000, 1_850_000)
    assert steps(run.metrics["val/loss"]) == [9, 19, 29, 39]
    assert run.last("val/loss") == pytest.approx(logs.loss(39, 3.0))
    assert run.last("val/nothing") is None and "epoch" not in run.metrics
    assert run.config == {"a.b": "[1]", "a.c": None, "d": "{}"}


def test_a_line_cut_off_is_left_out_and_of_two_values_the_later_counts(tmp_path: Path) -> None:
    text = "a,b,step\n1,,0\n2,nan,1\n,inf,3\n,5,1\n3,,1\n\n4,,5\n1.5,,2\n9"
    metrics = read_metrics(log(tmp_path, text) / "metrics.csv")
    assert (steps(metrics["a"]), list(metrics["a"].values)) == ([0, 1, 2, 5], [1, 3, 1.5, 4])
    assert list(metrics["b"].values) == [5]
    assert read_metrics(log(tmp_path, "a,step\n1,0\n2,12") / "metrics.csv")["a"].last == 1  # 12 may become 123


@pytest.mark.parametrize("text", ["", "a,step\n", "a,st", "a,step\nnan,3\n"])
def test_a_log_without_values_has_no_metrics(text: str, tmp_path: Path) -> None:
    [run] = open_runs([log(tmp_path, text)])
    assert run.metrics == {} and run.config == {}


@pytest.mark.parametrize(
    ("text", "message"), [("a,b\n1,2\n", "no column step"), ("a,step\nx,1\n", "could not convert")]
)
def test_what_is_no_log_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        open_runs([log(tmp_path, text)])


def test_the_newest_version_is_taken(tmp_path: Path) -> None:
    for version in (2, 10):
        log(tmp_path / "run" / f"version_{version}", "a,step\n1,0\n")
    (tmp_path / "run" / "version_11").mkdir()
    newest = (tmp_path / "run" / "version_10").resolve()
    assert find_log(tmp_path / "run") == find_log(newest / "metrics.csv") == newest
    assert open_runs([tmp_path / "run"])[0].name == "run"
    names = [run.name for run in open_runs([tmp_path / "run", tmp_path / "run" / "version_2"])]
    assert names == ["version_10", "version_2"]
    log(tmp_path / "other" / "run" / "version_0", "a,step\n1,0\n")
    names = [run.name for run in open_runs([tmp_path / "run", tmp_path / "other" / "run"])]
    assert names == [f"{tmp_path.name}/run", "other/run"]


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for name, message in (("gone", "is not there"), ("empty", "holds no metrics.csv"), ("file", "is no folder")):
        with pytest.raises(UsageError, match=message):
            open_runs([tmp_path / name])
    one = log(tmp_path / "one", "a,step\n1,0\n")
    with pytest.raises(UsageError, match="named twice"):
        open_runs([one, one / "metrics.csv"])
    (one / "config.yaml").write_text("a: [")
    with pytest.raises(UsageError, match=r"config\.yaml cannot be read as YAML"):
        open_runs([one])


def test_tokens_are_known_between_and_beyond_the_steps_that_log_them(tmp_path: Path) -> None:
    [run] = open_runs([log(tmp_path, "tokens,one,step\n200,7,9\n400,,19\n1000,,29\n")])
    at = run.at("tokens", np.array([0.0, 9.0, 14.0, 29.0, 34.0]))
    assert at is not None and list(at) == [20, 200, 300, 1000, 1300]
    assert list(run.at("one", np.array([9.0, 19.0]))) == [7, 14]  # type: ignore[arg-type]
    assert run.at("seconds", np.array([1.0])) is None


def test_a_resumed_run_begins_where_it_was_resumed(tmp_path: Path) -> None:
    [run] = open_runs([logs.write(tmp_path, "again", first=100, steps=140)])
    rows = points(run, run.metrics["train/loss"], clock([run]), 800, "again", "line")
    assert rows[0][:3] == (101_000, 101_000 / 100 / 60, 100)


def test_long_lines_are_thinned_to_means() -> None:
    series = Series(np.arange(10.0), np.arange(10.0) ** 2)
    thin = thinned(series, 5)
    assert list(thin.steps) == [0.5, 2.5, 4.5, 6.5, 8.5]
    assert list(thin.values) == [0.5, 6.5, 20.5, 42.5, 72.5]
    assert thinned(series, 10) is series
    assert len(thinned(Series(np.arange(100_001.0), np.zeros(100_001)), 800).steps) == 800


def test_tables_quote_names(tmp_path: Path) -> None:
    assert as_csv(("run", "value"), [('a,"b"', 1 / 3), ("c", None)]) == 'run,value\n"a,""b""",0.33333\nc,\n'


@pytest.mark.parametrize(("seconds", "unit"), [(100, "s"), (120, "min"), (7199, "min"), (7200, "h")])
def test_the_unit_of_time_is_the_largest_of_which_there_are_two(seconds: int, unit: str, tmp_path: Path) -> None:
    assert clock(open_runs([log(tmp_path, f"seconds,step\n{seconds},3\n")])).unit == unit
