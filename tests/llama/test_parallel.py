"""A LLaMA built block by block has transformers' own weights, all of them; spread ones are in tests/distributed."""

from pathlib import Path

import pytest
import torch
from parts import TINY, Recorder, loader, tiny_llama, trainer
from transformers import LlamaForCausalLM

from lightning_multinorm.llama.parallel import build_llama
from lightning_multinorm.llama.sizes import llama_config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_those_of_transformers(dtype: torch.dtype) -> None:
    config = llama_config(None, TINY)
    torch.set_default_dtype(dtype)
    torch.manual_seed(4)
    own = build_llama(config, torch.device("cpu"))
    torch.manual_seed(4)
    with torch.device("meta"):
        other = LlamaForCausalLM(config)
    other.to_empty(device="cpu")
    other.init_weights()
    for (name, parameter), value in zip(own.named_parameters(), other.parameters(), strict=True):
        assert parameter.dtype is dtype
        assert torch.equal(parameter, value), name
    tokens = torch.arange(8).unsqueeze(0)
    assert torch.equal(own(tokens).logits, other(tokens).logits)  # rotary tables included


def test_tied_embeddings_stay_tied() -> None:
    model = build_llama(llama_config(None, {**TINY, "tie_word_embeddings": True}), torch.device("cpu"))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert 0.01 < model.lm_head.weight.std() < 0.03


def test_nothing_is_allocated_on_the_meta_device() -> None:
    model = build_llama(llama_config("7b"), torch.device("meta"))
    assert all(parameter.is_meta for parameter in model.parameters())


def test_activation_checkpointing_changes_no_loss(tmp_path: Path) -> None:
    losses = []
    for option in (False, True):
        module, recorder = tiny_llama(activation_checkpointing=option), Recorder()
        trainer(tmp_path, 4, logger=recorder).fit(module, loader())
        assert module.model is not None
        assert module.model.is_activation_checkpointing is option
        losses.append(recorder.values("train/loss"))
    assert losses[0] == losses[1]
