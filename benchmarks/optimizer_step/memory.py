"""What a step allocates beyond weights, gradients and state, and how large the state is."""

import ctypes
import gc
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

# glibc then gives every freed block of more than 64 KiB back to the system, so that resident memory is memory in use.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": str(2**16), "MALLOC_TRIM_THRESHOLD_": str(2**16)}


def state_bytes(optimizer: Optimizer, shared: Iterable[Tensor]) -> int:
    """Bytes of all storages that ``optimizer.state`` reaches, also through projectors and quantised tensors.

    Storages of ``shared`` tensors, the weights and gradients, do not count.
    """
    storages: dict[int, int] = {}

    def visit(value: Any) -> None:
        if isinstance(value, Tensor):
            if is_traceable_wrapper_subclass(value):
                for name in value.__tensor_flatten__()[0]:
                    visit(getattr(value, name))
            else:
                storage = value.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, Mapping):
            for item in value.values():
                visit(item)
        elif isinstance(value, list | tuple):
            for item in value:
                visit(item)
        else:
            visit(getattr(value, "__dict__", {}))

    for state in optimizer.state.values():
        visit(state)
    for tensor in shared:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storages.values())


def total_bytes(device: str) -> int:
    """Memory of the device, or of the machine as far as a container lets it be used."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[1]
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(machine, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no container, or one without a limit
        return machine


def peak_cuda(step: Callable[[], Any]) -> int:
    """Most bytes that ``step`` held at a time, beyond what was allocated before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def peak_resident(step: Callable[[], Any]) -> int | None:
    """Growth of the peak resident set of this process during ``step``; None where the system does not tell."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts at what is resident now
    except (OSError, AttributeError):
        return None
    before = _status("VmRSS")
    step()
    return max(0, _status("VmHWM") - before)


def peak_allocated(step: Callable[[], Any]) -> int:
    """Most bytes that torch's CPU allocator held at a time during ``step``, beyond those before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    results = profile.profiler.kineto_results if profile.profiler is not None else None
    events = [event for event in results.events() if event.name() == "[memory]"] if results is not None else []
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")
