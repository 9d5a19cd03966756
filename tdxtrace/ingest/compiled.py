"""Loops that numba compiles, for inputs so large that it pays to load them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, Final, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

# From this size on compiled loops save more than the 0.4 s that loading them takes
# (tests/bench/compiled.py).
LARGE_BYTES: Final = 128 << 20


def pays(n_bytes: int | None) -> bool:
    """Whether to read an input of so many bytes with compiled loops; None: not known.

    Modules named ``loops`` have them: they are imported only then.  What they give is the
    same as without, event by event; numba may be missing, as it is for a new Python at first.
    """
    return n_bytes is not None and n_bytes >= LARGE_BYTES and _is_there()


def _is_there() -> bool:
    return importlib.util.find_spec("numba") is not None


def compiled(function: F) -> F:
    """Compile a loop over arrays with its first call, and keep the machine code on disk.

    It runs without the interpreter's lock, raises nothing and checks no bounds.  Where
    nothing can be kept on disk (no folder of numba's may be written) it is compiled in
    every run.
    """
    import numba  # noqa: PLC0415 - slow to import: see pays

    compile_loop: Any = numba.njit
    options = {"nogil": True, "error_model": "numpy", "boundscheck": False}
    try:
        made: F = compile_loop(cache=True, **options)(function)
    except RuntimeError:  # "no locator available": numba.core.caching
        made = compile_loop(**options)(function)
    return made
