"""The model sizes of the papers' benchmark (GaLore's; arXiv:2502.07752, Appendix F), as fields of `LlamaConfig`."""

from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, Literal

from huggingface_hub.errors import StrictDataclassError
from transformers import LlamaConfig

from lightning_multinorm.errors import UsageError

Size = Literal["60m", "130m", "350m", "1b", "7b"]


def _size(hidden: int, intermediate: int, layers: int, heads: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
    }


SIZES: Mapping[Size, Mapping[str, int]] = {
    "60m": _size(512, 1376, 8, 8),
    "130m": _size(768, 2048, 12, 12),
    "350m": _size(1024, 2736, 24, 16),
    "1b": _size(2048, 5461, 24, 32),
    "7b": _size(4096, 11008, 32, 32),
}
_COMMON = {
    "vocab_size": 32_000,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "use_cache": False,
}


def config_fields() -> set[str]:
    """Names of the fields that `LlamaConfig` knows."""
    return {field.name for field in fields(LlamaConfig)} | {"rope_theta"}


def llama_config(size: Size | None, overrides: Mapping[str, Any] | None = None) -> LlamaConfig:
    """The configuration of a size, with some fields changed.

    Args:
        size: one of the papers', or None to start from the 60m's fields.
        overrides: fields of `LlamaConfig`.

    Raises:
        UsageError: for an unknown size or field, or a width that its heads do not divide.
    """
    if size is not None and size not in SIZES:
        raise UsageError(f"size={size!r} is unknown; use one of {', '.join(SIZES)}, or null and a config")
    overrides = dict(overrides or {})
    if unknown := sorted(overrides.keys() - config_fields()):
        # LlamaConfig itself would keep an unknown field, and ignore it.
        close = get_close_matches(unknown[0], config_fields(), n=1)
        hint = f"did you mean {close[0]}?" if close else "check the spelling"
        raise UsageError(f"model.config has {', '.join(unknown)}, which LlamaConfig does not know; {hint}")
    values = {**_COMMON, **SIZES[size or "60m"], **overrides}
    if "num_key_value_heads" not in overrides:
        values["num_key_value_heads"] = values["num_attention_heads"]
    try:
        config = LlamaConfig(**values)
    except StrictDataclassError as error:
        reason = " ".join(str(error).rpartition("Error:")[2].split())
        raise UsageError(f"model.config cannot be: {reason}") from None
    heads = config.num_attention_heads
    kv_heads = config.num_key_value_heads or heads
    if heads % kv_heads:
        raise UsageError(f"num_attention_heads={heads} must be a multiple of num_key_value_heads={kv_heads}")
    return config
