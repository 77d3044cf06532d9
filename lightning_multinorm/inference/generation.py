"""``python -m lightning_multinorm generate``: text from a checkpoint, as its tokens come."""

import math
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from lightning_multinorm.arguments import OneLineParser
from lightning_multinorm.data.tokenizer import end_of_text_id, plain_backend
from lightning_multinorm.errors import UsageError
from lightning_multinorm.inference.trained import load_trained


def main(args: Sequence[str]) -> None:
    """Sample text from a checkpoint, and print it as its tokens come."""
    parser = OneLineParser(prog="python -m lightning_multinorm generate", description=str(main.__doc__))
    parser.add_function_arguments(generate)
    config = parser.parse_args(list(args))
    try:
        generate(**config)
    except KeyboardInterrupt:
        _write("\n")
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # the reader has enough, as ``head`` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left is flushed at the exit


def generate(
    ckpt_path: str,
    prompt: str = "",
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int | None = 50,
    top_p: float = 1.0,
    seed: int = 0,
    tokenizer: str | None = None,
    device: str = "auto",
) -> None:
    """Sample text from a checkpoint, and print it as its tokens come.

    The prompt is read as the beginning of a document, so after an end-of-text token, as in training. The text ends with
    the document, after max_new_tokens, or where the model's positions do, which is said.

    Args:
        ckpt_path: a checkpoint (a file or a folder of shards), or the folder of a run: its newest whole checkpoint.
        prompt: the text to go on from, or - to read it from the standard input. Default: the beginning of any document.
        max_new_tokens: the most tokens to sample.
        temperature: divides the logits; 0 takes the most probable token each time.
        top_k: sample from so many most probable tokens alone; null for all.
        top_p: sample from the fewest most probable tokens that have this probability together.
        seed: of the sampling.
        tokenizer: folder of the tokenizer. Default: the one that the run has kept.
        device: auto (a GPU if there is one), cpu, cuda, cuda:1, ...

    Raises:
        UsageError: for a value out of range, a prompt that is too long or no text, or a checkpoint that cannot be used.
    """
    _check(max_new_tokens, temperature, top_k, top_p)
    place = _device(device)
    text = _read_prompt(prompt)
    trained = load_trained(ckpt_path, tokenizer)
    model, own = trained.model, trained.tokenizer
    torch.nn.Module.to(model, place)
    ids = prompt_ids(own, text, after_end=trained.state.get("TextDataModule", {}).get("packing") != "paper")
    longest = model.config.max_position_embeddings
    if len(ids) >= longest:
        raise UsageError(f"the prompt has {len(ids)} tokens, but the model's positions end at {longest}; shorten it")
    torch.manual_seed(seed)
    sys.stdout.write(text)
    config = _sampling(model, own, min(max_new_tokens, longest - len(ids)), temperature, top_k, top_p)
    new = stream(model, own, ids, config, _write)
    _write("\n")
    if len(new) == longest - len(ids) < max_new_tokens and new[-1] != config.eos_token_id:
        print(f"The model's positions end here, at {longest} tokens.", file=sys.stderr)


def stream(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    config: GenerationConfig,
    write: Callable[[str], object],
) -> list[int]:
    """Go on from some ids, and write the text as it comes, in whole characters.

    Args:
        model: of transformers, on any device.
        tokenizer: makes text of ids.
        ids: at least one.
        config: how to sample.
        write: called with every new piece of text.

    Returns:
        The new ids.
    """
    inputs = torch.tensor([ids], device=model.device)
    streamer = TextPieces(tokenizer, write)
    with torch.inference_mode():
        output = model.generate(
            inputs, attention_mask=torch.ones_like(inputs), generation_config=config, streamer=streamer
        )
    new: list[int] = output[0, len(ids) :].tolist()
    return new


class TextPieces(BaseStreamer):
    """Writes each token's text, held back while the bytes of a character are not complete.

    transformers' own `TextStreamer` holds every word back until the next one begins.

    Args:
        tokenizer: makes text of ids; special tokens are left out.
        write: called with every piece.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], object]) -> None:
        self.tokenizer = tokenizer
        self.write = write
        self._ids: list[int] = []
        self._written = 0
        self._pieces: DecodeStream | None = None

    def put(self, value: Tensor) -> None:
        """The prompt at first, which is not written, then every new token."""
        ids = value.flatten().tolist()
        self._ids += ids
        if self._pieces is None:
            self._pieces = DecodeStream(ids=ids, skip_special_tokens=True)
            self._written = len(self._text())
            return
        for id in ids:
            if piece := self._pieces.step(self.tokenizer.backend_tokenizer, id):
                self._written += len(piece)
                self.write(piece)

    def end(self) -> None:
        """What is left: bytes of a character that were not completed."""
        self.write(self._text()[self._written :])

    def _text(self) -> str:
        return self.tokenizer.backend_tokenizer.decode(self._ids, skip_special_tokens=True)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str, after_end: bool) -> list[int]:
    """The ids that a text begins with, as in training: nothing added but, ``after_end``, an end-of-text before it."""
    ids: list[int] = plain_backend(tokenizer).encode(text, add_special_tokens=False).ids
    return [end_of_text_id(tokenizer), *ids] if after_end or not ids else ids


def _sampling(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float,
) -> GenerationConfig:
    known = set(tokenizer.get_vocab().values())
    unknown = [id for id in range(model.config.vocab_size) if id not in known]
    end = end_of_text_id(tokenizer)
    how = {"do_sample": True, "temperature": temperature, "top_k": top_k or 0, "top_p": top_p} if temperature else {}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=end,
        pad_token_id=end,
        suppress_tokens=unknown or None,  # rows of the embedding that no token has
        **how,
    )


def _check(max_new_tokens: int, temperature: float, top_k: int | None, top_p: float) -> None:
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if not 0 <= temperature < math.inf:
        raise UsageError(f"temperature={temperature} must be 0 or more; 0 takes the most probable token each time")
    if top_k is not None and top_k < 1:
        raise UsageError(f"top_k={top_k} must be at least 1, or null for all tokens")
    if not 0 < top_p <= 1:
        raise UsageError(f"top_p={top_p} must be above 0 and at most 1, which is all tokens")


def _device(name: str) -> torch.device:
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device={name} is not usable ({str(error).splitlines()[0]}); use auto or cpu") from None
    return device


def _read_prompt(prompt: str) -> str:
    try:
        given = sys.stdin.buffer.read() if prompt == "-" else prompt.encode("utf-8", "surrogateescape")
        return given.decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"the prompt is no text: byte {error.start} is not UTF-8") from None


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
