"""Train matrix-heavy networks without optimizer state: SinkGD, SWAN and MultiNorm for PyTorch and Lightning.

The optimizers need torch alone. What needs Lightning, transformers or datasets is imported at first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

from lightning_multinorm.alternating import multi_normalize
from lightning_multinorm.optim import SWAN, MultiNormGD, SinkGD, parameter_groups
from lightning_multinorm.sinkhorn import sr_sinkhorn

if TYPE_CHECKING:
    from lightning_multinorm.callbacks import LossSpikes, NonFiniteGradients, NormConvergence
    from lightning_multinorm.data import TextDataModule
    from lightning_multinorm.llama import LlamaPretraining

__all__ = [
    "SWAN",
    "LlamaPretraining",
    "LossSpikes",
    "MultiNormGD",
    "NonFiniteGradients",
    "NormConvergence",
    "SinkGD",
    "TextDataModule",
    "multi_normalize",
    "parameter_groups",
    "sr_sinkhorn",
]
__version__ = "0.1.0"

_LAZY = {
    "LlamaPretraining": "lightning_multinorm.llama",
    "LossSpikes": "lightning_multinorm.callbacks",
    "NonFiniteGradients": "lightning_multinorm.callbacks",
    "NormConvergence": "lightning_multinorm.callbacks",
    "TextDataModule": "lightning_multinorm.data",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
