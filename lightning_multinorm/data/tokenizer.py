"""Tokenizers: trained here on the data itself, or loaded from the hub or a folder; and what their ids stand for.

Stands on `hub` and `errors`. Only fast tokenizers (those with a `tokenizers` backend) are supported.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lightning_multinorm.checkpoints.files import new_file
from lightning_multinorm.data.errors import DataError
from lightning_multinorm.data.hub import hub_is_reachable, reason

END_OF_TEXT = "<|endoftext|>"
TRAINING_BYTES = 16 * 2**20  # more text changes 4096 merges little and start-up time much
_RECIPE = "byte-level BPE 1"  # part of the cache key: raise the number when training changes


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/lightning_multinorm` or `~/.cache/lightning_multinorm`; not created by asking."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "lightning_multinorm"


def _beginning(documents: Iterable[str], size: int) -> list[str]:
    """The first documents that together reach `size` bytes."""
    chosen, total = [], 0
    for text in documents:
        chosen.append(text)
        total += len(text.encode("utf-8", "surrogatepass"))
        if total >= size:
            break
    return chosen


def _train_bpe(texts: list[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # all 256 bytes, so that no text is unknown
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _private_folder(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_mode & 0o077:
            folder.chmod(0o700)
    except OSError as error:
        raise DataError(
            f"the tokenizer cache {folder} cannot be used ({error.strerror}); set XDG_CACHE_HOME to a folder of yours."
        ) from None


def _cached_bpe(documents: Iterable[str], vocab_size: int, folder: Path) -> Tokenizer:
    texts = _beginning(documents, TRAINING_BYTES)
    if not texts:
        raise DataError(
            "data.tokenizer 'bpe' is trained on the training documents, but there are none; "
            "lower --data.validation_fraction or give more files in --data.source."
        )
    digest = hashlib.blake2b(f"{_RECIPE}\0{vocab_size}\0".encode(), digest_size=16)
    for text in texts:
        digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
    _private_folder(folder)
    path = folder / f"bpe-{vocab_size}-{digest.hexdigest()}.json"
    if path.exists():
        return Tokenizer.from_file(str(path))
    tokenizer = _train_bpe(texts, vocab_size)
    with new_file(path) as file:  # complete or absent, however many processes write it at once
        file.write(tokenizer.to_str().encode())
    return tokenizer


def _pretrained(name: str) -> PreTrainedTokenizerBase:
    local = os.path.isdir(name)
    offline = not local and not hub_is_reachable()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, local_files_only=local or offline)
    except Exception as error:  # transformers, tokenizers and the hub client share no base class
        why = "the Hugging Face hub cannot be reached and its cache has no copy" if offline else reason(error)
        raise DataError(
            f"data.tokenizer {name!r} could not be loaded ({why}): "
            "use --data.tokenizer bpe, which is trained on the data, or a local folder with a saved tokenizer."
        ) from None
    if not tokenizer.is_fast:
        raise DataError(f"data.tokenizer {name!r} has no fast version; use one with a tokenizer.json, or 'bpe'.")
    return tokenizer


def load_tokenizer(
    name: str, documents: Iterable[str], vocab_size: int, cache_dir: Path | None = None
) -> PreTrainedTokenizerBase:
    """Train a tokenizer on the data, or load one.

    Args:
        name: `"bpe"` for a byte-level BPE of the documents' first 16 MB, cached by their content; otherwise a name on
            the Hugging Face hub or a local folder. Code that comes with a tokenizer is never run.
        documents: Training documents; read for `"bpe"` only.
        vocab_size: Number of ids of `"bpe"`.
        cache_dir: Where trained tokenizers are kept; None for `cache_folder()`.

    Returns:
        A fast tokenizer with an end-of-text token.

    Raises:
        DataError: If it can neither be trained nor loaded.
    """
    if name != "bpe":
        return _pretrained(name)
    backend = _cached_bpe(documents, vocab_size, cache_dir or cache_folder())
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)


def plain_backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """A copy of a tokenizer that makes ids of text and adds nothing.

    A text that happens to spell a special token ("</s>") is text: otherwise a document could end itself, or produce
    ids such as T5's sentinels which the model has no row for.

    Args:
        tokenizer: A fast tokenizer.

    Returns:
        One whose settings nobody changes, so that threads can share it; longer documents than the tokenizer's model
        takes are not cut off.
    """
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return backend


def end_of_text_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that ends a document.

    Raises:
        DataError: If the tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise DataError("data.tokenizer has no end-of-text (eos) token; choose one that has, or 'bpe'.")
    return int(tokenizer.eos_token_id)


def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[int, str, bool]]:
    """Yields (id, token, is it special) without special sentinels being told apart from text by their spelling."""
    special = set(tokenizer.all_special_ids)
    special.update(id for id, token in tokenizer.added_tokens_decoder.items() if token.special)
    yield from ((id, token, id in special) for token, id in tokenizer.get_vocab().items())


def largest_text_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The largest id that text or its end can produce: one less than the rows a model's embedding needs.

    Added special tokens do not count: `t5-base` has 32 100 ids, but its sentinels never occur in text.
    """
    return max(end_of_text_id(tokenizer), *(id for id, _, special in _vocabulary(tokenizer) if not special))


def _is_byte_level(decoder: dict[str, Any] | None) -> bool:
    parts = (decoder or {}).get("decoders", [decoder or {}])
    return any(part.get("type") == "ByteLevel" for part in parts)


def _text_bytes(token: str, byte_level: bool) -> int:
    if byte_level:
        return len(token)  # its alphabet has one character per byte
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return 1  # sentencepiece's fallback for a byte
    return len(token.replace("▁", " ").encode())


def token_byte_lengths(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """UTF-8 bytes of the text that each id stands for, to turn nats per token into bits per byte.

    Exact for byte-level BPE: the ids of any text add up to `len(text.encode())`. With sentencepiece vocabularies the
    space put before a document counts as text, and what the normaliser removed does not.

    Args:
        tokenizer: A fast tokenizer.

    Returns:
        Shape (vocab,), int64; special tokens are 0.
    """
    byte_level = _is_byte_level(json.loads(tokenizer.backend_tokenizer.to_str())["decoder"])
    added = {id: token.content for id, token in tokenizer.added_tokens_decoder.items()}
    entries = list(_vocabulary(tokenizer))
    lengths = torch.zeros(1 + max(id for id, _, _ in entries), dtype=torch.int64)
    for id, token, special in entries:
        if not special:
            # An added token is spelled as in the text, not in the byte alphabet.
            lengths[id] = len(added[id].encode()) if id in added else _text_bytes(token, byte_level)
    return lengths


def identify(tokenizer: PreTrainedTokenizerBase) -> str:
    """A short hash of all that decides a text's ids and its end-of-text, to notice another tokenizer on resume."""
    settings = [json.loads(plain_backend(tokenizer).to_str()), end_of_text_id(tokenizer)]
    return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=8).hexdigest()
