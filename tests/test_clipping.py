"""The norm of all gradients of whole parameters; spread ones are in `distributed`."""

import math

import pytest
import torch
from torch import nn

from lightning_multinorm.layouts.clipping import clip_, gradient_norm, nonfinite_entries


def parameters(*gradients: torch.Tensor | None) -> list[nn.Parameter]:
    made = []
    for gradient in gradients:
        made.append(nn.Parameter(torch.zeros(2, 3) if gradient is None else torch.zeros(gradient.shape).to(gradient)))
        made[-1].grad = gradient
    return made


@pytest.mark.parametrize("largest", [0.5, 100.0])
def test_clipping_is_torchs(largest: float) -> None:
    gradients = [torch.randn(3, 4), None, torch.randn(7), torch.randn(2, 2, 2)]
    ours, theirs = (parameters(*(None if g is None else g.clone() for g in gradients)) for _ in range(2))
    norm = clip_(iter(ours), largest)
    assert torch.equal(norm, torch.nn.utils.clip_grad_norm_(theirs, largest))
    for one, other in zip(ours, theirs, strict=True):
        assert (one.grad is None) == (other.grad is None)
        assert one.grad is None or torch.equal(one.grad, other.grad)


def test_norm_of_types_that_would_overflow_or_lose_digits() -> None:
    half = torch.full((2, 3), 6e4, dtype=torch.float16)
    assert gradient_norm(parameters(half)).item() == pytest.approx(half.double().norm().item(), rel=1e-6)
    double = torch.full((4,), 1e-30, dtype=torch.float64)
    single = torch.full((4,), 1.0)
    assert gradient_norm(parameters(single, double)).item() == pytest.approx(2.0)
    assert gradient_norm([]).item() == 0


def test_norm_of_a_sparse_gradient_adds_its_duplicates() -> None:
    sparse = torch.sparse_coo_tensor(torch.tensor([[1, 1]]), torch.tensor([3.0, 1.0]), (5,), check_invariants=False)
    dense = nn.Parameter(torch.zeros(5))
    dense.grad = sparse
    assert gradient_norm([dense]).item() == 4.0
    assert nonfinite_entries([dense]).tolist() == [0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_entries_that_are_not_finite_are_counted(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    gradients = [torch.tensor([math.nan, 1.0, -math.inf, math.inf]), None, torch.tensor([1.0, 0.0]).mul(largest)]
    made = parameters(*(None if gradient is None else gradient.to(dtype) for gradient in gradients))
    made[2].grad = torch.full((2,), largest, dtype=dtype)
    assert nonfinite_entries(made).tolist() == [3, 0, 0]
    assert nonfinite_entries([]).tolist() == []
