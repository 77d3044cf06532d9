"""Stochastic rounding: unbiased, exact where nothing is cut off, and the same noise whoever asks."""

import pytest
import torch
from torch.testing import assert_close

from lightning_multinorm import rounding
from lightning_multinorm.rounding import key, lowbias32, noise, round_to_bfloat16, store_rounded_

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


def test_no_nan_becomes_a_number() -> None:
    """Also those whose only bits are cut off, or carry over into the sign."""
    x = torch.tensor([0x7F800001, 0x7FFFFFFF, -1, -0x7FFFFF]).to(torch.int32).view(torch.float32)
    for draws in (0, 1, 2**15, 2**16 - 1):
        assert round_to_bfloat16(x, torch.full((4,), draws)).isnan().all()


def test_noise_is_the_hash_of_seed_matrix_and_entry() -> None:
    found = noise(5, 2, slice(3, 6), 7, _CPU)
    assert found.flatten().tolist() == [lowbias32(entry ^ key(5, 2)) >> 16 for entry in range(21, 42)]
    late = noise(5, 2, slice(2**32, 2**32 + 1), 3, _CPU)  # entries are told apart by 32 bits
    assert torch.equal(late, noise(5, 2, slice(0, 1), 3, _CPU))


@pytest.mark.parametrize("shape", [(8, 5), (5, 8), (40, 1), (0, 5)], ids=str)
@pytest.mark.parametrize("block", [1, 13, 2**15])
def test_blocks_round_as_the_whole(shape: tuple[int, int], block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "_BLOCK_CPU", block)
    x, W = torch.randn(shape), torch.zeros(shape, dtype=torch.bfloat16)
    store_rounded_(W, x, 9, 1, first=3)
    assert torch.equal(W, round_to_bfloat16(x, noise(9, 1, slice(3, 3 + shape[0]), shape[1], _CPU)))


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
