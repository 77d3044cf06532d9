"""Sharded updates against whole ones, on 2 to 4 processes: matrices (`shards`, `stateless`), a LLaMA (`models`)."""

import itertools

import pytest

from tests.distributed import world
from tests.distributed.world import World

WORLDS = list(itertools.product(("shards", "stateless", "models"), (2, 3, 4)))
_CHECKS = [(found, name) for found in WORLDS for name in world.names(*found)]


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> dict[World, dict[str, str]]:
    """What went wrong, by world and name of the check."""
    return world.run(WORLDS, tmp_path_factory.mktemp("worlds"))


@pytest.mark.parametrize(
    ("where", "name"), _CHECKS, ids=lambda part: part if isinstance(part, str) else "-".join(map(str, part))
)
def test_spread_over_ranks_is_as_whole(failures: dict[World, dict[str, str]], where: World, name: str) -> None:
    found = failures[where]
    assert found.get(name, found.get("*", "was never run")) == ""
