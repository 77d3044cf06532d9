"""The documentation: the site builds without a warning, links lead somewhere, commands parse, and the example runs."""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.testing import assert_close

from lightning_multinorm import multi_normalize, parameter_groups
from lightning_multinorm.cli import MultiNormCLI, PlanningTrainer
from lightning_multinorm.configurations import resolve_configs
from lightning_multinorm.norms import ColumnNorm

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.glob("*.md"))]
NORMS = (DOCS / "norms.md").read_text()
COMMAND = re.compile(r"^    (python -m lightning_multinorm fit(?:.*\\\n)*.*)$", re.MULTILINE)
COMMANDS = [
    command.replace("\\\n", " ")
    for page in ("optimizers", "paper", "norms")
    for command in COMMAND.findall((DOCS / f"{page}.md").read_text())
]


class Idle(PlanningTrainer):
    """A trainer that is built as configured, and does not train."""

    def fit(self, model: Any, datamodule: Any = None, ckpt_path: str | None = None) -> None:  # type: ignore[override]
        """Leave everything as it was built."""


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of docs/norms.md, in the folder that commands are started from, beside its configuration."""
    python, configuration = (re.findall(rf"```{kind}\n(.*?)```", NORMS, re.DOTALL)[0] for kind in ("python", "yaml"))
    (tmp_path / "my_norms.py").write_text(python)
    (tmp_path / "mine.yaml").write_text(configuration)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("sys.argv", ["lightning_multinorm"])
    monkeypatch.delitem(sys.modules, "my_norms", raising=False)
    import my_norms

    return my_norms


def test_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-E",
        "-q",
        "-W",
        "--keep-going",
        "-n",
        str(DOCS),
        str(tmp_path / "site"),
    ]
    done = subprocess.run([*command, "-d", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "matrix_lr_scale" in (tmp_path / "site" / "api.html").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text())
    assert not [link for link in links if not (page.parent / link).exists()]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.partition(" fit ")[2])
def test_commands_parse(command: str, example: Any) -> None:
    MultiNormCLI(resolve_configs(shlex.split(command)[3:]), trainer_class=Idle)


def test_example_of_a_norm_is_one(example: Any) -> None:
    norm = example.HeadNorm(4)
    X = norm.project(torch.randn(2, 8, 6).mul_(1e3))
    assert_close(norm.project(X), X)
    assert_close(norm.value(X), torch.ones(2))
    assert_close(X.square().mean((-2, -1)), torch.ones(2))
    assert not norm.project(torch.zeros(8, 6)).any()
    assert norm.project(torch.ones(8, 6, dtype=torch.bfloat16)).dtype is torch.bfloat16
    Y, trace = multi_normalize(torch.randn(8, 6), [norm, ColumnNorm()], tolerance=1e-5, return_trace=True)
    assert trace.norms == ("head", "column") and trace.residuals[-1].max() <= 1e-5
    assert_close(norm.value(Y), torch.tensor(1.0), atol=1e-4, rtol=0)


def test_example_of_a_norm_trains_from_its_file(example: Any) -> None:
    cli = MultiNormCLI(resolve_configs(shlex.split(COMMANDS[-1])[3:]), trainer_class=Idle)
    cli.model.configure_model()
    optimizer = cli.model.optimizer(parameter_groups(cli.model))
    assert [norm.name for norm in optimizer.norms] == ["head", "column"]
    matrix = next(group for group in optimizer.param_groups if group["rule"] == "multinorm")["params"][0]
    before, matrix.grad = matrix.detach().clone(), torch.randn_like(matrix)
    optimizer.step()
    assert_close((matrix - before).square().mean().sqrt().item(), 0.02 * 0.05, rtol=1e-3, atol=0)


def test_citation_is_readable() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and citation["license"] == "Apache-2.0"
    identifiers = {item["value"] for reference in citation["references"] for item in reference["identifiers"]}
    assert identifiers == {"arXiv:2502.06742", "arXiv:2412.13148"}
