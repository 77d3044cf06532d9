"""Which of the equivalent paths works on a tensor: by device and dtype, or as asked for."""

import importlib.util
import warnings
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from lightning_multinorm.sinkhorn.sharded import Passes
from lightning_multinorm.sinkhorn.tracing import Tracing

Kernel = Literal["auto", "eager", "numba", "triton"]
"""auto: the fastest for device and dtype. eager: plain PyTorch, any device and dtype. numba: on the CPU. triton: on a
CUDA or ROCm GPU. The last two take float32, bfloat16 and float16."""

_INSTALL = {
    "numba": "pip install 'lightning-multinorm[numba]'",
    "triton": "pip install triton (PyTorch's builds for GPUs bring it)",
}
_SINGLE = (torch.float32, torch.bfloat16, torch.float16)


class Path(Protocol):
    """What `eager`, `cpu` and `triton` have in common."""

    def scalings(
        self, gradient: Tensor, iterations: int, *, trace: bool = False
    ) -> tuple[Tensor, Tensor, Tracing | None]: ...

    def update_(
        self,
        weights: Sequence[Tensor],
        gradients: Sequence[Tensor],
        *,
        lr: float | Tensor,
        weight_decay: float = 0.0,
        iterations: int = 5,
        trace: bool = False,
        seed: int | Tensor | None = None,
    ) -> Tracing | None: ...


def check_kernel(kernel: str) -> None:
    """Raises ValueError for an unknown name, ModuleNotFoundError for one whose package is missing."""
    if kernel not in get_args(Kernel):
        raise ValueError(f"kernel={kernel!r} is unknown; use one of {', '.join(get_args(Kernel))}")
    if kernel in _INSTALL and not _installed(kernel):
        raise ModuleNotFoundError(f"kernel={kernel!r} needs {kernel}: {_INSTALL[kernel]}")


def path(kernel: Kernel, *tensors: Tensor) -> Path:
    """The module that computes with ``tensors``, which share a device.

    Raises:
        ValueError: for an unknown name.
        ModuleNotFoundError: for a path whose package is missing.
    """
    if kernel == "auto":
        kernel = _fastest(tensors[0].device.type, all(tensor.dtype in _SINGLE for tensor in tensors))
    else:
        check_kernel(kernel)
    # Imported when first used: Numba and Triton take their time, and neither need be there.
    if kernel == "numba":
        from lightning_multinorm.sinkhorn import cpu

        return cpu
    if kernel == "triton":
        from lightning_multinorm.sinkhorn import triton

        return triton
    from lightning_multinorm.sinkhorn import eager

    return eager


def passes(kernel: Kernel, device: torch.device, dtypes: Iterable[torch.dtype]) -> Passes:
    """The module that reads and updates the local parts of sharded matrices.

    Raises:
        ValueError: for an unknown name.
        ModuleNotFoundError: for a path whose package is missing.
    """
    if kernel == "auto":
        kernel = _fastest(device.type, all(dtype in _SINGLE for dtype in dtypes))
    else:
        check_kernel(kernel)
    if kernel == "numba":
        from lightning_multinorm.sinkhorn import cpu_passes

        return cpu_passes
    if kernel == "triton":
        from lightning_multinorm.sinkhorn import triton_passes

        return triton_passes
    from lightning_multinorm.sinkhorn import eager_passes

    return eager_passes


@lru_cache
def _fastest(device: str, single: bool) -> Kernel:
    fast: dict[str, Kernel] = {"cpu": "numba", "cuda": "triton"}
    if device not in fast or not single:
        return "eager"
    if _installed(fast[device]):
        return fast[device]
    warnings.warn(
        f"{fast[device]} is not installed, so SR-Sinkhorn runs in plain PyTorch, several times slower: "
        f"{_INSTALL[fast[device]]}. kernel='eager' asks for plain PyTorch and silences this.",
        stacklevel=2,
    )
    return "eager"


def has_numba() -> bool:
    """Whether compiled loops for the CPU are there."""
    return _installed("numba")


@lru_cache
def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
