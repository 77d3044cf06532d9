"""The CPU path: threads, strides, stochastic rounding, and what it tells autograd and a forked child."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lightning_multinorm.batch import Batch
from lightning_multinorm.rounding import noise, round_to_bfloat16
from lightning_multinorm.sinkhorn import cpu, cpu_jit, cpu_kernels, eager, reference


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    yield
    torch.set_num_threads(1)


def _heavy(*shape: int) -> Tensor:
    *batch, m, n = shape
    return torch.randn(shape) * torch.randn(*batch, m, 1).exp() * torch.randn(*batch, 1, n).exp()


@pytest.mark.parametrize("scale", [1.0, 1e-25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_threads_change_no_bit(dtype: torch.dtype, scale: float) -> None:
    """Several panels and the remainder of one, shared by up to four threads or done by one."""
    m = 2 * cpu_kernels.PANEL + 37
    G = (_heavy(2, m, 29) * scale).to(dtype)
    results = []
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        W = torch.ones(2, m, 29)
        found = cpu.update_([W], [G], lr=0.5, weight_decay=0.25, iterations=3, trace=True)
        assert found is not None
        results.append((W, *found, *cpu.scalings(G, 3)[:2]))
    assert_close(results[0][0].double() - 0.875, -0.5 * reference.sr_sinkhorn(G, 3), rtol=1e-5, atol=1e-6)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("observe", [False, True])
@pytest.mark.parametrize("threads", [1, 3])
def test_several_batches_at_once_are_the_same_to_the_last_bit(threads: int, observe: bool) -> None:
    """Of any shapes, dtypes, iterations and rates; what one leaves in a thread's buffers must not reach the next."""
    torch.set_num_threads(threads)
    makes = [
        (lambda: torch.randn(7, 12), lambda: _heavy(7, 12), 1.0, 3),
        (lambda: torch.randn(2, 41, 301).bfloat16(), lambda: _heavy(2, 41, 301).bfloat16(), 1.0, 5),
        (lambda: torch.randn(5, 3), lambda: _heavy(5, 3) * 1e-25, 0.1, 2),
        (lambda: torch.randn(301, 41).mT, lambda: _heavy(301, 41).mT.half(), 1.0, 1),
        (lambda: torch.randn(0, 4), lambda: torch.randn(0, 4), 1.0, 5),
        (lambda: torch.randn(1, 1), lambda: torch.randn(1, 1), 0.5, 5),
    ]
    batches, alone = [], []
    for k, (weight, gradient, lr, iterations) in enumerate(makes):
        weights, gradients = [weight() for _ in range(k % 3 + 1)], [gradient() for _ in range(k % 3 + 1)]
        rest = (lr, 0.1, iterations, torch.tensor(k), observe)
        batches.append(Batch(weights, gradients, *rest))
        alone.append(Batch([W.clone() for W in weights], gradients, *rest))
    together = cpu.update_all_(batches)
    for batch, seen, one in zip(batches, together, alone, strict=True):
        (expected,) = cpu.update_all_([one])
        assert all(map(torch.equal, batch.weights, one.weights))
        assert (seen is None) is (expected is None) is (not observe)
        if seen is not None and expected is not None:
            for a, b in zip(seen, expected, strict=True):
                assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("shape", [(cpu_kernels.PANEL + 37, 301), (150, cpu_kernels.SPAN // 200 + 5)])
def test_rescaling_changes_no_bit_of_long_rows(
    dtype: torch.dtype, threads: int, iterations: int, shape: tuple[int, int]
) -> None:
    """The first iteration has loops of its own unless the matrix is rescaled: both must add up in one order."""
    torch.set_num_threads(threads)
    G = _heavy(*shape).to(dtype)
    r, c, _ = cpu.scalings(G, iterations)
    tiny_r, tiny_c, _ = cpu.scalings(G * 2.0**-80, iterations)  # its row sums are not trusted
    assert torch.equal(tiny_r * 2.0**-80, r)
    assert torch.equal(tiny_c, c)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("threads", [1, 3])
def test_any_strides(dtype: torch.dtype, threads: int) -> None:
    torch.set_num_threads(threads)
    G, W = _heavy(31, 45).to(dtype), torch.randn(31, 45).to(dtype)
    expected = W.clone()
    cpu.update_([expected], [G], lr=0.5, weight_decay=0.1)
    for view in (lambda x: x.mT.contiguous().mT, lambda x: x.repeat_interleave(3, 1)[:, ::3]):
        moved = view(W)
        cpu.update_([moved], [view(G)], lr=0.5, weight_decay=0.1)
        assert torch.equal(moved, expected)


@pytest.mark.parametrize("path", [cpu, eager])
@pytest.mark.parametrize("shape", [(21, 34), (3, 21, 34), (2, 2, 21, 34)])
@pytest.mark.parametrize("threads", [1, 4])
def test_stochastic_rounding_is_that_of_rounding(path: object, shape: tuple[int, ...], threads: int) -> None:
    torch.set_num_threads(threads)
    weights = [torch.randn(shape).bfloat16() for _ in range(2)]
    gradients = [_heavy(*shape).bfloat16() for _ in range(2)]
    exact = [W.float() for W in weights]
    path.update_(weights, gradients, lr=1e-3, weight_decay=0.1, seed=77)  # type: ignore[attr-defined]
    path.update_(exact, gradients, lr=1e-3, weight_decay=0.1)  # type: ignore[attr-defined]
    got = torch.cat([W.reshape(-1, 21, 34) for W in weights])
    fine = torch.cat([W.reshape(-1, 21, 34) for W in exact])
    for k in range(len(got)):
        expected = round_to_bfloat16(fine[k], noise(77, k, slice(0, 21), 34, fine.device))
        # Where the two paths' float32 differ in the last bit, rounding may fall on either side: hardly ever.
        assert (got[k] != expected).float().mean() < 0.01
    assert not torch.equal(got, fine.bfloat16())


@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gradient", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [3, 32, 77])
def test_any_mix_of_dtypes_is_the_step_in_float32_rounded_once(
    weight: torch.dtype, gradient: torch.dtype, n: int
) -> None:
    G, W = _heavy(6, n).to(gradient), torch.randn(6, n).to(weight)
    exact = W.double() * 0.95 - 0.5 * reference.sr_sinkhorn(G.double(), 5)
    cpu.update_([W], [G], lr=0.5, weight_decay=0.1)
    # Half a unit in the last place of the weight, and what the step in float32 is off.
    error = (W.double() - exact).abs() / (exact.abs() * torch.finfo(weight).eps / 2 + 2e-6 * exact.abs().max())
    assert error.max() <= 1.01


def test_float16_and_float32_weights_ignore_the_seed() -> None:
    for dtype in (torch.float16, torch.float32):
        a, b, G = torch.ones(5, 9, dtype=dtype), torch.ones(5, 9, dtype=dtype), _heavy(5, 9)
        cpu.update_([a], [G], lr=1e-3, seed=1)
        cpu.update_([b], [G], lr=1e-3)
        assert torch.equal(a, b)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", [None, 5])
def test_weights_that_are_not_finite_stay_so(value: float, dtype: torch.dtype, seed: int | None) -> None:
    W = torch.full((3, 77), value, dtype=dtype)
    cpu.update_([W], [torch.randn(3, 77)], lr=1e-3, seed=seed)
    assert_close(W, torch.full_like(W, value), equal_nan=True)


def test_float64_is_refused_with_the_way_out() -> None:
    with pytest.raises(TypeError, match=r"float64; use kernel='eager'"):
        cpu.scalings(torch.ones(3, 4, dtype=torch.float64), 5)


@pytest.mark.parametrize(
    ("weights", "gradients", "message"),
    [
        ([torch.ones(3, 4)], [torch.ones(3, 5)], r"alike, got \[3, 5\] torch.float32 and \[3, 4\] torch.float32"),
        ([torch.ones(3, 4)] * 2, [torch.ones(3, 4), torch.ones(3, 4).bfloat16()], "float32 and .*bfloat16"),
        ([torch.ones(3, 4), torch.ones(3, 4).half()], [torch.ones(3, 4)] * 2, "float32 and .*float16"),
        ([torch.ones(3, 4)], [torch.ones(3, 4)] * 2, "1 weights do not match 2 gradients"),
        ([torch.ones(3, 4, device="meta")], [torch.ones(3, 4)], "works on the CPU, got a tensor on meta"),
    ],
)
def test_what_addresses_would_not_tell_is_refused(weights: list[Tensor], gradients: list[Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cpu.update_(weights, gradients, lr=1.0)


def test_machine_code_is_kept_by_what_all_of_its_files_contain(tmp_path: Path) -> None:
    for source in Path(cpu_jit.__file__).parent.glob("cpu_*.py"):
        shutil.copy(source, tmp_path)
    assert cpu_kernels.work.py_func.__qualname__ == f"work_{cpu_jit.version(tmp_path)}"
    with (tmp_path / "cpu_rows.py").open("a") as file:
        file.write("\n")
    cpu_jit.version.cache_clear()
    assert cpu_jit.version(tmp_path) != cpu_jit.version()


def test_autograd_notices_the_update() -> None:
    W = torch.randn(4, 5, requires_grad=True)
    loss = (W * W).sum()
    with torch.no_grad():
        cpu.update_([W], [torch.randn(4, 5)], lr=0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_calls_from_several_threads_at_once() -> None:
    torch.set_num_threads(2)
    Gs = [_heavy(4, 33, 65) for _ in range(6)]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda G: cpu.scalings(G, 5)[0], Gs))
    for G, r in zip(Gs, found, strict=True):
        assert torch.equal(r, cpu.scalings(G, 5)[0])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_has_threads_of_its_own() -> None:
    code = """
import os, torch
from lightning_multinorm.sinkhorn import cpu
torch.set_num_threads(2)
G = torch.randn(4, 33, 65)
r = cpu.scalings(G, 5)[0]
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(cpu.scalings(G, 5)[0], r) else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
