"""What every test shares: a fixed seed, torch's global switches put back, and the golden cases of `reference/`."""

import os
from collections.abc import Iterator

import pytest
import torch
from reference.golden import SINKHORN, WHITENED, Golden, load

# The matrices here are small: threads would mostly wait for each other, and for those of the tests beside. Without the
# variable Lightning sets as many as there are cores, once a test trains under a strategy for several processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)

LONGEST = (
    "test_worlds.py",
    "test_readme.py",
    "test_faults.py",
    "test_resume.py",
    "test_strategies.py",
    "test_triton.py",
)
"""Files that take a minute or more: begun first, so that no core is left alone with them at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(params=SINKHORN)
def golden_sinkhorn(request: pytest.FixtureRequest) -> Golden:
    """SR-Sinkhorn of one golden gradient, after 1, 2, 5 or 50 iterations."""
    return load(request.param)


@pytest.fixture(params=WHITENED)
def golden_whitened(request: pytest.FixtureRequest) -> Golden:
    """√max(m, n) · U Vᵀ of one golden gradient."""
    return load(request.param)


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    """Seed before every test; torch's global switches are after it as they were."""
    torch.manual_seed(0)
    dtype, precision = torch.get_default_dtype(), torch.get_float32_matmul_precision()
    yield
    torch.set_default_dtype(dtype)
    torch.set_float32_matmul_precision(precision)
