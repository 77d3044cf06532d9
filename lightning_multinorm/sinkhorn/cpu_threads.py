"""Run one compiled function by several threads at once.

PyTorch's own OpenMP threads are the best ones to use: after a parallel operation they wait actively for a while, and
any other threads would have to share the cores with them. So the function is started through the OpenMP library that
PyTorch has loaded, where that is GNU's; elsewhere, and in a forked child, whose OpenMP threads are gone, by a pool of
Python threads.
"""

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

_PROCESS = os.getpid()


def run(function: Callable[[int], None], compiled: Any, argument: int, threads: int) -> None:
    """``function(argument)`` by each of ``threads`` threads; returns when all have done.

    Args:
        function: releases the GIL.
        compiled: the same as a C function of one pointer, a `numba.cfunc`.
        argument: an address.
        threads: number of threads, this one among them.
    """
    openmp = _openmp() if os.getpid() == _PROCESS else None
    if threads > 1 and openmp is not None:
        openmp.GOMP_parallel(compiled.address, argument, threads, 0)
        return
    futures = [pool(os.getpid(), threads - 1).submit(function, argument) for _ in range(threads - 1)]
    function(argument)
    for future in futures:
        future.result()


@lru_cache(maxsize=1)
def pool(process: int, threads: int) -> ThreadPoolExecutor:
    """One pool, kept; a forked child, whose threads are gone, gets its own."""
    return ThreadPoolExecutor(threads, thread_name_prefix="sinkhorn")


@lru_cache
def _openmp() -> ctypes.CDLL | None:
    """GNU's OpenMP library if it is in this process already, with its entry for compilers, stable since GCC 4.9."""
    try:
        library = ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
        library.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        library.GOMP_parallel.restype = None
    except (OSError, AttributeError):
        return None
    return library
