"""A trained model out of any checkpoint, single file or folder of shards, with the tokenizer of its run."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from lightning_multinorm.checkpoints.damage import is_folder
from lightning_multinorm.checkpoints.files import existing
from lightning_multinorm.checkpoints.last import newest, whole
from lightning_multinorm.checkpoints.reading import read_weights
from lightning_multinorm.data.kept import kept_tokenizer, read_tokenizer
from lightning_multinorm.data.tokenizer import end_of_text_id, identify, largest_text_id
from lightning_multinorm.errors import UsageError
from lightning_multinorm.llama.sizes import config_fields, llama_config

_PREFIX = "model."  # of LlamaPretraining's own attribute
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Trained:
    """A model as it was trained, ready to be used.

    Attributes:
        path: of the checkpoint.
        model: with the checkpoint's weights on the CPU, in their own precision.
        tokenizer: that it was trained with, or that was asked for.
        state: what the checkpoint holds beside weights and optimizer.
    """

    path: Path
    model: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerBase
    state: dict[str, Any]


def load_trained(ckpt_path: str, tokenizer: str | None = None) -> Trained:
    """The model and the tokenizer of a checkpoint; the weights of a single file stay on the disk until they are used.

    Args:
        ckpt_path: a checkpoint, or the folder of a run, which stands for its newest whole checkpoint.
        tokenizer: folder of the tokenizer. Default: the one that the run has kept.

    Raises:
        UsageError: if there is no such checkpoint, or it is damaged, or holds something else; if there is no tokenizer,
            or it has ids that the model does not know.
    """
    path = find_checkpoint(Path(ckpt_path))
    found = read_tokenizer(Path(tokenizer) if tokenizer is not None else kept_tokenizer(path))
    state = read_weights(whole(path))
    model = _model(path, state, state.pop("state_dict", {}))
    _check_tokenizer(found, model.config, state)
    model.config.use_cache = True  # training has no use for it
    model.config.bos_token_id = found.bos_token_id
    model.config.eos_token_id = end_of_text_id(found)
    return Trained(path, model, found, state)


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that a path names: itself, or the newest whole one of a run's folder.

    Raises:
        UsageError: if there is none.
    """
    found = existing(path)
    if found.is_file() or is_folder(found):
        return path
    if not path.is_dir():
        raise UsageError(f"ckpt_path={path}: there is no such file or folder")
    last, damaged = newest([path, path / "checkpoints", *sorted(path.glob("version_*/checkpoints"))])
    for other, wrong in damaged.items():
        print(f"The checkpoint {other} is not usable, and passed over: {wrong}.", file=sys.stderr)
    if last is None:
        raise UsageError(f"ckpt_path={path}: there is no whole checkpoint in it; name a checkpoint, or train first")
    return last


def _model(path: Path, state: dict[str, Any], weights: dict[str, Tensor]) -> LlamaForCausalLM:
    saved = state.get("llama_config")
    if not isinstance(saved, dict) or not weights:
        raise UsageError(f"{path} holds no LLaMA that this package trained (no llama_config, or no weights)")
    config = llama_config(None, {key: value for key, value in saved.items() if key in config_fields()})
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.model.rotary_emb = LlamaRotaryEmbedding(config)  # computed, and so in no checkpoint
    own = {name.removeprefix(_PREFIX): weight for name, weight in weights.items()}
    if config.tie_word_embeddings and _EMBEDDING in own:
        own[_HEAD] = own[_EMBEDDING]
    wanted = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    got = {name: tuple(weight.shape) for name, weight in own.items()}
    if differing := sorted(name for name in wanted.keys() | got.keys() if wanted.get(name) != got.get(name)):
        name = differing[0]
        raise UsageError(
            f"{path} does not hold the weights that its llama_config asks for: {name} is {got.get(name, 'missing')}, "
            f"not {wanted.get(name, 'there')} ({len(differing)} differ)"
        )
    model.load_state_dict(own, assign=True)
    model.tie_weights()
    return model.eval().requires_grad_(False)


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, config: LlamaConfig, state: dict[str, Any]) -> None:
    if (ids := largest_text_id(tokenizer) + 1) > config.vocab_size:
        raise UsageError(
            f"the tokenizer has {ids} ids, the model only {config.vocab_size}; name the one that it was trained with: "
            "--tokenizer FOLDER"
        )
    trained_with = state.get("TextDataModule", {}).get("tokenizer")
    if trained_with is not None and trained_with != identify(tokenizer):
        print("The tokenizer is not the one that the checkpoint was trained with.", file=sys.stderr)
