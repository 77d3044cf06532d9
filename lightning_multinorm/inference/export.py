"""``python -m lightning_multinorm export``: a checkpoint as a folder that transformers and the hub's tools read."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from transformers import GenerationConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from lightning_multinorm.arguments import OneLineParser
from lightning_multinorm.checkpoints.files import new_folder
from lightning_multinorm.errors import UsageError
from lightning_multinorm.inference.card import model_card
from lightning_multinorm.inference.trained import Trained, load_trained

LARGEST_FILE = "5GB"
"""Weights beyond this lie in several files, so that one can be read or sent at a time."""


def main(args: Sequence[str]) -> None:
    """Write the model of a checkpoint as a Hugging Face folder: configuration, weights, tokenizer and model card."""
    parser = OneLineParser(prog="python -m lightning_multinorm export", description=str(main.__doc__))
    parser.add_function_arguments(export)
    disable_progress_bar()
    export(**parser.parse_args(list(args)))


def export(
    ckpt_path: str,
    out: str,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    tokenizer: str | None = None,
) -> None:
    """Write the model of a checkpoint as a Hugging Face folder: configuration, weights, tokenizer and model card.

    Args:
        ckpt_path: a checkpoint (a file or a folder of shards), or the folder of a run: its newest whole checkpoint.
        out: the folder, which must be empty or not exist; it appears when it is whole.
        dtype: precision of the weights. Default: that of the checkpoint.
        tokenizer: folder of the tokenizer. Default: the one that the run has kept.

    Raises:
        UsageError: if the folder is not empty or cannot be written, or the checkpoint cannot be used.
    """
    folder = Path(out).resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"out={out} is there already, and is not overwritten; name an empty or a new folder")
    trained = load_trained(ckpt_path, tokenizer)
    if dtype is not None:
        _convert(trained.model, getattr(torch, dtype))
    try:
        with new_folder(folder) as temporary:
            _write(trained, temporary)
    except (OSError, SafetensorError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise UsageError(f"out={out} could not be written ({reason}); nothing was left there") from error
    print(f"Exported {trained.path} to {out}")


def _convert(model: LlamaForCausalLM, dtype: torch.dtype) -> None:
    limit = torch.finfo(dtype).max
    for name, parameter in model.named_parameters():
        if dtype == torch.float16 and parameter.abs().max() > limit:
            raise UsageError(f"dtype=float16 cannot hold {name}, which has entries above {limit:,.0f}; use bfloat16")
        parameter.data = parameter.data.to(dtype)


def _write(trained: Trained, folder: Path) -> None:
    model, tokenizer = trained.model, trained.tokenizer
    end, pad = model.config.eos_token_id, tokenizer.pad_token_id
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=end, pad_token_id=end if pad is None else pad
    )
    model.save_pretrained(folder, max_shard_size=LARGEST_FILE)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(model_card(trained), encoding="utf-8")
    mode = (folder / "README.md").stat().st_mode
    for file in folder.iterdir():
        file.chmod(mode)  # safetensors writes for the owner alone
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
