"""What kind each parameter is, and how it lies: by module identity where there is a model, else by name and shape.

Knows models, names and shapes; nothing of optimizers or rules. Names are read segment by segment, never by fragments:
``tok_embeddings``, ``wpe`` and a head called ``output`` are what they are, and ``layers.0.attention.output.dense`` is
no head.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_multinorm.layouts import clean
from lightning_multinorm.views import View

Kind = Literal["matrix", "embedding", "head", "norm", "bias"]
"""matrix: weights of attention, MLP and convolutions. head: what maps back to the vocabulary or to classes. bias: every
other vector, and positions or tables that are no products' matrices."""

_EMBEDDING = re.compile(r"(^|_)emb(s|ed|eds|edding|eddings)?(_|$)|^w[tp]e$|^shared$|^relative_attention_bias$")
_HEAD = re.compile(
    r"^(lm_head|embed_out|output|output_layer|out_embed|heads?|classifier|logits|unembed|score|fc|proj_out|qa_outputs"
    r"|decoder|generator|readout)$"
)
_TABLE = re.compile(r"(^|_)(tokens?|pos|positions?|bias|table|scale|gain|gamma|beta|log)(_|$)")
_NORM = re.compile(r"(^|_)(norm|layernorm|rmsnorm|batchnorm|ln|bn)(_|\d|$)|norm\d*$")
_NORM_MODULES = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Route:
    """What a parameter is, and how it lies as a matrix."""

    kind: Kind
    view: View = "matrix"


def route_by_shape(tensor: Tensor) -> Route:
    """All that a shape tells: vectors are biases, anything else is a matrix."""
    if tensor.ndim < 2:
        return Route("bias")
    return Route("matrix", "matrix" if tensor.ndim == 2 else "convolution")


def route_by_name(name: str, tensor: Tensor, *, split_qkv: bool = True) -> Route:
    """Route by the name that `named_parameters` gives, in the conventions of the common architectures.

    Args:
        name: such as ``"model.layers.0.self_attn.q_proj.weight"``.
        tensor: the parameter, of which only the shape is read.
        split_qkv: count a packed ``in_proj_weight`` (3m, n) as three matrices.
    """
    *path, parameter = name.split(".")
    while path and path[-1].isdigit():  # classifier.6.weight
        path.pop()
    module = path[-1].lower() if path else ""
    if tensor.ndim < 2:
        return Route("norm" if _NORM.search(module) else "bias")
    named = module if parameter == "weight" else parameter
    if _HEAD.match(named) and not any(segment.isdigit() for segment in path):
        return Route("head", _view(tensor))
    if _EMBEDDING.search(named) and (tensor.ndim == 2 or parameter != "weight"):
        return Route("embedding", _view(tensor))
    if parameter == "in_proj_weight" and split_qkv and tensor.ndim == 2 and tensor.shape[0] % 3 == 0:
        return Route("matrix", "qkv")
    if parameter != "weight" and _TABLE.search(parameter):
        return Route("bias", _view(tensor))
    stacked = tensor.ndim == 3 and (parameter != "weight" or any("expert" in segment for segment in path))
    return Route("matrix", "batch" if stacked else _view(tensor))


def route_model(
    model: nn.Module, *, split_qkv: bool = True, shapes: Mapping[Tensor, torch.Size] | None = None
) -> dict[str, Route]:
    """Route each of ``model.named_parameters()``, by its clean name, by the module that owns it.

    ``shapes`` are those of parameters that do not show them, FSDP1's slices.

    A weight that an embedding and the output head share counts as the embedding. An output head is what
    ``get_output_embeddings()`` returns, a Linear of an embedding's shape outside the numbered layers, or a Linear that
    is named like one.

    Raises:
        ValueError: if the weight of a Linear or an Embedding is no matrix, as in FSDP1's flat slices.
    """
    names = {id(parameter): clean(name) for name, parameter in model.named_parameters()}
    # Only shapes are looked at below.
    whole = {parameter: torch.empty(shape, device="meta") for parameter, shape in (shapes or {}).items()}
    heads = {id(head.weight) for head in _output_embeddings(model)}
    vocabularies = {whole.get(m.weight, m.weight).shape for m in model.modules() if isinstance(m, nn.Embedding)}
    routes: dict[str, Route] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(path, recurse=False):
            seen = whole.get(parameter, parameter)
            route = _route_in_module(module, clean(name), seen, split_qkv)
            if route.kind == "matrix" and isinstance(module, nn.Linear):
                outside = not any(segment.isdigit() for segment in path.split("."))
                if id(parameter) in heads or (outside and seen.shape in vocabularies):
                    route = Route("head")
            canonical = names[id(parameter)]
            if canonical not in routes or route.kind == "embedding":
                routes[canonical] = route
    return {name: routes[name] for name in names.values()}


def _route_in_module(module: nn.Module, name: str, parameter: Tensor, split_qkv: bool) -> Route:
    by_name = route_by_name(name, parameter, split_qkv=split_qkv)
    if isinstance(module, nn.Linear | nn.Embedding) and name.endswith("weight") and parameter.ndim != 2:
        raise ValueError(
            f"{name} has shape {tuple(parameter.shape)}, but the weight of a {type(module).__name__} is a matrix; "
            "FSDP1 hands out flat slices: give parameter_groups the outermost FSDP1 wrapper (in Lightning "
            "trainer.strategy.model), or shard with FSDP2 (torch.distributed.fsdp.fully_shard, strategy fsdp2)"
        )
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return Route("embedding")
    if isinstance(module, _NORM_MODULES) or (parameter.ndim < 2 and "norm" in type(module).__name__.lower()):
        return Route("norm")
    if parameter.ndim < 2:
        return Route("bias")
    if isinstance(module, nn.Linear):
        return Route("head" if by_name.kind == "head" else "matrix")
    if isinstance(module, _CONVOLUTIONS):
        return Route("matrix", "convolution")
    if type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers."):
        return Route("matrix", "transposed")
    return by_name


def _output_embeddings(model: nn.Module) -> Iterator[nn.Linear]:
    """Output heads that Hugging Face models inside ``model`` declare."""
    for module in model.modules():
        head = getattr(module, "get_output_embeddings", lambda: None)()
        if isinstance(head, nn.Linear):
            yield head


def _view(tensor: Tensor) -> View:
    return "matrix" if tensor.ndim == 2 else "convolution"
