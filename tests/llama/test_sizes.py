"""The papers' sizes, and what a configuration refuses. (Parameter counts are in test_configs, from the YAML files.)"""

import pytest

from lightning_multinorm.errors import UsageError
from lightning_multinorm.llama.sizes import SIZES, llama_config


@pytest.mark.parametrize("size", SIZES)
def test_what_all_sizes_share(size: str) -> None:
    config = llama_config(size)  # type: ignore[arg-type]
    assert config.vocab_size == 32_000 and config.rms_norm_eps == 1e-6 and config.initializer_range == 0.02
    assert config.rope_parameters["rope_theta"] == 10_000 and not config.tie_word_embeddings
    assert not config.use_cache and not config.attention_bias and config.pad_token_id is None
    assert config.num_key_value_heads == config.num_attention_heads


def test_fields_override_the_size() -> None:
    config = llama_config("60m", {"vocab_size": 100, "num_attention_heads": 16, "rope_theta": 5e5})
    assert (config.vocab_size, config.hidden_size, config.num_key_value_heads) == (100, 512, 16)
    assert config.rope_parameters["rope_theta"] == 5e5


@pytest.mark.parametrize(
    ("size", "fields", "message"),
    [
        ("2m", {}, "60m, 130m"),
        ("60m", {"max_sequence_length": 1024}, "max_sequence_length"),
        ("60m", {"hidden_size": 100}, r"hidden size \(100\)"),
        ("60m", {"num_key_value_heads": 3}, "num_key_value_heads=3"),
        ("60m", {"hidden_size": "512"}, "hidden_size"),
    ],
)
def test_what_cannot_be_is_refused_by_name(size: str, fields: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        llama_config(size, fields)  # type: ignore[arg-type]
