"""Sources: the held-out split, shard order, and every document exactly once over ranks and workers."""

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader

from lightning_multinorm.data import sources
from lightning_multinorm.data.errors import DataError
from lightning_multinorm.data.sources import is_held_out, open_corpus, rank_share, shuffle_shards

from .texts import make_texts, write_shards

# Whether torch finds the workers too many depends on the machine, not on what is tested.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


def read(documents: IterableDataset) -> list[str]:
    return [example["text"] for example in documents]


def read_with_workers(documents: IterableDataset, workers: int) -> list[str]:
    return [example["text"] for example in DataLoader(documents, batch_size=None, num_workers=workers)]


# -- the held-out split ----------------------------------------------------------------------------------------------


def test_split_by_document_is_disjoint_and_complete(shards: Path, texts: list[str]) -> None:
    corpus = open_corpus(str(shards), validation_fraction=0.2)
    train, held_out = read(corpus.train), read(corpus.held_out)
    assert Counter(train + held_out) == Counter(texts)
    assert 20 <= len(held_out) <= 60  # 40 expected of 200


def test_split_is_the_same_in_another_process(texts: list[str]) -> None:
    code = (
        "import sys; from lightning_multinorm.data.sources import is_held_out\n"
        "print([is_held_out(text, 0.2) for text in sys.argv[1:]])"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "123", "PYTHONPATH": os.pathsep.join(sys.path)}
    out = subprocess.run(
        [sys.executable, "-c", code, *texts], env=environment, capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == str([is_held_out(text, 0.2) for text in texts])


def test_split_is_pinned() -> None:
    # Another hash would move documents across the border between a checkpoint and its resume.
    assert [i for i in range(16) if is_held_out(f"document {i}", 0.5)] == [0, 1, 2, 6, 7, 9, 11, 15]


def test_copies_land_on_the_same_side(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_shards(tmp_path / name, make_texts(60, seed=3), 2)
    corpus = open_corpus([str(tmp_path / "a"), str(tmp_path / "b")], validation_fraction=0.3)
    assert set(read(corpus.held_out)) and not set(read(corpus.train)) & set(read(corpus.held_out))


def test_validation_files_leave_the_source_whole(shards: Path, texts: list[str], tmp_path: Path) -> None:
    (tmp_path / "held.txt").write_text("held out")
    corpus = open_corpus(str(shards), validation_files=str(tmp_path / "held.txt"), validation_fraction=0.5)
    assert Counter(read(corpus.train)) == Counter(texts)
    assert read(corpus.held_out) == ["held out"]


def test_kinds_can_be_mixed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("plain")
    (tmp_path / "b.jsonl").write_text('{"text": "json", "extra": 1}\n')
    corpus = open_corpus(str(tmp_path), validation_files=str(tmp_path / "a.txt"))
    assert read(corpus.train) == ["plain", "json"]


def test_fingerprint_follows_the_files_and_not_their_place(tmp_path: Path) -> None:
    fingerprints = {}
    for name, seed in (("here", 0), ("there", 0), ("other", 1)):
        (tmp_path / name).mkdir()
        write_shards(tmp_path / name, make_texts(20, seed), 2)
        fingerprints[name] = open_corpus(str(tmp_path / name)).fingerprint
    assert fingerprints["here"] == fingerprints["there"] != fingerprints["other"]
    assert open_corpus(str(tmp_path / "here"), validation_fraction=0.5).fingerprint != fingerprints["here"]


def test_wrong_text_field_fails_at_once(shards: Path) -> None:
    with pytest.raises(DataError, match=r"'content' \(found: text, timestamp, url\)"):
        open_corpus(str(shards), text_field="content")


def test_standard_library_is_a_source() -> None:
    corpus = open_corpus("stdlib", validation_fraction=0.02)
    held_out = read(corpus.held_out)
    assert corpus.train.num_shards > 300
    assert 1 <= len(held_out) < 60
    assert not set(held_out) & set(read(corpus.train))


# -- order and shares ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[4, 5])
def stream(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[IterableDataset, list[str]]:
    """C4-shaped shards of unequal length, and their documents."""
    folder = tmp_path_factory.mktemp("shards")
    texts = make_texts(83, seed=request.param)
    write_shards(folder, texts, request.param)
    (folder / "held.txt").write_text("held out")
    corpus = open_corpus(str(folder / "*.json.gz"), validation_files=str(folder / "held.txt"))
    return corpus.train, texts


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("epoch", [0, 1])
def test_every_document_once_per_epoch(
    stream: tuple[IterableDataset, list[str]], world_size: int, workers: int, epoch: int
) -> None:
    documents, texts = stream
    seen: list[str] = []
    for rank in range(world_size):
        share = rank_share(shuffle_shards(documents, seed=7), rank, world_size)
        share.set_epoch(epoch)
        own = read_with_workers(share, workers)
        assert own  # no rank goes without
        seen += own
    assert Counter(seen) == Counter(texts)


def test_few_shards_are_shared_document_by_document(stream: tuple[IterableDataset, list[str]]) -> None:
    for world_size in (2, 3):
        sizes = [len(read(rank_share(stream[0], rank, world_size))) for rank in range(world_size)]
        assert max(sizes) - min(sizes) <= 1  # dealt whole, 5 shards would give one rank much more of each epoch


def test_many_shards_are_dealt_whole(tmp_path: Path) -> None:
    texts = make_texts(70, seed=2)
    for i, text in enumerate(texts):
        (tmp_path / f"{i:02d}.txt").write_text(text, encoding="utf-8")
    documents = open_corpus(str(tmp_path), validation_files=str(tmp_path / "00.txt")).train
    shares = [rank_share(documents, rank, 3) for rank in range(3)]
    assert [share.num_shards for share in shares] == [24, 23, 23]  # no rank opens another one's files
    assert Counter(text for share in shares for text in read(share)) == Counter(texts)


def test_shard_order_depends_on_seed_and_epoch_alone(stream: tuple[IterableDataset, list[str]]) -> None:
    documents, texts = stream

    def order(seed: int, epoch: int) -> list[str]:
        share = rank_share(shuffle_shards(documents, seed), 0, 1)
        share.set_epoch(epoch)
        return read(share)

    orders = {(seed, epoch): order(seed, epoch) for seed in range(3) for epoch in range(3)}
    assert orders[1, 2] == order(1, 2)
    assert len({tuple(order) for order in orders.values()}) >= 5  # few shards have few orders
    # Within a shard documents keep their order, and shards are not interleaved.
    first = orders[0, 0]
    count = documents.num_shards
    shard_of = [texts.index(text) % count for text in first]
    assert sum(a != b for a, b in pairwise(shard_of)) == count - 1


def test_epoch_of_one_share_does_not_move_another(stream: tuple[IterableDataset, list[str]]) -> None:
    shuffled = shuffle_shards(stream[0], seed=0)
    before = read(rank_share(shuffled, 0, 1))
    rank_share(shuffled, 0, 1).set_epoch(5)
    assert read(rank_share(shuffled, 0, 1)) == before


# -- C4 --------------------------------------------------------------------------------------------------------------


def test_c4_without_hub_names_both_ways_out(no_hub: Callable[[str], None]) -> None:
    no_hub("sources")
    with pytest.raises(DataError, match=r"--data.source stdlib .*c4/en/\*\.json\.gz") as caught:
        open_corpus("c4")
    assert caught.value.__cause__ is None
    assert "\n" not in str(caught.value)


def test_c4_that_fails_later_says_why_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("Too many requests.\nRead the documentation.")

    monkeypatch.setattr(sources, "hub_is_reachable", lambda: True)
    monkeypatch.setattr(sources, "load_dataset", fail)
    with pytest.raises(DataError, match=r"failed \(ConnectionError: Too many requests\): train on") as caught:
        open_corpus("c4")
    assert caught.value.__suppress_context__


def test_c4_asks_for_its_own_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def load(*args: Any, split: str, streaming: bool) -> IterableDataset:
        asked.append((*args, split, streaming))
        return Dataset.from_list([{"text": split, "timestamp": "t", "url": "u"}]).to_iterable_dataset()

    monkeypatch.setattr(sources, "hub_is_reachable", lambda: True)
    monkeypatch.setattr(sources, "load_dataset", load)
    corpus = open_corpus("c4")
    assert asked == [("allenai/c4", "en", "train", True), ("allenai/c4", "en", "validation", True)]
    assert list(corpus.train) == [{"text": "train"}]
    assert list(corpus.held_out) == [{"text": "validation"}]
