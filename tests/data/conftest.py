"""Texts, C4-shaped shards and a tokenizer of 300 ids for the tests of `lightning_multinorm.data`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from lightning_multinorm.data import TextDataModule
from lightning_multinorm.data.tokenizer import load_tokenizer

from .texts import make_texts, write_shards


@pytest.fixture(autouse=True)
def own_caches(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read from or left in the home directory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return make_texts(200)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """Folder of five C4-shaped shards with all of `texts`."""
    folder = tmp_path_factory.mktemp("c4")
    write_shards(folder, texts, 5)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> PreTrainedTokenizerBase:
    return load_tokenizer("bpe", texts, vocab_size=300, cache_dir=tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes a module believe that the hub cannot be reached, whether or not it can be from here."""

    def cut(module: str) -> None:
        monkeypatch.setattr(f"lightning_multinorm.data.{module}.hub_is_reachable", lambda: False)

    return cut


@pytest.fixture
def make_data(shards: Path) -> Any:
    """Builds data modules over `shards`, small unless told otherwise."""

    def make(**options: Any) -> TextDataModule:
        small = {"vocab_size": 300, "sequence_length": 16, "batch_size": 4, "validation_fraction": 0.1}
        return TextDataModule(**{"source": str(shards), **small, **options})

    return make
