"""Every packaged configuration: parses, builds the model it promises, explains its keys, and is found by its name."""

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_multinorm import SWAN, MultiNormGD, SinkGD, parameter_groups
from lightning_multinorm.cli import MultiNormCLI, PlanningTrainer
from lightning_multinorm.configurations import CONFIGS, find_config, packaged_configs, resolve_configs
from lightning_multinorm.errors import UsageError
from lightning_multinorm.optim.groups import STATELESS
from lightning_multinorm.optim.routing import route_model
from lightning_multinorm.schedules import WarmupCosine

# From the papers' table of sizes.
PARAMETERS = {"60m": 58_073_600, "130m": 134_105_856, "350m": 367_969_280, "1b": 1_339_082_752, "7b": 6_738_415_616}
MATRICES = {"60m": 25_296_896, "130m": 84_934_656, "350m": 302_383_104, "1b": 1_207_910_400, "7b": 6_476_005_376}
STEPS = {"60m": 10_000, "130m": 20_000, "350m": 60_000, "1b": 100_000, "7b": 150_000}
PROTOCOL = {
    "lr": 0.02,
    "iterations": 5,
    "weight_decay": 0.0,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "stochastic_rounding": True,
    "tolerance": 0.01,  # for iterations: auto alone
    "max_iterations": 10,
    "rescale": "rms",
}
BASELINES = ("muon", "galore", "apollo", "apollo_mini", "fira", "racs", "adamw8bit")  # see test_baselines.py
OVERLAYS = [name for name in packaged_configs() if "/" in name and Path(name).stem not in BASELINES]
OPTIMIZERS = {
    "sinkgd": SinkGD,
    "swan": SWAN,
    "sinkhorn_whitening": SWAN,
    "operator": SinkGD,
    "multinorm": MultiNormGD,
    "stateless": SinkGD,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}


class Idle(PlanningTrainer):
    """A trainer that is built as configured, and does not train."""

    def fit(self, model: Any, datamodule: Any = None, ckpt_path: str | None = None) -> None:  # type: ignore[override]
        """Leave everything as it was built."""


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Builds what ``fit`` with some configurations builds; the model on the meta device."""
    monkeypatch.setattr("sys.argv", ["lightning_multinorm"])
    monkeypatch.chdir(tmp_path)

    def run(*configs: str, options: tuple[str, ...] = ()) -> MultiNormCLI:
        args = resolve_configs(["fit", *(part for name in configs for part in ("--config", name)), *options])
        cli = MultiNormCLI(args, trainer_class=Idle)
        with torch.device("meta"):
            cli.model.configure_model()
        return cli

    return run


@pytest.mark.parametrize("size", PARAMETERS)
def test_llama_configs_have_exactly_the_papers_parameters(size: str, build: Any) -> None:
    model = build(f"llama{size}.yaml").model.model
    routes = route_model(model)
    counts = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert sum(counts.values()) == PARAMETERS[size]
    assert sum(count for name, count in counts.items() if routes[name].kind == "matrix") == MATRICES[size]


@pytest.mark.parametrize("size", PARAMETERS)
def test_llama_configs_follow_the_papers_protocol(size: str, build: Any) -> None:
    cli = build(f"llama{size}.yaml")
    trainer, data = cli.trainer, cli.datamodule
    assert trainer.max_steps == STEPS[size]
    assert data.batch_size * trainer.accumulate_grad_batches == 512 and data.sequence_length == 256
    assert trainer.precision == "bf16-true"
    assert trainer.gradient_clip_val == (1.0 if size == "7b" else None)
    assert (data.source, data.tokenizer_name, data.validation_tokens) == ("c4", "google-t5/t5-base", 10_000_000)
    optimizer = cli.model.optimizer(list(cli.model.named_parameters()))
    assert isinstance(optimizer, SinkGD)
    assert {**optimizer.defaults, "betas": tuple(optimizer.defaults["betas"])} == PROTOCOL
    assert {group["lr_scale"] for group in optimizer.param_groups} == {0.05, 1.0}
    schedule = cli.model.scheduler(optimizer)
    assert isinstance(schedule, WarmupCosine) and (schedule.warmup, schedule.final) == (0.1, 0.1)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlays_lie_over_any_whole_configuration(overlay: str, build: Any) -> None:
    cli = build("llama60m.yaml", overlay)
    assert cli.trainer.max_steps == STEPS["60m"]
    folder, _, name = overlay.removesuffix(".yaml").partition("/")
    if folder == "optimizer":
        groups = [{"params": list(cli.model.parameters()), "rule": "adam", "view": "matrix"}]
        optimizer = cli.model.optimizer(groups)
        assert type(optimizer) is OPTIMIZERS[name]
        written = yaml.safe_load((CONFIGS / overlay).read_text())["model"]["optimizer"]["init_args"]
        assert optimizer.defaults["lr"] == written["lr"]


@pytest.mark.parametrize(
    "configs", [("optimizer/stateless.yaml",), ("optimizer/swan.yaml", "--model.policy", "stateless")], ids=str
)
def test_stateless_policy_leaves_no_adam(configs: tuple[str, ...], build: Any) -> None:
    names = [name for name in configs if name.endswith(".yaml")]
    cli = build("llama60m.yaml", *names, options=configs[len(names) :])
    optimizer = cli.model.optimizer(parameter_groups(cli.model, policy=cli.model.policy))
    rules = {group["name"]: group["rule"] for group in optimizer.param_groups}
    assert rules == {kind: rule for kind, rule in STATELESS.items() if kind in rules}
    assert rules.keys() == {"matrix", "embedding", "head", "norm"}


def test_policy_may_be_a_mapping(build: Any) -> None:
    cli = build("llama60m.yaml", options=("--model.policy", '{"head": "column"}'))
    rules = {group["name"]: group["rule"] for group in parameter_groups(cli.model, policy=cli.model.policy)}
    assert rules == {"matrix": "multinorm", "embedding": "adam", "head": "column", "norm": "adam"}


def test_quickstart_needs_no_network(build: Any) -> None:
    cli = build("quickstart.yaml")
    assert cli.datamodule.source == "stdlib" and cli.datamodule.tokenizer_name == "bpe"
    assert cli.model.llama_config.vocab_size == cli.datamodule.vocab_size


@pytest.mark.parametrize("name", packaged_configs())
def test_every_key_is_explained_with_type_and_default(name: str) -> None:
    """The line above each value is a comment with what, type and default (a section needs none)."""
    lines = (CONFIGS / name).read_text().splitlines()
    for above, line in pairwise(lines):
        key = re.match(r"\s*(?:- )?(\w+):\s*\S", line)
        if key and key[1] != "class_path":
            assert re.match(r"\s*#.*\(type: .+\)|\s*#.*\(type: .+\); this one", above), f"{name}: {line.strip()}"


def test_llama_configs_have_the_same_keys() -> None:
    def keys(tree: Any, path: str = "") -> set[str]:
        if not isinstance(tree, dict):
            return {path}
        return {path} | {key for name, value in tree.items() for key in keys(value, f"{path}.{name}")}

    trees = [keys(yaml.safe_load((CONFIGS / f"llama{size}.yaml").read_text())) for size in PARAMETERS]
    assert all(tree == trees[0] for tree in trees)


def test_a_file_comes_before_a_packaged_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config("llama1b.yaml") == str(CONFIGS / "llama1b.yaml")
    (tmp_path / "llama1b.yaml").write_text("seed_everything: 3\n")
    assert find_config("llama1b.yaml") == "llama1b.yaml"


def test_an_unknown_name_is_met_with_those_there_are() -> None:
    with pytest.raises(UsageError, match=r"llama1B\.yaml.*Did you mean llama1b\.yaml\?.*optimizer/adamw\.yaml"):
        resolve_configs(["fit", "--config=llama1B.yaml"])


def test_only_config_options_are_replaced() -> None:
    args = ["fit", "-c", "llama60m.yaml", "--run.name", "llama60m.yaml", "--config=quickstart.yaml"]
    resolved = resolve_configs(args)
    assert resolved[3:5] == args[3:5]
    assert (resolved[2], resolved[5]) == (str(CONFIGS / "llama60m.yaml"), f"--config={CONFIGS / 'quickstart.yaml'}")
