"""Sharded updates against whole ones, on 2, 3 and 4 processes."""

import pytest

from tests.distributed import world

SIZES = (2, 3, 4)


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, str]]:
    """What went wrong, by size of the world and name of the check."""
    return {size: world.run("shards", size, tmp_path_factory.mktemp(f"world{size}")) for size in SIZES}


@pytest.mark.parametrize(("size", "name"), [(size, name) for size in SIZES for name in world.names("shards", size)])
def test_shards_are_updated_as_the_whole(failures: dict[int, dict[str, str]], size: int, name: str) -> None:
    assert failures[size].get(name, failures[size].get("*", "was never run")) == ""
