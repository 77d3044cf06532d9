"""Stochastic rounding: unbiased, exact where nothing is cut off, and the same noise whoever asks."""

import pytest
import torch
from torch.testing import assert_close

from lightning_multinorm.rounding import key, lowbias32, noise, round_to_bfloat16

_CPU = torch.device("cpu")


def test_mean_is_the_number_itself() -> None:
    x = torch.tensor([1.0 + 2.0**-10, -3.0 - 2.0**-9, 1e-3, 7.77e20, -2.5e-30])
    rounds = 40_000
    draws = noise(3, 0, slice(0, rounds), len(x), _CPU)
    y = round_to_bfloat16(x.expand(rounds, -1), draws).double()
    assert set(y[:, 0].tolist()) == {1.0, 1.0078125}
    gap = (y.amax(0) - y.amin(0)).abs()
    assert (gap > 0).all()
    # The standard error of a mean of coin flips is at most gap / (2 √rounds).
    assert (((y.mean(0) - x.double()).abs()) < 4 * gap / (2 * rounds**0.5)).all()


def test_neighbours_are_those_of_bfloat16() -> None:
    x = torch.randn(1000)
    y = round_to_bfloat16(x, noise(0, 0, slice(0, 1), 1000, _CPU)[0]).float()
    assert ((y - x).abs() < torch.finfo(torch.bfloat16).eps * x.abs()).all()


def test_what_is_bfloat16_already_stays() -> None:
    x = torch.randn(1000).bfloat16()
    draws = torch.randint(0, 2**16, (1000,))
    assert torch.equal(round_to_bfloat16(x.float(), draws), x)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 0.0, -0.0])
def test_special_values_stay(value: float) -> None:
    x = torch.full((64,), value)
    y = round_to_bfloat16(x, torch.full((64,), 2**16 - 1))
    assert_close(y.float(), x, equal_nan=True)


def test_noise_is_uniform_and_independent_of_seed_matrix_and_entry() -> None:
    draws = torch.stack([noise(seed, k, slice(0, 64), 1024, _CPU) for seed in (0, 10_000, 2**31) for k in (0, 1)])
    assert draws.min() >= 0
    assert draws.max() < 2**16
    flat = draws.double().flatten(1)
    assert_close(flat.mean(1), torch.full((6,), 2.0**15).double(), rtol=0.01, atol=0)
    correlation = torch.corrcoef(flat).fill_diagonal_(0)
    assert correlation.abs().max() < 0.02
    assert torch.corrcoef(torch.stack([flat[0, :-1], flat[0, 1:]]))[0, 1].abs() < 0.02


def test_rows_are_part_of_the_whole() -> None:
    whole = noise(5, 2, slice(0, 9), 7, _CPU)
    assert torch.equal(noise(5, 2, slice(3, 6), 7, _CPU), whole[3:6])
    assert torch.equal(noise(torch.tensor(5), 2, slice(0, 9), 7, _CPU), whole)


def test_numbers_and_tensors_hash_alike() -> None:
    values = [0, 1, 2**31, 2**32 - 1]
    assert lowbias32(torch.tensor(values)).tolist() == [lowbias32(value) for value in values]
    assert int(key(torch.tensor(-3), 1)) == key(-3, 1)
