"""Comparisons of runs, against numbers found by hand."""

from pathlib import Path

import pytest

from lightning_multinorm.report.comparison import compare, differences, target_metric
from lightning_multinorm.report.runs import Run, open_runs


def run(root: Path, name: str, losses: list[float], config: str = "", seconds: int = 10) -> Run:
    """Validated every ten steps of 100 tokens."""
    folder = root / name
    folder.mkdir()
    lines = [
        f"{loss},{loss / 2},{1000 * n},{seconds * n},{10 * n - 1}\n" for n, loss in enumerate(losses, start=1) if loss
    ]
    (folder / "metrics.csv").write_text("val/loss,val/bits_per_byte,tokens,seconds,step\n" + "".join(lines))
    if config:
        (folder / "config.yaml").write_text(config)
    return open_runs([folder])[0]


def test_tokens_and_time_to_the_others_target(tmp_path: Path) -> None:
    quick = run(tmp_path, "quick", [5.0, 3.0, 2.0, 1.0], seconds=20)
    slow = run(tmp_path, "slow", [6.0, 5.0, 4.5, 4.0])
    assert target_metric([quick, slow]) == "val/loss"
    first, second = compare([quick, slow], "val/loss")
    # 5 after 10 steps and 3 after 20: 4 after 15, which are 1500 of 4000 tokens, and 30 of 40 seconds.
    assert (first.run, first.other, first.target, first.best) == ("quick", "slow", 4.0, 1.0)
    assert first.tokens == pytest.approx(0.375) and first.seconds == pytest.approx(0.75)
    assert (second.tokens, second.seconds, second.best) == (None, None, 4.0)


def test_a_target_reached_at_once_and_one_that_was_passed_again(tmp_path: Path) -> None:
    better, wavy, other = (
        run(tmp_path, name, losses) for name, losses in {"a": [2.0, 1.0], "b": [4.0, 2.0, 3.0], "c": [4.0, 3.0]}.items()
    )
    found = {(one.run, one.other): one.tokens for one in compare([better, wavy, other], "val/loss")}
    assert found["a", "c"] == pytest.approx(1000 / 2000)
    assert found["b", "c"] == pytest.approx(1500 / 2000)
    assert found["c", "b"] == pytest.approx(2000 / 3000)


def test_runs_of_different_vocabularies_compare_in_bits_per_byte(tmp_path: Path) -> None:
    runs = [run(tmp_path, name, [2.0, 1.0], f"data: {{vocab_size: {size}}}") for name, size in (("a", 10), ("b", 20))]
    assert target_metric(runs) == "val/bits_per_byte"
    assert compare(runs, "val/bits_per_byte")[0].target == 0.5
    assert target_metric([*runs, run(tmp_path, "c", [])]) is None


def test_configurations_differ_in_these_keys(tmp_path: Path) -> None:
    texts = ("a: {b: 1, c: [1]}\nd: null", "a: {b: 1, c: [2]}\nd: null\ne: true", "")
    runs = [run(tmp_path, str(index), [1.0], text) for index, text in enumerate(texts)]
    assert differences(runs) == [("a.c", ["[1]", "[2]", None]), ("e", [None, True, None])]
    assert differences(runs[1:]) == []
