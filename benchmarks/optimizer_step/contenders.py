"""Who takes part, each through its own library and with which settings; a library is imported when it is built."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from benchmarks.optimizer_step.galore import RANKS, build_galore, svd_seconds
from benchmarks.optimizer_step.textbook import Textbook
from lightning_multinorm.optim import SWAN, SinkGD
from lightning_multinorm.sinkhorn import Kernel

LR = 1e-5  # small: contenders update the same weights in turn
REFERENCE = "adamw"

Family = Literal["this package", "SinkGD and RACS elsewhere", "others with state", "torch, fused"]


@dataclass(frozen=True)
class Contender:
    """An optimizer with its settings.

    Attributes:
        title: as tables and plots show it.
        family: for the plot's colours.
        build: (weights, model size) to the optimizer; may raise whatever its library raises.
        settings: what differs from the library's defaults, and what a reader must know.
        package: distribution whose version is reported, None for what is part of torch or of this repository.
        upkeep: seconds that one round of the work takes which the library does every 200 steps, never in a timed one.
    """

    title: str
    family: Family
    build: Callable[[list[Parameter], str], Optimizer]
    settings: str
    package: str | None = None
    upkeep: Callable[[list[Parameter], str], float] | None = None


def _matrices(weights: list[Parameter]) -> list[dict[str, Any]]:
    return [{"params": weights, "rule": "multinorm", "view": "matrix"}]


def _sinkgd(iterations: int, kernel: Kernel = "auto") -> Callable[[list[Parameter], str], Optimizer]:
    def build(weights: list[Parameter], model: str) -> Optimizer:
        return SinkGD(_matrices(weights), lr=LR, iterations=iterations, kernel=kernel)

    return build


def _swan(k: int, precision: Literal["float32", "bfloat16"]) -> Callable[[list[Parameter], str], Optimizer]:
    return lambda weights, model: SWAN(_matrices(weights), lr=LR, k=k, precision=precision)


def _adamw(weights: list[Parameter], model: str) -> Optimizer:
    return torch.optim.AdamW(weights, lr=LR, weight_decay=0.0, fused=True)


def _sgd(weights: list[Parameter], model: str) -> Optimizer:
    return torch.optim.SGD(weights, lr=LR, fused=True)


def _muon(weights: list[Parameter], model: str) -> Optimizer:
    return torch.optim.Muon(weights, lr=LR, weight_decay=0.0)


def _textbook(compiled: bool) -> Callable[[list[Parameter], str], Optimizer]:
    return lambda weights, model: Textbook(weights, lr=LR, compiled=compiled)


def _adv_optm(weights: list[Parameter], model: str) -> Optimizer:
    from adv_optm import SinkSGD_adv

    return SinkSGD_adv(weights, lr=LR)


def _axolotl(fused: bool) -> Callable[[list[Parameter], str], Optimizer]:
    def build(weights: list[Parameter], model: str) -> Optimizer:
        if fused and weights[0].device.type != "cuda":
            raise RuntimeError("its fused kernels need CUDA")
        from axolotl.utils.optimizers.sinkgd import SinkGD as AxolotlSinkGD

        groups = [{"params": weights, "use_sinkgd": True}]
        return AxolotlSinkGD(groups, lr=LR, sinkgd_fused_kernel=fused)

    return build


def _apollo_mini(weights: list[Parameter], model: str) -> Optimizer:
    from apollo_torch import APOLLOAdamW

    rule = {"rank": 1, "proj": "random", "scale_type": "tensor", "scale": 128, "update_proj_gap": 200}
    return APOLLOAdamW([{"params": weights, **rule, "proj_type": "std"}], lr=LR)


def _racs(weights: list[Parameter], model: str) -> Optimizer:
    from pytorch_optimizer import RACS

    return RACS(weights, lr=LR, foreach=None)


def _adamw_8bit_torchao(weights: list[Parameter], model: str) -> Optimizer:
    from torchao.optim import AdamW8bit

    return AdamW8bit(weights, lr=LR, weight_decay=0.0)


def _adamw_8bit_bitsandbytes(weights: list[Parameter], model: str) -> Optimizer:
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(weights, lr=LR, weight_decay=0.0)


_GALORE = f"rank {', '.join(f'{rank} ({size})' for size, rank in RANKS.items())}, scale 0.25; no SVD in a timed step"
_APOLLO = "APOLLO-Mini of its README: rank 1, random projection (drawn anew every 200 steps, not in a timed one)"
_ADV_OPTM = "5 iterations, no momentum; starts on the longer side, floors small norms; stochastic rounding in bfloat16"

CONTENDERS: Mapping[str, Contender] = {
    "sinkgd": Contender("SinkGD", "this package", _sinkgd(5), "L = 5, automatic kernel"),
    "sinkgd-l1": Contender("SinkGD L=1", "this package", _sinkgd(1), "automatic kernel"),
    "sinkgd-l3": Contender("SinkGD L=3", "this package", _sinkgd(3), "automatic kernel"),
    "sinkgd-l10": Contender("SinkGD L=10", "this package", _sinkgd(10), "automatic kernel"),
    "sinkgd-eager": Contender("SinkGD eager", "this package", _sinkgd(5, "eager"), "L = 5, plain PyTorch"),
    "swan": Contender("SWAN", "this package", _swan(10, "float32"), "10 Newton-Schulz steps, in float32"),
    "swan-k5": Contender("SWAN k=5 bf16", "this package", _swan(5, "bfloat16"), "5 steps in bfloat16, as Muon"),
    "textbook": Contender(
        "textbook SinkGD", "SinkGD and RACS elsewhere", _textbook(False), "L = 5, eager, in the weights' dtype"
    ),
    "textbook-compiled": Contender(
        "textbook compiled",
        "SinkGD and RACS elsewhere",
        _textbook(True),
        "the same under torch.compile, one graph a shape",
    ),
    "adv-optm": Contender("adv-optm SinkSGD", "SinkGD and RACS elsewhere", _adv_optm, _ADV_OPTM, "adv-optm"),
    "axolotl": Contender(
        "axolotl SinkGD", "SinkGD and RACS elsewhere", _axolotl(False), "5 iterations, its compiled path", "axolotl"
    ),
    "axolotl-fused": Contender(
        "axolotl SinkGD fused",
        "SinkGD and RACS elsewhere",
        _axolotl(True),
        "5 iterations, its Triton kernels",
        "axolotl",
    ),
    "racs": Contender(
        "RACS", "SinkGD and RACS elsewhere", _racs, "row and column scales of state; foreach=None", "pytorch-optimizer"
    ),
    "sgd": Contender("SGD", "torch, fused", _sgd, "fused, no momentum"),
    "adamw": Contender("AdamW", "torch, fused", _adamw, "fused, state in the weights' dtype"),
    "adamw8bit": Contender("AdamW 8-bit (torchao)", "others with state", _adamw_8bit_torchao, "compiled", "torchao"),
    "adamw8bit-bnb": Contender(
        "AdamW 8-bit (bnb)", "others with state", _adamw_8bit_bitsandbytes, "blockwise 8-bit state", "bitsandbytes"
    ),
    "muon": Contender("Muon", "others with state", _muon, "torch.optim.Muon, 5 steps, 15 products, in bfloat16"),
    "galore": Contender("GaLore", "others with state", build_galore(LR), _GALORE, "galore-torch", svd_seconds),
    "apollo-mini": Contender("APOLLO-Mini", "others with state", _apollo_mini, _APOLLO, "apollo-torch"),
}
