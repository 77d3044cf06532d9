"""The overlays of other libraries' optimizers: they train, go on from a checkpoint, and are what their authors run."""

import warnings
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from parts import TINY, loader, trainer
from torch.optim import Optimizer

from lightning_multinorm import LlamaPretraining, parameter_groups
from lightning_multinorm.cli import MultiNormCLI, PlanningTrainer
from lightning_multinorm.configurations import resolve_configs
from lightning_multinorm.optim.combined import Combined

PACKAGES = {
    "muon": "torch",
    "galore": "galore_torch",
    "apollo": "apollo_torch",
    "apollo_mini": "apollo_torch",
    "fira": "fira",
    "racs": "pytorch_optimizer",
    "adamw8bit": "bitsandbytes",
}
RANKED = ("galore", "apollo", "fira")  # at a rank that fits a tiny model
Build = Callable[[str], LlamaPretraining]


class Idle(PlanningTrainer):
    """A trainer that is built as configured, and does not train."""

    def fit(self, model: Any, datamodule: Any = None, ckpt_path: str | None = None) -> None:  # type: ignore[override]
        """Leave everything as it was built."""


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Build:
    """A tiny model with the optimizer of an overlay, as the command line builds them."""
    monkeypatch.setattr("sys.argv", ["lightning_multinorm"])
    monkeypatch.chdir(tmp_path)

    def run(overlay: str) -> LlamaPretraining:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what the packages import
            pytest.importorskip(PACKAGES[overlay], reason=f"{PACKAGES[overlay]} is not installed", exc_type=ImportError)
        options = [f"--model.config.{field}={value}" for field, value in TINY.items()]
        options += ["--model.scheduler.init_args.total_steps=6", "--trainer.logger=false"]
        if overlay in RANKED:
            options.append("--model.optimizer.init_args.matrix_group.rank=4")
        configs = ["--config", "quickstart.yaml", "--config", f"optimizer/{overlay}.yaml"]
        return MultiNormCLI(resolve_configs(["fit", *configs, *options]), trainer_class=Idle).model

    return run


@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
@pytest.mark.parametrize("overlay", PACKAGES)
def test_trains_and_goes_on_from_its_checkpoint_to_the_last_bit(overlay: str, build: Build, tmp_path: Path) -> None:
    def fit(steps: int, **arguments: Any) -> LlamaPretraining:
        module, run = build(overlay), trainer(tmp_path, steps)
        torch.manual_seed(1)  # of the weights
        run.fit(module, loader(4), **arguments)  # the same rows in every step
        run.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return module

    fit(3)
    second = fit(6, ckpt_path=tmp_path / "3.ckpt", weights_only=True)
    straight = fit(6)
    before = torch.load(tmp_path / "3.ckpt", weights_only=True)["state_dict"]
    for (name, parameter), (_, twin) in zip(straight.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(parameter, twin) and not torch.equal(parameter, before[name]), name


def _by_hand(overlay: str, model: torch.nn.Module) -> torch.optim.Optimizer:
    """As the packages' documentation has it: one optimizer, whose group of matrices has the keys of the method."""
    groups = parameter_groups(model)
    matrices = [p for group in groups if group["rule"] == "multinorm" for _, p in group["params"]]
    rest = [p for group in groups if group["rule"] != "multinorm" for _, p in group["params"]]
    keys: dict[str, Any] = {"params": matrices, "rank": 4, "update_proj_gap": 200, "proj_type": "std"}
    if overlay == "galore":
        from galore_torch import GaLoreAdamW

        keys["scale"] = 0.25
        return GaLoreAdamW([{"params": rest}, keys], lr=0.01, no_deprecation_warning=True)
    if overlay == "fira":
        from fira import FiraAdamW

        keys["alpha"] = 0.25
        return FiraAdamW([{"params": rest}, keys], lr=0.01, no_deprecation_warning=True)
    from apollo_torch import APOLLOAdamW

    keys |= {"proj": "random", "scale_type": "channel", "scale": 1}
    if overlay == "apollo_mini":
        keys |= {"rank": 1, "scale_type": "tensor", "scale": 128}
    return APOLLOAdamW([{"params": rest}, keys], lr=0.01, scale_front=overlay == "apollo_mini")


@pytest.mark.parametrize("overlay", ["galore", "fira", "apollo", "apollo_mini"])
def test_is_what_the_package_documents(overlay: str, build: Build) -> None:
    module = build(overlay)
    module.configure_model()
    twin = deepcopy(module)
    combined, by_hand = module.optimizer(parameter_groups(module)), _by_hand(overlay, twin)
    assert isinstance(combined, Combined)
    for parameter, copied in zip(module.parameters(), twin.parameters(), strict=True):
        if overlay.startswith("apollo"):  # it numbers parameters in the order that it gets them in
            by_hand.state[copied]["seed"] = combined.state[parameter]["seed"]
    for _ in range(3):
        for parameter, copied in zip(module.parameters(), twin.parameters(), strict=True):
            parameter.grad = torch.randn_like(parameter)
            copied.grad = parameter.grad.clone()
        combined.step()
        by_hand.step()
    for (name, parameter), (_, copied) in zip(module.named_parameters(), twin.named_parameters(), strict=True):
        assert torch.equal(parameter, copied), name


def _apart(module: LlamaPretraining, key: str, lr: float) -> tuple[Optimizer, dict[str, Any]]:
    """The optimizer of ``module``, whose matrices' group alone has ``key``, and that group; all have one rate."""
    module.configure_model()
    optimizer = module.optimizer(parameter_groups(module))
    kinds = {group["name"]: key in group for group in optimizer.param_groups}
    assert kinds == {"embedding": False, "matrix": True, "norm": False, "head": False}
    assert {group["lr"] for group in optimizer.param_groups} == {lr}
    return optimizer, next(group for group in optimizer.param_groups if group["name"] == "matrix")


def test_muon_is_torchs(build: Build) -> None:
    _, matrices = _apart(build("muon"), "momentum", 1e-3)
    assert (matrices["adjust_lr_fn"], matrices["weight_decay"]) == ("match_rms_adamw", 0.0)


def test_racs_is_pytorch_optimizers(build: Build) -> None:
    module = build("racs")
    optimizer, matrices = _apart(module, "gamma", 0.02)
    for parameter in module.parameters():
        parameter.grad = torch.randn_like(parameter) * 1e-6  # squares far below the package's own eps
    matrix = matrices["params"][0]
    before = matrix.detach().clone()
    optimizer.step()
    change = (matrix.detach() - before).square().mean().sqrt()
    assert change > 0.02 * 0.05  # no smaller for so small a gradient
