"""How the CPU's machine code is compiled, and kept on disk without going stale."""

import hashlib
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numba


@lru_cache
def version(folder: Path = Path(__file__).parent) -> str:
    """Of all files that machine code is made from: one function's has those in it that it calls, from other files too.

    Numba looks at the file of the function alone, and would keep what a change elsewhere has made stale.
    """
    contents = b"".join(path.read_bytes() for path in sorted(folder.glob("cpu_*.py")))
    return hashlib.sha256(contents).hexdigest()[:12]


def jit(function: Any, **options: Any) -> Any:
    """Compiled when first called, for the types of that call; releases the GIL."""
    # "contract" allows fused multiply-add and nothing else: reassociating a product would leave the range.
    return _kept(partial(numba.njit, nogil=True, error_model="numpy", fastmath={"contract"}, **options), function)


inlined = partial(jit, forceinline=True)  # for what works on a row or four: calls took some 4 % of a step


def c_function(function: Any, signature: str) -> Any:
    """A `numba.cfunc`, compiled at once."""
    return _kept(partial(numba.cfunc, signature), function)


def _kept(compiler: Any, function: Any) -> Any:
    function.__qualname__ = f"{function.__qualname__}_{version()}"  # it names the files that machine code is kept in
    try:
        return compiler(cache=True)(function)
    except RuntimeError:  # no folder to keep machine code in: every process compiles anew, a few seconds
        return compiler()(function)
