"""SinkGD with ``rescale="operator"``: updates of spectral norm √(m/n), against an exact SVD, and its laws."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from lightning_multinorm import SinkGD, sr_sinkhorn
from lightning_multinorm.optim.observation import STATISTICS, Observation

LOW = 0.08  # how much too low the norm may be found, and the update too large

_GRADIENTS: dict[str, Callable[[int, int], Tensor]] = {
    "gaussian": torch.randn,
    "low_rank": lambda m, n: torch.randn(m, 3) @ torch.randn(3, n) + torch.randn(m, n),
    "rank_one": lambda m, n: torch.randn(m, 1) @ torch.randn(1, n),
    "heavy_tailed": lambda m, n: torch.randn(m, n) / torch.rand(m, n).sqrt(),
    "uneven": lambda m, n: torch.randn(m, n) * torch.randn(m, 1).exp() * torch.randn(n).exp(),
    "rows_sum_to_zero": lambda m, n: torch.randn(m, n) @ (torch.eye(n) - 1 / n),
}


def _update(gradient: Tensor, view: str = "matrix", observers: Any = (), **options: Any) -> Tensor:
    """What one step at rate 1 subtracts."""
    parameter = nn.Parameter(torch.zeros_like(gradient))
    parameter.grad = gradient
    group = {"params": [("w", parameter)], "rule": "multinorm", "view": view, "name": "w"}
    optimizer = SinkGD([group], lr=1.0, matrix_lr_scale=1.0, rescale="operator", **options)
    optimizer.observers += observers
    optimizer.step()
    assert not optimizer.state
    return -parameter.detach()


def _norm(update: Tensor) -> float:
    """Of the operator from inputs to outputs of RMS 1."""
    m, n = update.shape
    return torch.linalg.matrix_norm(update.double(), 2).item() / (m / n) ** 0.5


@pytest.mark.parametrize("kind", _GRADIENTS)
@pytest.mark.parametrize("shape", [(96, 96), (40, 130), (130, 40), (3, 200), (1, 7), (7, 1)])
def test_norm_is_that_of_an_svd_and_direction_is_sinkhorns(kind: str, shape: tuple[int, int]) -> None:
    G = _GRADIENTS[kind](*shape)
    if min(shape) == 1 and kind == "rows_sum_to_zero":
        G = G + 1  # nothing else is left of it
    update = _update(G, kernel="eager")
    assert 1 - 1e-4 < _norm(update) < 1 + LOW
    direction = sr_sinkhorn(G, kernel="eager")
    assert_close(update / update.norm(), direction / direction.norm(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 7), (7, 2), (3, 40), (4, 5), (1, 6)])
def test_norm_is_exact_where_directions_are_fewer_than_steps(shape: tuple[int, int]) -> None:
    """Rounding makes almost copies of eigenvalues, and they must not be averaged; no start may miss the largest."""
    for _ in range(40):
        assert abs(_norm(_update(_GRADIENTS["uneven"](*shape), kernel="eager")) - 1) < 2e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    update = _update(torch.randn(48, 64).to(dtype), stochastic_rounding=False)
    assert update.dtype is dtype
    assert 1 - 1e-2 < _norm(update) < 1 + LOW + 1e-2


@pytest.mark.parametrize("kernel", ["eager", "auto"])
def test_scale_of_the_gradient_does_not_matter(kernel: Any) -> None:
    G = torch.randn(24, 40)
    update = _update(G, kernel=kernel)
    for power in (-90, -1, 70):
        assert torch.equal(_update(G * 2.0**power, kernel=kernel), update)
    for scale in (1e-25, 1e25):
        assert_close(_update(G * scale, kernel=kernel), update, rtol=1e-4, atol=1e-6)
        uneven = torch.where(torch.arange(24) % 2 == 0, scale, 1.0)[:, None] * G
        assert_close(_update(uneven, kernel=kernel), update, rtol=1e-4, atol=1e-6)


def test_permutations_commute_but_for_the_accuracy_of_the_norm() -> None:
    G, rows, columns = torch.randn(24, 40), torch.randperm(24), torch.randperm(40)
    permuted, update = _update(G[rows][:, columns]), _update(G)[rows][:, columns]
    assert_close(permuted / permuted.norm(), update / update.norm(), rtol=0, atol=1e-5)
    assert permuted.norm() / update.norm() == pytest.approx(1, abs=LOW)


def test_zero_gradients_and_zero_rows() -> None:
    assert torch.equal(_update(torch.zeros(6, 8)), torch.zeros(6, 8))
    G = torch.randn(12, 20)
    G[3], G[:, 5] = 0, 0
    update = _update(G)
    assert (update[3] == 0).all() and (update[:, 5] == 0).all()
    assert 1 - 1e-4 < _norm(update) < 1 + LOW
    for shape in ((0, 4), (4, 0)):
        assert _update(torch.zeros(shape)).shape == shape


def test_nan_reaches_the_weight() -> None:
    G = torch.randn(6, 8)
    G[2, 4] = float("nan")
    assert _update(G)[2, 4].isnan()


def test_every_matrix_of_a_parameter_has_its_own_norm() -> None:
    G = torch.randn(3, 12, 20) * torch.tensor([1.0, 1e3, 1e-3])[:, None, None]
    together = _update(G, "batch")
    for matrix, update in zip(G, together, strict=True):
        assert_close(update, _update(matrix), rtol=1e-5, atol=1e-7)


def test_equal_seeds_round_alike_and_parameters_differ() -> None:
    G = torch.randn(16, 16).bfloat16()
    one, two = _update(G), _update(G)
    assert torch.equal(one, two)
    assert 0.9 < _norm(one) < 1.1


@pytest.mark.parametrize("view", ["matrix", "batch"])
def test_observers_are_told_of_the_change_that_was_made(view: str) -> None:
    G = torch.randn(24, 40) if view == "matrix" else torch.randn(2, 24, 40)
    seen: list[Observation] = []
    update = _update(G, view, [lambda parameter, observation: seen.append(observation)])
    told = dict(zip(STATISTICS, seen[0].statistics.tolist(), strict=True))
    assert told["update_rms"] == pytest.approx(update.square().mean().sqrt().item(), rel=1e-3)
    assert told["gradient_norm"] == pytest.approx(G.norm().item(), rel=1e-3)
    assert seen[0].residuals.shape == (5, 2) and seen[0].residuals[-1].max() < 0.01


def test_a_step_changes_outputs_by_the_rate_at_most_whatever_the_width() -> None:
    for n in (16, 64, 256):
        x = torch.randn(n)
        update = _update(torch.outer(torch.randn(32), x) + 0.1 * torch.randn(32, n)) * 0.1
        x = x * n**0.5 / x.norm()
        assert 0.05 < (update @ x).square().mean().sqrt() < 0.1 * (1 + LOW)


def test_a_checkpoint_older_than_the_option_loads() -> None:
    weight = nn.Parameter(torch.zeros(6, 8))
    weight.grad = torch.randn(6, 8)
    optimizer = SinkGD([("w.weight", weight)])
    saved = optimizer.state_dict()
    del saved["param_groups"][0]["rescale"]
    optimizer.load_state_dict(saved)
    optimizer.step()
    assert weight.detach().square().mean().sqrt().item() == pytest.approx(1e-3, rel=1e-3)
