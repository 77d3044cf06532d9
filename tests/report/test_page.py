"""The page and its files: what is in them, what is escaped, and what they replace."""

import re
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
from PIL import Image

from lightning_multinorm.callbacks.summary import _write_report
from lightning_multinorm.cli import main
from lightning_multinorm.errors import UsageError
from lightning_multinorm.report import contents, drawing
from lightning_multinorm.report.command import write_report
from lightning_multinorm.report.files import MARK
from lightning_multinorm.report.page import optimizer_of
from lightning_multinorm.report.runs import open_runs
from report import logs

NASTY = "<script>alert('&')</script>"


def drawn(sections: list[contents.Section]) -> set[str]:
    return {figure.name for section in sections for figure in section.figures if figure.spec}


def sentences(sections: list[contents.Section]) -> dict[str, str]:
    return {figure.name: figure.caption for section in sections for figure in section.figures if not figure.spec}


def test_figures_are_those_whose_metrics_were_logged(tmp_path: Path) -> None:
    found = contents.sections(open_runs([logs.write(tmp_path, "full", steps=80)]))
    row = {f"norm_convergence_row_{what}_0" for what in ("iterations", "matrices", "by_layer", "by_kind")}
    measures = ("gradient_norm", "update_to_weight", "tail_index", "dead_columns")
    over = {f"{name}_by_{by}_0" for name in measures for by in ("layer", "kind")}
    assert row | over | {"loss", "bits_per_byte", "memory", "tokens_per_second"} <= drawn(found)
    exact = "Met exactly, but for rounding: nowhere above 2e-08"
    assert sentences(found)["norm_convergence_column_0"].startswith(exact)
    assert sentences(found)["dead_rows_0"] == "There was none."


def test_a_run_that_logged_nothing_has_sentences(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").touch()
    [run] = open_runs([tmp_path])
    found = contents.sections([run])
    assert drawn(found) == set()
    assert sentences(found)["loss"] == "No train/loss or val/loss was logged."
    out = tmp_path / "report.html"
    assert write_report([run], out) == 0
    assert "nothing logged yet" in out.read_text() and "<figure>" not in out.read_text()


def test_an_optimizer_is_named_by_its_class_or_by_its_two(tmp_path: Path) -> None:
    muon = {"matrices": {"class_path": "torch.optim.Muon"}, "rest": {"class_path": "torch.optim.AdamW"}}
    optimizers = {
        "SinkGD": {"class_path": "lightning_multinorm.SinkGD"},
        "Muon + AdamW": {"class_path": "lightning_multinorm.optim.combined.Combined", "init_args": muon},
    }
    for index, (name, optimizer) in enumerate(optimizers.items()):
        config = {"model": {"optimizer": optimizer}}
        [run] = open_runs([logs.write(tmp_path, str(index), steps=8, watched=False, config=config)])
        assert optimizer_of(run) == name


def test_what_a_run_wrote_is_no_markup(tmp_path: Path) -> None:
    folders = [
        logs.write(tmp_path / "a<b>&", name, steps=8, watched=False, config={NASTY: {"x": value}})
        for name, value in (("one", NASTY), ("two", "</script><b>"))
    ]
    # A name in a figure's data, too: two runs of one name are told apart by the folder above.
    folders.append(logs.write(tmp_path / "c", "one", steps=8, watched=False))
    out = tmp_path / "report.html"
    write_report(open_runs(folders), out, figures=False)
    text = out.read_text()
    page = text.replace(re.search(r"</script>\n<script>.*", text, re.DOTALL)[0], "")  # type: ignore[index]
    assert "alert" in page and "<script>alert" not in text and "<b>&" not in text and "</script><b>" not in text
    assert "a&lt;b&gt;&amp;/one" in page and "a\\u003cb>&/one" in page
    assert text.count("<script") == 3


def test_files_bear_the_mark_and_an_earlier_report_is_replaced(tmp_path: Path) -> None:
    folder, out = logs.write(tmp_path, "run", steps=8, layers=1), tmp_path / "out" / "my report.html"
    count = write_report(open_runs([folder]), out)
    figures = sorted((tmp_path / "out" / "my report_figures").iterdir())
    assert len(figures) == 2 * count
    links = set(re.findall(r'<a href="(.*?)"', out.read_text()))
    assert links == {f"my%20report_figures/{path.name}" for path in figures}
    for path in [out, *figures]:
        assert MARK.encode() in path.read_bytes()
        if path.suffix == ".svg":
            assert ElementTree.fromstring(path.read_text()).tag.endswith("svg")
        if path.suffix == ".png":
            with Image.open(path) as image:
                assert image.width > 1000 and image.text == {"Software": MARK}  # type: ignore[attr-defined]
    (figures[0].parent / "mine.svg").write_text("<svg/>")
    unwatched = logs.write(tmp_path, "other", steps=8, watched=False)
    assert write_report(open_runs([unwatched]), out) < count
    left = {path.name for path in figures[0].parent.iterdir()}
    assert "mine.svg" in left and "loss.png" in left and not any("convergence" in name for name in left)


@pytest.mark.parametrize("name", ["report.html", "report_figures/loss.svg"])
def test_what_no_report_wrote_is_never_replaced(name: str, tmp_path: Path) -> None:
    folder, out = logs.write(tmp_path, "run", steps=8, watched=False), tmp_path / "report.html"
    (tmp_path / "report_figures").mkdir()
    (tmp_path / name).write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UsageError, match=f"{name} exists, and no report wrote it"):
        write_report(open_runs([folder]), out)
    assert (tmp_path / name).read_text() == "mine" and sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nowhere"], "nowhere is not there; name a run's folder"),
        (["run", "--out", "report.txt"], "--out report.txt is no name of a page; end it in .html"),
        (["run", "--out", "folder.html"], "folder.html is a folder"),
        (["run", "--out", "run/version_0/metrics.csv/report.html"], "cannot be written: Not a directory"),
        ([], "runs must be given"),
    ],
)
def test_the_command_refuses_in_a_line(
    args: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.write(tmp_path, "run", steps=8, watched=False)
    (tmp_path / "folder.html").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["report", *args])
    [line] = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and line.startswith("error: ") and message in line


def test_the_command_says_what_it_read_and_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = logs.write(tmp_path, "run", steps=8, watched=False)
    monkeypatch.chdir(tmp_path)
    main(["report", "run"])
    assert capsys.readouterr().out.splitlines() == [
        f"Run      run  ({folder.resolve()})",
        "Report   report.html  (5 figures, also in report_figures)",
    ]


def test_without_the_extra_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = logs.write(tmp_path, "run", steps=8, watched=False)
    monkeypatch.setattr(drawing, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'lightning-multinorm\[report\]'"):
        write_report(open_runs([folder]), tmp_path / "report.html")
    _write_report(SimpleNamespace(loggers=[], log_dir=str(folder)))  # type: ignore[arg-type]
    assert "then: python -m lightning_multinorm report" in capsys.readouterr().out


def test_a_report_that_fails_does_not_fail_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = logs.write(tmp_path, "run", steps=8, watched=False)
    trainer = SimpleNamespace(loggers=[], log_dir=str(folder))
    (folder / "report.html").write_text("mine")
    with pytest.warns(UserWarning, match="No report was written of .*exists, and no report wrote it"):
        _write_report(trainer)  # type: ignore[arg-type]
    (folder / "report.html").unlink()
    _write_report(trainer)  # type: ignore[arg-type]
    assert MARK in (folder / "report.html").read_text() and "report.html" in capsys.readouterr().out


def test_what_was_installed_has_the_parts_of_the_page() -> None:
    try:
        installed = {str(path) for path in files("lightning-multinorm") or []}
    except PackageNotFoundError:
        pytest.skip("the package runs from a checkout, and was not installed")
    if not any(path.startswith("lightning_multinorm/report/") for path in installed):
        pytest.skip("the package is installed from elsewhere, or in editable mode")
    assert {f"lightning_multinorm/report/page.{suffix}" for suffix in ("html", "css", "js")} <= installed
