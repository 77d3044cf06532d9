"""Plans of the papers' sizes, for all tests of this folder."""

from functools import partial
from typing import Any

import torch
from transformers import LlamaForCausalLM

from lightning_multinorm import SinkGD, parameter_groups
from lightning_multinorm.llama.sizes import llama_config
from lightning_multinorm.planning import Layout, MicroBatch, Plan, Precision, plan
from lightning_multinorm.planning.states import MakeOptimizer

ADAMW = partial(torch.optim.AdamW, fused=True)


def planned(
    size: Any = "60m",
    *optimizers: MakeOptimizer,
    config: dict[str, Any] | None = None,
    precision: str = "bf16-true",
    batch: MicroBatch | None = None,
    layout: Layout | None = None,
) -> Plan:
    """A plan with SinkGD and AdamW, or with other optimizers."""
    llama = llama_config(size, config)
    with torch.device("meta"):
        model = LlamaForCausalLM(llama)
    return plan(
        model,
        llama,
        parameter_groups(model),
        optimizers or (SinkGD, ADAMW),
        batch or MicroBatch(4, 256),
        Precision.named(precision),
        layout,
    )
