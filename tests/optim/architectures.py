"""Tiny random models of the common architectures, each with a table of what its parameters are, written by hand.

A table maps shell patterns of names to kinds, first match first; a view other than "matrix" follows after a slash.
"""

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

Table = dict[str, str]


def _hf(name: str, config: str, **sizes: Any) -> nn.Module:
    import transformers

    return getattr(transformers, name)(getattr(transformers, config)(**sizes))


_LLAMA = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
_TOKENS = {"bos_token_id": 0, "eos_token_id": 1}  # GPT-2's own lie beyond this vocabulary, which warns
_COMMON: Table = {"*norm*.*": "norm", "*.bias": "bias"}


def llama(tied: bool = False) -> nn.Module:
    return _hf("LlamaForCausalLM", "LlamaConfig", **_LLAMA, tie_word_embeddings=tied)


def mixtral() -> nn.Module:
    return _hf("MixtralForCausalLM", "MixtralConfig", **_LLAMA, num_key_value_heads=2, num_local_experts=4)


def gpt2() -> nn.Module:
    return _hf("GPT2LMHeadModel", "GPT2Config", **_LLAMA, max_position_embeddings=6, **_TOKENS)


def gpt_neox() -> nn.Module:
    return _hf("GPTNeoXForCausalLM", "GPTNeoXConfig", **_LLAMA, tie_word_embeddings=False)


def opt() -> nn.Module:
    sizes = {"vocab_size": 11, "hidden_size": 8, "ffn_dim": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    return _hf("OPTForCausalLM", "OPTConfig", **sizes, **_TOKENS, word_embed_proj_dim=8, max_position_embeddings=6)


def bert() -> nn.Module:
    return _hf("BertForMaskedLM", "BertConfig", **_LLAMA, max_position_embeddings=6)


def bert_classifier() -> nn.Module:
    return _hf("BertForSequenceClassification", "BertConfig", **_LLAMA, max_position_embeddings=6)


def vit() -> nn.Module:
    sizes = {k: v for k, v in _LLAMA.items() if k != "vocab_size"}
    return _hf("ViTForImageClassification", "ViTConfig", **sizes, image_size=8, patch_size=4, num_labels=3)


def t5(tied: bool = True) -> nn.Module:
    sizes = {"vocab_size": 11, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 2, "num_heads": 2}
    return _hf("T5ForConditionalGeneration", "T5Config", **sizes, tie_word_embeddings=tied)


def encoder_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 12)


def convolutional() -> nn.Module:
    layers = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.GroupNorm(1, 5), nn.Flatten())
    model = nn.Sequential(*layers)
    model.add_module("head", nn.Linear(5, 3))
    return model


class Own(nn.Module):
    """A language model with names that say nothing; its head may be the embedding's own weight."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.first = nn.Embedding(11, 8)
        self.middle = nn.Linear(8, 8)
        self.blocks = nn.ModuleList([nn.Linear(8, 11), nn.Linear(11, 8)])
        self.last = nn.Linear(8, 11, bias=False)
        self.temperature = nn.Parameter(torch.ones(()))
        if tied:
            self.last.weight = self.first.weight


_LLAMA_TABLE: Table = {"*.embed_tokens.weight": "embedding", "lm_head.weight": "head", **_COMMON, "*": "matrix"}
_BERT_TABLE: Table = {
    "*LayerNorm.*": "norm",
    "*.bias": "bias",
    "*_embeddings.weight": "embedding",
    "classifier.weight": "head",
    "*": "matrix",
}
_T5_TABLE: Table = {
    "*norm.weight": "norm",
    "shared.weight": "embedding",
    "*.relative_attention_bias.weight": "embedding",
    "lm_head.weight": "head",
    "*": "matrix",
}

_OWN_TABLE: Table = {
    "first.weight": "embedding",
    "middle.weight": "matrix",
    "blocks.?.weight": "matrix",
    "*.bias": "bias",
    "temperature": "bias",
}

ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], Table]] = {
    "llama": (llama, _LLAMA_TABLE),
    "llama_tied": (lambda: llama(tied=True), _LLAMA_TABLE),
    "mixtral": (mixtral, {"*.experts.*": "matrix/batch", **_LLAMA_TABLE}),
    "gpt2": (
        gpt2,
        {
            "*.wte.weight": "embedding",
            "*.wpe.weight": "embedding",
            "*.ln_*": "norm",
            "*.bias": "bias",
            "*": "matrix/transposed",
        },
    ),
    "gpt_neox": (
        gpt_neox,
        {"*.embed_in.weight": "embedding", "lm_head.weight": "head", **_COMMON, "*": "matrix"},
    ),
    "opt": (opt, {"*.embed_*.weight": "embedding", **_COMMON, "*": "matrix"}),
    "bert": (bert, _BERT_TABLE),
    "bert_classifier": (bert_classifier, _BERT_TABLE),
    "vit": (
        vit,
        {
            "*.cls_token": "bias/convolution",
            "*.position_embeddings": "embedding/convolution",
            "*.projection.weight": "matrix/convolution",
            **_COMMON,
            "classifier.weight": "head",
            "*": "matrix",
        },
    ),
    "t5": (t5, _T5_TABLE),
    "t5_untied": (lambda: t5(tied=False), _T5_TABLE),
    "convolutional": (
        convolutional,
        {"[14].*": "norm", "*.bias": "bias", "[03].weight": "matrix/convolution", "head.weight": "head"},
    ),
    "own": (lambda: Own(tied=False), {**_OWN_TABLE, "last.weight": "head"}),
    "own_tied": (lambda: Own(tied=True), _OWN_TABLE),
    "encoder_layer": (
        encoder_layer,
        {"*.in_proj_weight": "matrix/qkv", "norm?.*": "norm", "*bias": "bias", "*": "matrix"},
    ),
}


def expected(table: Table, name: str) -> tuple[str, str]:
    """Kind and view that a table gives to a name."""
    kind, _, view = next(what for pattern, what in table.items() if fnmatchcase(name, pattern)).partition("/")
    return kind, view or "matrix"
