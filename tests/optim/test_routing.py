"""What each parameter is: by the modules of real models, and by names in the conventions of the field."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from lightning_multinorm import parameter_groups
from lightning_multinorm.optim.routing import Route, route_by_name, route_by_shape, route_model

from .architectures import ARCHITECTURES, Own, Table, expected

_SAID_BY_NAMES = {k: v for k, v in ARCHITECTURES.items() if k not in ("own", "own_tied", "convolutional")}


@pytest.mark.parametrize(("make", "table"), ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_modules_tell_kind_and_view(make: Callable[[], nn.Module], table: Table) -> None:
    model = make()
    found = {name: (route.kind, route.view) for name, route in route_model(model).items()}
    assert found == {name: expected(table, name) for name, _ in model.named_parameters()}


@pytest.mark.parametrize(("make", "table"), _SAID_BY_NAMES.values(), ids=_SAID_BY_NAMES)
def test_names_tell_the_same(make: Callable[[], nn.Module], table: Table) -> None:
    for name, parameter in make().named_parameters():
        route = route_by_name(name, parameter)
        kind, view = expected(table, name)
        assert route == Route(kind, "matrix" if view == "transposed" else view), name  # type: ignore[arg-type]


_CONVENTIONS: dict[str, dict[str, str]] = {
    "llama": {
        "model.embed_tokens.weight": "embedding",
        "model.layers.0.self_attn.q_proj.weight": "matrix",
        "model.layers.0.mlp.down_proj.weight": "matrix",
        "lm_head.weight": "head",
    },
    "torchtitan": {
        "tok_embeddings.weight": "embedding",
        "layers.0.attention.wq.weight": "matrix",
        "layers.0.attention.wo.weight": "matrix",
        "layers.0.feed_forward.w1.weight": "matrix",
        "output.weight": "head",
    },
    "gpt2": {
        "transformer.wte.weight": "embedding",
        "transformer.wpe.weight": "embedding",
        "transformer.h.0.attn.c_attn.weight": "matrix",
        "transformer.h.0.mlp.c_fc.weight": "matrix",
        "transformer.h.11.mlp.c_proj.weight": "matrix",
        "lm_head.weight": "head",
    },
    "gpt_neox": {
        "gpt_neox.embed_in.weight": "embedding",
        "gpt_neox.layers.0.attention.query_key_value.weight": "matrix",
        "gpt_neox.layers.0.mlp.dense_h_to_4h.weight": "matrix",
        "embed_out.weight": "head",
    },
    "litgpt": {
        "transformer.wte.weight": "embedding",
        "transformer.h.0.attn.qkv.weight": "matrix",
        "transformer.h.0.mlp.fc_1.weight": "matrix",
        "transformer.h.0.mlp.proj.weight": "matrix",
        "lm_head.weight": "head",
    },
    "opt": {
        "model.decoder.embed_tokens.weight": "embedding",
        "model.decoder.embed_positions.weight": "embedding",
        "model.decoder.layers.0.fc1.weight": "matrix",
        "model.decoder.layers.0.self_attn.out_proj.weight": "matrix",
    },
    "bert": {
        "bert.embeddings.word_embeddings.weight": "embedding",
        "bert.embeddings.token_type_embeddings.weight": "embedding",
        "bert.encoder.layer.0.attention.output.dense.weight": "matrix",
        "bert.encoder.layer.0.output.dense.weight": "matrix",
        "cls.predictions.decoder.weight": "head",
    },
    "vit": {
        "vit.encoder.layer.0.attention.attention.query.weight": "matrix",
        "vit.encoder.layer.0.output.dense.weight": "matrix",
        "classifier.weight": "head",
        "head.weight": "head",
        "heads.head.weight": "head",
    },
    "t5": {
        "shared.weight": "embedding",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": "embedding",
        "decoder.block.0.layer.1.EncDecAttention.q.weight": "matrix",
        "encoder.block.0.layer.1.DenseReluDense.wi_0.weight": "matrix",
        "lm_head.weight": "head",
    },
}
_PREFIXES = ("", "module.", "_orig_mod.", "model.")


@pytest.mark.parametrize("convention", _CONVENTIONS)
@pytest.mark.parametrize("prefix", _PREFIXES)
def test_conventions_of_names(convention: str, prefix: str) -> None:
    matrix = torch.zeros(6, 4)
    for name, kind in _CONVENTIONS[convention].items():
        assert route_by_name(prefix + name, matrix).kind == kind, name


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.norm.weight", "norm"),
        ("transformer.ln_f.weight", "norm"),
        ("transformer.h.0.norm_1.weight", "norm"),
        ("encoder.block.0.layer.0.layer_norm.weight", "norm"),
        ("layers.0.attention_norm.weight", "norm"),
        ("transformer.h.0.attn.c_attn.bias", "bias"),
        ("layers.0.embedding.bias", "bias"),
        ("lm_head.bias", "bias"),
    ],
)
def test_vectors_are_never_matrices(name: str, kind: str) -> None:
    assert route_by_name(name, torch.zeros(4)) == Route(kind)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "shape", "route"),
    [
        ("layers.0.mlp.experts.gate_up_proj", (4, 6, 3), Route("matrix", "batch")),
        ("layers.0.moe.experts.w1", (4, 6, 3), Route("matrix", "batch")),
        ("layers.0.moe.experts.w1.weight", (4, 6, 3), Route("matrix", "batch")),
        ("features.0.weight", (4, 3, 5, 5), Route("matrix", "convolution")),
        ("encoder.conv.weight", (4, 3, 5), Route("matrix", "convolution")),
        ("attn.in_proj_weight", (12, 4), Route("matrix", "qkv")),
        ("attn.in_proj_weight", (10, 4), Route("matrix")),
    ],
)
def test_views_told_by_names_and_shapes(name: str, shape: tuple[int, ...], route: Route) -> None:
    assert route_by_name(name, torch.zeros(shape)) == route


def test_packed_qkv_can_be_kept_whole() -> None:
    attention = nn.MultiheadAttention(8, 2)
    assert route_model(attention)["in_proj_weight"] == Route("matrix", "qkv")
    assert route_model(attention, split_qkv=False)["in_proj_weight"] == Route("matrix")
    assert route_by_name("in_proj_weight", attention.in_proj_weight, split_qkv=False) == Route("matrix")
    views = [group["view"] for group in parameter_groups(attention, split_qkv=False)]
    assert "qkv" not in views


@pytest.mark.parametrize(
    ("shape", "route"),
    [
        ((), Route("bias")),
        ((3,), Route("bias")),
        ((3, 4), Route("matrix")),
        ((3, 4, 5), Route("matrix", "convolution")),
    ],
)
def test_shapes_tell_vectors_from_matrices(shape: tuple[int, ...], route: Route) -> None:
    assert route_by_shape(torch.zeros(shape)) == route


def test_a_linear_of_the_vocabulary_in_numbered_layers_is_no_head() -> None:
    routes = route_model(Own(tied=False))
    assert routes["last.weight"].kind == "head"
    assert routes["blocks.0.weight"].kind == "matrix"


class _Declared(nn.Module):
    """A head that neither its name nor its shape betrays, but that the model declares as Hugging Face models do."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 9)])

    def get_output_embeddings(self) -> nn.Module:
        return self.parts[1]


@pytest.mark.parametrize("model", [_Declared(), nn.ModuleDict({"inner": _Declared()})], ids=["bare", "wrapped"])
def test_a_declared_head_is_a_head(model: nn.Module) -> None:
    kinds = {name.removeprefix("inner."): route.kind for name, route in route_model(model).items()}
    assert kinds["parts.0.weight"] == "matrix"
    assert kinds["parts.1.weight"] == "head"


def test_flat_slices_are_refused_with_the_remedy() -> None:
    model = nn.ModuleDict({"proj": nn.Linear(3, 4)})
    model["proj"].weight = nn.Parameter(torch.zeros(12))
    with pytest.raises(ValueError, match=r"proj\.weight has shape \(12,\).*FSDP2"):
        route_model(model)
