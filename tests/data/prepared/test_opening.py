"""Opening a folder: the same validation as streamed text, no code from strangers, and refusals in one sentence."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from lightning_multinorm.data.errors import DataError
from lightning_multinorm.data.evaluation import held_out_rows
from lightning_multinorm.data.prepared.manifest import is_prepared
from lightning_multinorm.data.prepared.opening import open_prepared
from lightning_multinorm.data.tokenizer import load_tokenizer
from lightning_multinorm.data.vocabulary import Vocabulary

from .sources import SETTINGS, MemoryShards, prepare
from .test_batches import OPTIONS


@pytest.fixture
def folder(tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerBase) -> Path:
    prepare(tmp_path, texts, tokenizer)
    return tmp_path


@pytest.mark.parametrize("limit", [1, 100, 400])
def test_validation_is_the_same_as_of_the_texts(
    limit: int, folder: Path, texts: list[str], tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = open_prepared(str(folder), OPTIONS).held_out_rows(16, limit)
    expected = held_out_rows(MemoryShards(texts, held_out=True).texts(), Vocabulary(tokenizer), 16, limit)
    assert rows.dtype == expected.dtype and np.array_equal(rows, expected)


def test_more_validation_than_was_prepared_is_refused(folder: Path) -> None:
    with pytest.raises(DataError, match=r"data.validation_tokens is 401, but .* was prepared with 400"):
        open_prepared(str(folder), OPTIONS).held_out_rows(16, 401)


def test_nothing_held_out_is_no_row(tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerBase) -> None:
    prepare(tmp_path, list(MemoryShards(texts, held_out=False).texts()), tokenizer)
    assert open_prepared(str(tmp_path), OPTIONS).held_out_rows(16, 400).shape == (0, 17)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("data.tokenizer", "google-t5/t5-base"),
        ("data.vocab_size", 310),
        ("data.text_field", "body"),
        ("data.validation_files", "b.txt"),
        ("data.validation_fraction", 0.2),
    ],
)
def test_options_that_decided_the_tokens_must_be_the_same(folder: Path, name: str, value: Any) -> None:
    with pytest.raises(
        DataError, match=rf"{name} is {value!r}, but .* was prepared with {OPTIONS[name]!r}; set --{name}"
    ):
        open_prepared(str(folder), {**OPTIONS, name: value})


def test_a_part_is_refused_with_the_command_that_finishes_it(folder: Path) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["splits"]["train"]["complete"] = False
    path.write_text(json.dumps(manifest))
    command = rf"python -m lightning_multinorm prepare .*--data.source memory .*--shard_tokens 2000 --out {folder}"
    with pytest.raises(DataError, match=rf"is prepared in part only; finish it with: {command}"):
        open_prepared(str(folder), OPTIONS)


def test_too_little_text_is_refused(tmp_path: Path, texts: list[str], tokenizer: PreTrainedTokenizerBase) -> None:
    prepare(tmp_path, [], tokenizer)
    with pytest.raises(DataError, match="holds no text to train on"):
        open_prepared(str(tmp_path), OPTIONS)


def test_another_tokenizer_in_the_folder_is_refused(
    folder: Path, texts: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    load_tokenizer("bpe", texts, 310, tmp_path_factory.mktemp("other")).save_pretrained(folder / "tokenizer")
    with pytest.raises(DataError, match="tokenizer is not what the tokens were made with"):
        open_prepared(str(folder), OPTIONS).load_tokenizer()


def test_code_in_a_folder_is_not_run(folder: Path, tmp_path: Path) -> None:
    """A tokenizer that says it needs code of its own is loaded without it, or not at all."""
    ran = tmp_path / "ran"
    (folder / "tokenizer" / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Evil: ...\n")
    path = folder / "tokenizer" / "tokenizer_config.json"
    config = {**json.loads(path.read_text()), "auto_map": {"AutoTokenizer": [None, "evil.Evil"]}}
    path.write_text(json.dumps({**config, "tokenizer_class": "Evil"}))
    with pytest.raises(DataError):
        open_prepared(str(folder), OPTIONS).load_tokenizer()
    assert not ran.exists()


def test_a_folder_of_texts_is_not_prepared(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert is_prepared(str(folder))
    texts = tmp_path_factory.mktemp("texts")
    assert not is_prepared(str(texts)) and not is_prepared([str(folder)]) and not is_prepared("stdlib")
    assert SETTINGS.keys() > OPTIONS.keys()
