"""Powers of two: exact, in range, and of the size promised, against `math.frexp`."""

import math

import pytest
import torch

from lightning_multinorm.scaling import inverse_power_of_two, largest_magnitude, power_of_two, working_dtype

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize("dtype", FLOATS)
def test_working_dtype_is_float32_or_wider(dtype: torch.dtype) -> None:
    expected = torch.float64 if dtype is torch.float64 else torch.float32
    assert working_dtype(torch.zeros(1, dtype=dtype)) is expected


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_working_dtype_refuses_what_is_not_real(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=str(dtype)):
        working_dtype(torch.zeros(1, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("a", [1e-37, 1e-25, 3e-5, 0.4999, 0.5, 0.75, 1.0, 1.5, 2.0, 3.3e4, 1e25, 8e37])
def test_product_lies_in_half_open_interval_and_power_is_exact(a: float, dtype: torch.dtype) -> None:
    magnitude = torch.tensor(a, dtype=dtype)
    power = inverse_power_of_two(magnitude).item()
    assert power == 2.0 ** -math.frexp(magnitude.item())[1]
    assert 0.5 <= magnitude.item() * power < 1


def test_largest_numbers_stay_far_from_overflow() -> None:
    """The power is kept normal, so the two topmost binades of float32 end in [1, 4) instead of [1/2, 1)."""
    largest = torch.tensor(torch.finfo(torch.float32).max)
    assert 1 <= (largest * inverse_power_of_two(largest)).item() < 4


@pytest.mark.parametrize("a", [0.0, float("inf"), float("nan")])
def test_what_has_no_size_is_left_alone(a: float) -> None:
    assert inverse_power_of_two(torch.tensor(a)).item() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_subnormal_gets_a_finite_power(dtype: torch.dtype) -> None:
    subnormal = torch.tensor(torch.finfo(dtype).smallest_normal, dtype=dtype) / 2**10
    power = inverse_power_of_two(subnormal)
    assert power.isfinite()
    assert 2.0**-60 < (subnormal * power).item() < 0.5


@pytest.mark.parametrize(("dim", "shape"), [(-1, (2, 3, 1)), (-2, (2, 1, 4)), ((-2, -1), (2, 1, 1))])
def test_power_is_that_of_the_largest_entry_over_dim(dim: int | tuple[int, int], shape: tuple[int, ...]) -> None:
    matrix = torch.randn(2, 3, 4) * 2.0 ** torch.arange(-12, 12).reshape(2, 3, 4)
    power = power_of_two(matrix, dim)
    assert power.shape == shape
    largest = (matrix * power).abs().amax(dim)
    assert ((largest >= 0.5) & (largest < 1)).all()
    assert (power.log2() == power.log2().round()).all()


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0), (2, 0, 3)])
@pytest.mark.parametrize("dim", [-1, -2, (-2, -1)])
def test_empty_matrix_gets_ones(shape: tuple[int, ...], dim: int | tuple[int, int]) -> None:
    power = power_of_two(torch.zeros(shape), dim)
    assert power.shape == torch.zeros(shape).sum(dim, keepdim=True).shape
    assert (power == 1).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("dim", [-1, 0, (-2, -1)], ids=str)
def test_largest_magnitude_is_that_of_the_norm(dtype: torch.dtype, dim: int | tuple[int, int]) -> None:
    matrix = torch.randn(3, 7, 5).to(dtype)
    matrix[0, 0, 0], matrix[1, 2, 3] = -9, float("inf")
    for keepdim in (False, True):
        expected = torch.linalg.vector_norm(matrix, float("inf"), dim=dim, keepdim=keepdim)
        assert torch.equal(largest_magnitude(matrix, dim, keepdim=keepdim), expected)
    matrix[2, 1, 1] = float("nan")
    assert largest_magnitude(matrix[2], (-2, -1)).isnan()
    assert torch.equal(largest_magnitude(matrix[:, :, :0], (-2, -1)), torch.zeros(3, dtype=dtype))
