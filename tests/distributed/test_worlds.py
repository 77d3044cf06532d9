"""Sharded updates against whole ones, on 2 to 4 processes: matrices (`shards`, `stateless`), a LLaMA (`models`)."""

import pytest

from tests.distributed import world

MODULES, SIZES = ("shards", "stateless", "models"), (2, 3, 4)
_CHECKS = [(module, size, name) for module in MODULES for size in SIZES for name in world.names(module, size)]
Failures = dict[tuple[str, int], dict[str, str]]


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> Failures:
    """What went wrong, by module, size of the world and name of the check."""
    return {
        (module, size): world.run(module, size, tmp_path_factory.mktemp(f"{module}{size}"))
        for module in MODULES
        for size in SIZES
    }


@pytest.mark.parametrize(("module", "size", "name"), _CHECKS)
def test_spread_over_ranks_is_as_whole(failures: Failures, module: str, size: int, name: str) -> None:
    found = failures[module, size]
    assert found.get(name, found.get("*", "was never run")) == ""
