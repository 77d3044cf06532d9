"""Which path computes: chosen by device and dtype, forced by argument, and said aloud when the fast one is missing."""

import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lightning_multinorm import SinkGD, sr_sinkhorn
from lightning_multinorm.batch import Batch
from lightning_multinorm.sinkhorn import cpu, eager, reference, select, update_all_


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    select._fastest.cache_clear()
    yield
    select._fastest.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numba_on_the_cpu(dtype: torch.dtype) -> None:
    assert select.path("auto", torch.ones(2, 2, dtype=dtype)) is cpu


def test_plain_pytorch_for_float64_and_other_devices() -> None:
    assert select.path("auto", torch.ones(2, 2, dtype=torch.float64)) is eager
    assert select.path("auto", torch.ones(2, 2), torch.ones(2, 2, dtype=torch.float64)) is eager
    assert select.path("auto", torch.ones(2, 2, device="meta")) is eager


def test_what_is_asked_for() -> None:
    assert select.path("eager", torch.ones(2, 2)) is eager
    assert select.path("numba", torch.ones(2, 2)) is cpu


def test_without_numba_it_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "_installed", lambda package: False)
    G = torch.randn(3, 4)
    with pytest.warns(UserWarning, match=r"numba is not installed.*pip install 'lightning-multinorm\[numba\]'"):
        assert select.path("auto", G) is eager
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sr_sinkhorn(G)
        select._fastest.cache_clear()
        sr_sinkhorn(G, kernel="eager")


def test_a_kernel_that_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = [("layer.weight", nn.Parameter(torch.randn(3, 4)))]
    with pytest.raises(ValueError, match="kernel='cuda' is unknown; use one of auto, eager, numba, triton"):
        SinkGD(parameters, kernel="cuda")  # type: ignore[arg-type]
    monkeypatch.setattr(select, "_installed", lambda package: False)
    with pytest.raises(ModuleNotFoundError, match="kernel='numba' needs numba: pip install"):
        SinkGD(parameters, kernel="numba")


@pytest.mark.parametrize(("kernel", "module"), [("eager", eager), ("numba", cpu)])
def test_the_optimizer_uses_what_is_asked_for(
    kernel: select.Kernel, module: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(module, "update_", lambda *args, **kwargs: calls.append(kwargs["iterations"]))
    monkeypatch.delattr(module, "update_all_", raising=False)
    weight = nn.Parameter(torch.randn(3, 4))
    weight.grad = torch.randn(3, 4)
    SinkGD([("layer.weight", weight)], iterations=3, kernel=kernel).step()
    assert calls == [3]


@pytest.mark.parametrize("kernel", ["auto", "eager"])
def test_batches_of_several_dtypes_take_each_its_path(kernel: select.Kernel) -> None:
    """Float64 is none of Numba's, so these go one by one, in the order of what is returned."""
    batches = []
    for dtype, iterations, observe in ((torch.float64, 2, True), (torch.float32, 3, False), (torch.float32, 1, True)):
        W, G = torch.zeros(5, 7, dtype=dtype), torch.randn(5, 7, dtype=dtype)
        batches.append(Batch([W], [G], -1.0, 0.0, iterations, observe=observe))
    found = update_all_(batches, kernel=kernel)
    assert [None if seen is None else seen.residuals.shape[-2] for seen in found] == [2, None, 1]
    for batch in batches:
        expected = reference.sr_sinkhorn(batch.gradients[0], batch.iterations)
        assert_close(batch.weights[0].double(), expected, rtol=1e-5, atol=1e-6)
