"""Tokenizers: round trip, exact byte counts, the cache, and what happens without the hub."""

import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lightning_multinorm.data import tokenizer as module
from lightning_multinorm.data.errors import DataError
from lightning_multinorm.data.tokenizer import (
    END_OF_TEXT,
    end_of_text_id,
    identify,
    largest_text_id,
    load_tokenizer,
    plain_backend,
    token_byte_lengths,
)

from .texts import make_texts

AWKWARD = [
    "",
    " ",
    "\n\n\t",
    "größe 行列 🙂🙂",
    "a" * 1000,
    f"x{END_OF_TEXT}y",
    "\x00\x7f\x80 \u2028",
    "  two  spaces ",
]


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    encodings = plain_backend(tokenizer).encode_batch_fast(texts, add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


def random_unicode(seed: int) -> str:
    rng = random.Random(seed)
    ranges = [(0, 0x7F), (0x80, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF)]
    return "".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randint(0, 200)))


def sentencepiece_like(special: list[str]) -> PreTrainedTokenizerFast:
    """Metaspace BPE with byte fallback, as in LLaMA 2; `special` are T5's kind of sentinels."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    options = {"special_tokens": ["<unk>", "</s>"], "initial_alphabet": ["▁"], "show_progress": False}
    trained.train_from_iterator(["the sink row column norm"] * 3, trainers.BpeTrainer(vocab_size=400, **options))
    model = json.loads(trained.to_str())["model"]
    for byte in range(256):  # sentencepiece keeps them in the vocabulary itself; the trainer here cannot
        model["vocab"][f"<0x{byte:02X}>"] = len(model["vocab"])
    merges = [tuple(pair) for pair in model["merges"]]
    backend = Tokenizer(models.BPE(model["vocab"], merges, unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = trained.pre_tokenizer
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    wrapped.add_tokens([AddedToken(token, special=True) for token in special], special_tokens=True)
    return wrapped


# -- byte-level BPE --------------------------------------------------------------------------------------------------


def test_round_trip_and_vocabulary(tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(tokenizer) == 300
    texts = [*AWKWARD, *make_texts(20, seed=9)]
    assert [tokenizer.decode(ids) for ids in encode(tokenizer, texts)] == texts


@pytest.mark.parametrize("seed", range(20))
def test_byte_lengths_add_up_to_the_text(tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
    lengths = token_byte_lengths(tokenizer)
    assert (lengths.dtype, lengths.shape) == (torch.int64, (300,))
    for text in [*AWKWARD, random_unicode(seed), make_texts(1, seed)[0]]:
        (ids,) = encode(tokenizer, [text])
        assert int(lengths[ids].sum()) == len(text.encode())


def test_end_of_text_is_an_id_that_text_cannot_spell(tokenizer: PreTrainedTokenizerBase) -> None:
    end = end_of_text_id(tokenizer)
    assert tokenizer.convert_ids_to_tokens(end) == END_OF_TEXT
    assert token_byte_lengths(tokenizer)[end] == 0
    assert end not in encode(tokenizer, [f"a{END_OF_TEXT}b"])[0]


def test_encode_adds_nothing_and_cuts_nothing(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "model_max_length", 8)
    long, short = encode(tokenizer, ["sink " * 500, "sink"])
    assert len(long) > 8 and len(short) >= 1
    assert tokenizer.decode(long) == "sink " * 500


def test_added_tokens_count_their_own_spelling(texts: list[str], tmp_path: Path) -> None:
    tokenizer = load_tokenizer("bpe", texts, 300, tmp_path)
    tokenizer.add_tokens(["größe 🙂"])
    text = "a größe 🙂 b"
    assert int(token_byte_lengths(tokenizer)[encode(tokenizer, [text])[0]].sum()) == len(text.encode())


# -- others ----------------------------------------------------------------------------------------------------------


def test_sentencepiece_counts_spaces_and_fallback_bytes() -> None:
    tokenizer = sentencepiece_like(special=[])
    lengths = token_byte_lengths(tokenizer)
    vocabulary = tokenizer.get_vocab()
    assert lengths[vocabulary["▁sink"]] == 5
    assert lengths[vocabulary["<0x0A>"]] == 1
    assert lengths[vocabulary["</s>"]] == lengths[vocabulary["<unk>"]] == 0
    for text in ("the sink row", "sink 🙂\n row"):
        (ids,) = encode(tokenizer, [text])
        assert int(lengths[ids].sum()) == 1 + len(text.encode())  # with the space it puts before the text


def test_sentinels_do_not_enlarge_the_vocabulary() -> None:
    plain, sentinels = sentencepiece_like([]), sentencepiece_like(["<extra_0>", "<extra_1>"])
    assert len(sentinels) == len(plain) + 2
    assert largest_text_id(sentinels) == largest_text_id(plain) == len(plain) - 1
    assert max(encode(sentinels, ["the <extra_1> sink </s>"])[0]) <= largest_text_id(sentinels)
    assert token_byte_lengths(sentinels)[-2:].tolist() == [0, 0]


def test_end_of_text_counts_as_text_id(tokenizer: PreTrainedTokenizerBase) -> None:
    assert largest_text_id(tokenizer) == 299
    tokenizer = sentencepiece_like(["<end>"])
    tokenizer.eos_token = "<end>"
    assert largest_text_id(tokenizer) == end_of_text_id(tokenizer) == len(tokenizer) - 1


def test_tokenizer_without_end_of_text_is_refused() -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    with pytest.raises(DataError, match="no end-of-text"):
        end_of_text_id(bare)


def test_local_folder_gives_the_same_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str], tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(str(tmp_path), iter(()), vocab_size=0)
    assert encode(again, texts) == encode(tokenizer, texts)
    assert identify(again) == identify(tokenizer) != identify(sentencepiece_like([]))


def test_slow_tokenizer_is_refused(tmp_path: Path) -> None:
    ByT5Tokenizer().save_pretrained(tmp_path)
    with pytest.raises(DataError, match="no fast version"):
        load_tokenizer(str(tmp_path), iter(()), vocab_size=0)


def test_without_hub_one_sentence(no_hub: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    no_hub("tokenizer")
    with pytest.raises(DataError, match=r"'no/such' could not be loaded.*--data.tokenizer bpe") as caught:
        load_tokenizer("no/such", iter(()), vocab_size=0)
    assert caught.value.__suppress_context__ and "\n" not in str(caught.value)


def test_code_from_the_hub_is_never_trusted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: dict[str, object] = {}

    def from_pretrained(name: str, **options: object) -> None:
        seen.update(options)
        raise OSError("stop here")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", from_pretrained)
    with pytest.raises(DataError):
        load_tokenizer(str(tmp_path), iter(()), vocab_size=0)
    assert seen == {"trust_remote_code": False, "local_files_only": True}


# -- the cache -------------------------------------------------------------------------------------------------------


def test_cache_is_private_and_hit(texts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_tokenizer("bpe", texts, 300)
    folder = module.cache_folder()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert [path.suffix for path in folder.iterdir()] == [".json"]  # no temporary file is left
    monkeypatch.setattr(module, "_train_bpe", lambda *_: pytest.fail("trained again"))
    assert encode(load_tokenizer("bpe", texts, 300), texts) == encode(first, texts)


def test_an_open_cache_folder_is_closed(texts: list[str], tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    load_tokenizer("bpe", texts, 300, tmp_path)
    assert tmp_path.stat().st_mode & 0o777 == 0o700


def test_other_content_or_size_is_another_tokenizer(texts: list[str], tmp_path: Path) -> None:
    for content, size in [(texts, 300), (texts, 310), ([*texts, "more"], 300), (["ab", "c"], 300), (["a", "bc"], 300)]:
        load_tokenizer("bpe", content, size, tmp_path)
    assert len(list(tmp_path.iterdir())) == 5


def test_text_behind_the_training_part_does_not_count(
    texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TRAINING_BYTES", 200)
    read: list[str] = []

    def documents() -> Iterator[str]:
        for text in texts:
            read.append(text)
            yield text

    load_tokenizer("bpe", documents(), 300, tmp_path)
    size = len("".join(read).encode())
    assert 200 <= size < 200 + len(read[-1].encode()) + 1
    load_tokenizer("bpe", [*read, "anything"], 300, tmp_path)
    assert len(list(tmp_path.iterdir())) == 1


def test_two_processes_at_once(texts: list[str], tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from lightning_multinorm.data.tokenizer import *\n"
        "t = load_tokenizer('bpe', sys.argv[2:], 300, Path(sys.argv[1])); print(identify(t))"
    )
    command = [sys.executable, "-c", code, str(tmp_path), *texts]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = {process.communicate()[0].strip() for process in both}
    assert outputs == {identify(load_tokenizer("bpe", texts, 300, tmp_path))}
    assert len(list(tmp_path.iterdir())) == 1


def test_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        load_tokenizer("bpe", ["text"], 300, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_no_documents_and_unusable_cache_are_explained(texts: list[str], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there are none.*--data.validation_fraction"):
        load_tokenizer("bpe", [], 300, tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="XDG_CACHE_HOME"):
        load_tokenizer("bpe", texts, 300, tmp_path / "file")
