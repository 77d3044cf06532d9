"""How a LLaMA is spread over a device mesh: tensor parallelism from transformers' plan, then FSDP2 block by block.

Sharding here changes no number: weights are drawn before they are cut, one block at a time, so that no more than one
whole block is ever in memory beside the shards.
"""

import fnmatch
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

from lightning_multinorm.errors import UsageError
from lightning_multinorm.llama.model import Llama


def build_llama(
    config: LlamaConfig,
    device: torch.device,
    *,
    data_mesh: DeviceMesh | None = None,
    tensor_mesh: DeviceMesh | None = None,
    precision: MixedPrecisionPolicy | None = None,
    reshard_after_forward: bool = True,
    compiled: bool = False,
) -> Llama:
    """Build a LLaMA with fresh weights, spread as the meshes say, without ever holding it whole.

    The weights depend on torch's seed alone, not on the meshes: they are those of transformers' ``init_weights``.

    Args:
        config: of the model.
        device: on which blocks are initialised and shards stay.
        data_mesh: of FSDP2, one dimension to shard over, or two to replicate over the first (HSDP); None: no FSDP2.
        tensor_mesh: of tensor parallelism, one dimension; None: none.
        precision: FSDP2's.
        reshard_after_forward: free a block's gathered weights after its forward pass, and gather them again in the
            backward pass (FSDP2's default), or keep them.
        compiled: let `torch.compile` compile each block, in place, so that no name changes.

    Raises:
        UsageError: if the heads or the width of the MLP do not divide by the tensor mesh.
    """
    if tensor_mesh is not None:
        _check_divisible(config, tensor_mesh.size())
    with torch.device("meta"):
        model = Llama(config)
    policy = precision or MixedPrecisionPolicy()
    for name, part in _parts(model):
        part.to_empty(device=device)
        initialise(part, config)
        if tensor_mesh is not None:
            _parallelize(model, name, part, tensor_mesh)
        if compiled and name.startswith("layers."):
            part.compile()  # before it is sharded: what FSDP2 does around a block is not to be compiled with it
        if data_mesh is not None and name.startswith("layers."):
            fully_shard(part, mesh=data_mesh, reshard_after_forward=reshard_after_forward, mp_policy=policy)
    model.tie_weights()
    if data_mesh is not None:  # embedding, last norm and head together; needed again at once, so kept
        fully_shard(model, mesh=data_mesh, reshard_after_forward=False, mp_policy=policy)
        model.gathers_for_loss()
    return model


def initialise(part: nn.Module, config: LlamaConfig) -> None:
    """Draw weights as transformers does: N(0, initializer_range), norms 1, no bias; rotary tables computed."""
    for module in part.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=config.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, LlamaRMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, LlamaRotaryEmbedding):
            with module.inv_freq.device:
                fresh = LlamaRotaryEmbedding(config)
            for name, buffer in fresh.named_buffers():
                getattr(module, name).copy_(buffer)


def _parts(model: Llama) -> Iterator[tuple[str, nn.Module]]:
    """What is initialised together, with its name: embedding, each block, the final norm, the head."""
    inner = model.model
    yield "embed_tokens", inner.embed_tokens
    yield "rotary_emb", inner.rotary_emb
    for number, block in enumerate(inner.layers):
        yield f"layers.{number}", block
    yield "norm", inner.norm
    if not model.config.tie_word_embeddings:
        yield "lm_head", model.lm_head


def _parallelize(model: Llama, name: str, part: nn.Module, mesh: DeviceMesh) -> None:
    """Cut the linear layers of a part by transformers' plan."""
    plan = {**(model.config.base_model_tp_plan or {}), **(model._tp_plan if name == "lm_head" else {})}
    styles: dict[str, ParallelStyle] = {}
    for path, module in part.named_modules():
        full = f"{name}.{path}" if path else name
        for pattern, style in plan.items():
            if isinstance(module, nn.Linear) and fnmatch.fnmatch(full, pattern.removeprefix("model.")):
                styles[path] = _STYLES[style]()
    if styles:
        parallelize_module(part, mesh, styles.get("", styles))  # the head is a part by itself


_STYLES: dict[str, Any] = {
    "colwise": ColwiseParallel,
    "rowwise": RowwiseParallel,
    "colwise_gather_output": lambda: ColwiseParallel(output_layouts=Replicate()),
}


def _check_divisible(config: LlamaConfig, size: int) -> None:
    for field in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if getattr(config, field) % size:
            raise UsageError(
                f"tensor parallelism over {size} devices cannot divide {field}={getattr(config, field)}; "
                "use a size that divides it, or FSDP2 (strategy fsdp2)"
            )
