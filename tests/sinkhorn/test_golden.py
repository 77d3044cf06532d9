"""SR-Sinkhorn by every path of the package against golden numbers in extended precision."""

from collections.abc import Callable

import pytest
import torch
from reference.golden import Golden
from torch import Tensor, nn
from torch.testing import assert_close

from lightning_multinorm import MultiNormGD, SinkGD, multi_normalize, sr_sinkhorn
from lightning_multinorm.norms import ColumnNorm, RowNorm
from lightning_multinorm.sinkhorn import reference, scalings, update_

Path = Callable[[Tensor, int], Tensor]


def _by_norms(G: Tensor, iterations: int) -> Tensor:
    return multi_normalize(G, [RowNorm(), ColumnNorm()], iterations)


def _by_scalings(G: Tensor, iterations: int) -> Tensor:
    r, c, _ = scalings(G, iterations)
    return (r.unsqueeze(-1) * G) * c.unsqueeze(-2)


def _by_fused_update(G: Tensor, iterations: int) -> Tensor:
    weight = torch.zeros_like(G)
    update_([weight], [G], lr=-0.25, iterations=iterations)
    return weight / 0.25


def _by_eager_scalings(G: Tensor, iterations: int) -> Tensor:
    r, c, _ = scalings(G, iterations, kernel="eager")
    return (r.unsqueeze(-1) * G) * c.unsqueeze(-2)


def _by_eager(G: Tensor, iterations: int) -> Tensor:
    return sr_sinkhorn(G, iterations, kernel="eager")


def _by_sinkgd(G: Tensor, iterations: int) -> Tensor:
    weight = nn.Parameter(torch.zeros_like(G))
    weight.grad = G.clone()
    SinkGD([("layer.weight", weight)], lr=0.5, matrix_lr_scale=0.25, iterations=iterations).step()
    return -weight.detach() / 0.125


def _by_multinormgd(G: Tensor, iterations: int) -> Tensor:
    weight = nn.Parameter(torch.zeros_like(G))
    weight.grad = G.clone()
    norms = [RowNorm(), ColumnNorm()]
    MultiNormGD([("layer.weight", weight)], norms, lr=0.5, matrix_lr_scale=0.25, iterations=iterations).step()
    return -weight.detach() / 0.125


_PATHS: dict[str, Path] = {
    "sr_sinkhorn": sr_sinkhorn,
    "multi_normalize": _by_norms,
    "eager": _by_eager,
    "eager scalings": _by_eager_scalings,
    "scalings": _by_scalings,
    "update_": _by_fused_update,
    "SinkGD": _by_sinkgd,
    "MultiNormGD": _by_multinormgd,
}


@pytest.mark.parametrize("path", _PATHS.values(), ids=_PATHS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_every_path_is_golden(path: Path, dtype: torch.dtype, tolerance: float, golden_sinkhorn: Golden) -> None:
    result = path(golden_sinkhorn.gradient.to(dtype), golden_sinkhorn.iterations)
    assert result.dtype is dtype
    assert_close(result.double(), golden_sinkhorn.expected, rtol=tolerance, atol=0)


def test_the_definition_is_golden(golden_sinkhorn: Golden) -> None:
    result = reference.sr_sinkhorn(golden_sinkhorn.gradient, golden_sinkhorn.iterations)
    assert_close(result, golden_sinkhorn.expected, rtol=1e-10, atol=0)


def test_the_definition_works_in_float64_whatever_it_gets() -> None:
    G = torch.randn(5, 7).bfloat16()
    assert torch.equal(reference.sr_sinkhorn(G), reference.sr_sinkhorn(G.double()))
