"""The mapped stream: rows as `packing` cuts them, across shards of any size, and files that are not what they were."""

import pickle
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_multinorm.data.errors import DataError
from lightning_multinorm.data.packing import IGNORED, pack_all
from lightning_multinorm.data.prepared.manifest import Manifest
from lightning_multinorm.data.prepared.stream import TokenStream
from lightning_multinorm.data.prepared.writer import ShardWriter

END = 7


def written(folder: Path, tokens: np.ndarray, borders: list[int], dtype: str = "uint16") -> Manifest:
    """Tokens in shards that end at borders."""
    manifest = Manifest({}, "", "", END, dtype)
    for number, (start, end) in enumerate(pairwise([0, *borders, len(tokens)])):
        with ShardWriter(folder / f"train-{number:05}.bin") as writer:
            writer.add(tokens[start:end].astype(manifest.token_type), 1, 0)
            manifest.splits["train"].shards.append(writer.close((0, number)))
    return manifest


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_rows_are_those_of_packing(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("stream")
    count, length = data.draw(st.integers(2, 60)), data.draw(st.integers(1, 70))
    borders = sorted(data.draw(st.sets(st.integers(1, count - 1), max_size=5)))
    dtype = data.draw(st.sampled_from(["uint16", "uint32"]))
    tokens = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, count, endpoint=True)
    stream = TokenStream(folder, written(folder, tokens, borders, dtype), "train")
    expected = pack_all(tokens, length)
    assert (len(stream), stream.row_count(length)) == (count, len(expected))
    numbers = np.array(data.draw(st.lists(st.integers(0, len(expected) - 1), min_size=1, max_size=8)))
    rows = stream.rows(numbers, length)
    assert rows.dtype == dtype
    assert np.array_equal(rows, np.where(expected == IGNORED, END, expected)[numbers])
    assert np.array_equal(stream.beginning(length), tokens[:length])


def test_another_process_maps_the_files_anew(tmp_path: Path) -> None:
    tokens = np.arange(50_000)
    stream = TokenStream(tmp_path, written(tmp_path, tokens, [10_000]), "train")
    pickled = pickle.dumps(stream)
    assert len(pickled) < 2000
    assert np.array_equal(pickle.loads(pickled).beginning(20_000), tokens[:20_000])


@pytest.mark.parametrize("change", [-1, 2])
def test_a_file_of_another_size_is_named(tmp_path: Path, change: int) -> None:
    manifest = written(tmp_path, np.arange(100), [50])
    path = tmp_path / "train-00001.bin"
    path.write_bytes((path.read_bytes() + b"..")[: 100 + change])
    with pytest.raises(DataError, match=rf"train-00001.bin has {100 + change} bytes, not the 100 it was written with"):
        TokenStream(tmp_path, manifest, "train")
    path.unlink()
    with pytest.raises(DataError, match=r"train-00001.bin cannot be read \(No such file"):
        TokenStream(tmp_path, manifest, "train")


def test_maps_keep_no_file_open(tmp_path: Path) -> None:
    manifest = written(tmp_path, np.arange(100), list(range(10, 100, 10)))
    before = len(list(Path("/proc/self/fd").iterdir()))
    stream = TokenStream(tmp_path, manifest, "train")
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert stream.beginning(100)[-1] == 99


def test_no_shard_is_an_empty_stream(tmp_path: Path) -> None:
    stream = TokenStream(tmp_path, Manifest({}, "", "", END, "uint16"), "validation")
    assert (len(stream), len(stream.beginning(5))) == (0, 0)
