"""Loops that numba compiles, for inputs so large that it pays to load them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Final, TypeVar, cast

from tdxtrace.compiler import cache_folder, cache_in
from tdxtrace.ingest.memory import without_collector

F = TypeVar("F", bound=Callable[..., Any])

# From this size on compiled loops save more than the 0.15 s that loading them takes: 130 MB of
# text, 110 MB of trace.dat and 100 MB of perf.data are read in the same time with and without
# (tests/bench/compiled.py).
LARGE_BYTES: Final = 128 << 20
# Arrays are not counted while loops use them (_nrt): that took longer than what they did.
_OPTIONS: Final = {"nogil": True, "error_model": "numpy", "boundscheck": False, "_nrt": False}
# Versions of numba whose machine code was seen to run without what compiling needs.
_LOADS_QUICKLY: Final = frozenset({(0, 66), (0, 67), (0, 68)})


def pays(n_bytes: int | None) -> bool:
    """Whether to read an input of so many bytes with compiled loops; None: not known.

    Modules named ``loops`` have them: they are imported only then.  What they give is the
    same as without, event by event; numba may be missing, as it is for a new Python at first.
    """
    return n_bytes is not None and n_bytes >= LARGE_BYTES and _is_there()


def _is_there() -> bool:
    try:
        with without_collector():
            import numba  # noqa: F401, PLC0415 - slow to import: see pays
    except ImportError:  # not installed, or "Numba needs NumPy 2.4 or less"
        return False
    return True


@cache
def _load_arrays() -> None:
    """Import what numba needs for arrays, but not scipy.linalg.

    numba.np.arraymath imports that to see whether it is there, which takes as long as
    numba itself.  It is there, as scipy is a dependency, and is imported where it is used.
    A numba without that check is left alone.
    """
    from numba.np import linalg  # noqa: PLC0415 - slow to import: see pays

    if hasattr(linalg, "ensure_blas"):
        check, linalg.ensure_blas = linalg.ensure_blas, lambda: None
        try:
            import numba.np.arraymath  # noqa: F401, PLC0415 - see pays
        finally:
            linalg.ensure_blas = check


def compiled(function: F) -> F:
    """Compile a loop over arrays with its first call, and keep the machine code on disk.

    It runs without the interpreter's lock, makes no arrays, raises nothing and checks no
    bounds.  Where nothing can be kept on disk it is compiled in every run: see
    :func:`tdxtrace.compiler.cache_folder`.
    """
    import numba  # noqa: PLC0415 - slow to import: see pays

    compile_loop: Any = numba.njit
    made: Any = compile_loop(**_OPTIONS)(function)
    folder = cache_folder()
    if folder is None:
        _load_arrays()
    else:
        with cache_in(folder):
            made._cache = _kept()(function)
    return cast("F", made)


@cache
def _kept() -> Any:  # noqa: ANN401 - numba has no types
    """What keeps machine code on disk, and loads it without what only compiling needs.

    numba makes itself ready to compile before it loads what is kept: that takes as long as
    to import it.  Loops that count no arrays and raise nothing use nothing of that.
    """
    import numba  # noqa: PLC0415 - see compiled
    from numba.core import caching  # noqa: PLC0415 - see compiled

    usual: Any = caching.FunctionCache

    class Kept(usual):  # type: ignore[misc]
        def load_overload(self, signature: object, context: object) -> object:
            if numba.version_info.short in _LOADS_QUICKLY:
                found = self._load_overload(signature, context)
                if found is not None:
                    return found
            _load_arrays()
            return super().load_overload(signature, context)

    return Kept


def inlined(function: F) -> F:
    """Make a function part of the compiled loops that call it: only they can."""
    import numba  # noqa: PLC0415 - see compiled

    compile_loop: Any = numba.njit
    wrappers = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    made: F = compile_loop(forceinline=True, **wrappers, **_OPTIONS)(function)
    return made
