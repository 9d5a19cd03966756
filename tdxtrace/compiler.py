"""Run loops over columns: interpreted for small inputs, compiled by numba for large ones.

A rule over many events is one plain function: a loop over columns.  ``interpreted`` and
``compiled`` both take such a function and return one with the same results.  :func:`choose`
selects one of them per input; the result is passed to the callees as a :data:`Runner`.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import os
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Lock
from types import FunctionType
from typing import Any, Final, TypeVar, cast

import numpy as np

F = TypeVar("F", bound=Callable[..., Any])
Runner = Callable[[F], F]
"""``interpreted`` or ``compiled``."""

# From this size of a recording on, loading numba (0.3 to 0.6 s) costs less than interpreting:
# python tests/bench/compiled.py.
COMPILE_BYTES: Final = 1 << 20
COMPILING: Final = "compiling loops for this machine; later runs use the cached code"
_PACKAGE: Final = Path(__file__).parent
_USED: Final = "used"
# Compile one loop at a time: numba's cache folder is a setting of the whole process.
_PREPARING: Final = Lock()
_UNUSED_SECONDS: Final = 30 * 24 * 3600


def choose(n_bytes: int | None) -> Runner[Any]:
    """Return the runner for an input of ``n_bytes``, or of unknown size (None)."""
    if n_bytes is None or n_bytes < COMPILE_BYTES:
        return interpreted
    if not _has_numba():
        _warn_once("numba is not installed: reading is about 100 times slower")
        return interpreted
    return compiled


def interpreted(loop: F) -> F:
    """Wrap ``loop`` to run in Python, with unsigned overflow wrapping as in compiled code."""

    @functools.wraps(loop)
    def run(*args: object) -> object:
        with np.errstate(over="ignore"):
            return loop(*args)

    return cast("F", run)


@functools.cache
def compiled(loop: F) -> F:
    """Return ``loop`` compiled by numba, with the functions of this package that it calls.

    The loop is compiled at its first call, and the machine code is cached on disk for later
    runs.  It runs without the GIL and without bounds checks.  A loop must not allocate arrays:
    the caller passes the arrays to fill.
    """
    return cast("F", _Compiled(loop))


class _Compiled:
    """A loop whose machine code is loaded from the cache, or compiled, at the first call."""

    def __init__(self, loop: Callable[..., Any]) -> None:
        self._loop = loop
        self._run: Any = None
        functools.update_wrapper(self, loop)

    def __call__(self, *args: object) -> object:
        if self._run is None:
            with _PREPARING, _without_collector():
                self._run = self._run or self._prepare(args)
        return self._run(*args)

    def _prepare(self, args: tuple[object, ...]) -> Any:  # noqa: ANN401 - numba has no types
        """Load the machine code for arguments of these types, or compile it."""
        import numba  # noqa: PLC0415 - slow to import

        types = tuple(map(numba.typeof, args))
        folder = cache_folder()
        if folder is not None:
            marker = folder / f"{self._loop.__module__}.{self._loop.__qualname__}"
            if not marker.exists():
                _warn_once(COMPILING)
            try:
                with cache_in(folder):
                    run = _jit(self._loop, is_kept=True)
                    run.compile(types)
                    marker.touch()
            except Exception as error:
                # numba unpickles its cache: a damaged file can raise any exception.
                _warn_once(f"compiled loops in {folder} cannot be used ({_reason(error)})")
            else:
                return run
        run = _jit(self._loop, is_kept=False)
        run.compile(types)
        return run


# Loops allocate no arrays, so that numba's runtime (NRT) need not count references.  In a loop
# of 15 ns per event, counting took 200 ns for arrays passed to functions, and 100 ns for arrays
# taken out of tuples.
_OPTIONS: Final = {"nogil": True, "error_model": "numpy", "_nrt": False}
# Functions that a loop calls are inlined: Python never calls them, and they are not cached alone.
_INLINED: Final = {"forceinline": True, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}


@functools.cache
def _jit(loop: FunctionType, *, is_kept: bool, is_called: bool = False) -> Any:  # noqa: ANN401
    """Return numba's dispatcher for ``loop``; functions of this package that it calls are inlined.

    Args:
        loop: The function.
        is_kept: Whether the machine code is cached on disk.
        is_called: Whether another loop calls it, so that it is inlined there.
    """
    import numba  # noqa: PLC0415 - slow to import

    names = {
        name: _jit(called, is_kept=is_kept, is_called=True)
        for name in loop.__code__.co_names
        if isinstance(called := loop.__globals__.get(name), FunctionType)
        and called.__module__.partition(".")[0] == __name__.partition(".")[0]
    }
    function = FunctionType(
        loop.__code__, loop.__globals__ | names, loop.__name__, loop.__defaults__
    )
    function.__qualname__, function.__module__ = loop.__qualname__, loop.__module__
    options = _INLINED if is_called else {"cache": is_kept}
    return cast("Any", numba.njit)(**options, **_OPTIONS)(function)


@contextlib.contextmanager
def cache_in(folder: Path) -> Iterator[None]:
    """Make numba cache loops that are compiled inside this context in ``folder``."""
    from numba import config  # noqa: PLC0415 - slow to import

    settings: Any = config
    before, settings.CACHE_DIR = settings.CACHE_DIR, str(folder)
    try:
        yield
    finally:
        settings.CACHE_DIR = before


@functools.cache
def cache_folder() -> Path | None:
    """Return the cache folder for these sources, this Python, numba and numpy.

    numba checks only the file of a loop for changes, but constants of other modules are compiled
    into the machine code too.  So the name of the folder contains a digest of all sources.

    Returns:
        The folder, created if necessary; None, after a warning on stderr, if it cannot be written
        or other users can write to it (code in it is executed).
    """
    folder = _base_folder() / f"loops-{_key()}"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = folder.stat()
        if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise PermissionError(0, "others may write there")
        (folder / _USED).touch()
    except OSError as error:
        _warn_once(
            f"compiled loops are not cached in {folder} ({_reason(error)}); each run compiles"
        )
        return None
    _remove_unused(folder)
    return folder


def _base_folder() -> Path:
    """Return NUMBA_CACHE_DIR if it is set, else the user's cache folder (XDG base directories)."""
    if configured := os.environ.get("NUMBA_CACHE_DIR"):
        return Path(configured)
    caches = os.environ.get("XDG_CACHE_HOME")
    return (Path(caches) if caches else Path("~/.cache").expanduser()) / "tdxtrace"


def _key() -> str:
    """Return a digest of the package's sources and the versions of Python, numba and numpy."""
    import llvmlite  # noqa: PLC0415 - slow to import
    import numba  # noqa: PLC0415 - slow to import

    versions = sys.version, numba.__version__, llvmlite.__version__, np.__version__
    digest = hashlib.blake2b(repr(versions).encode(), digest_size=8)
    for path in sorted(_PACKAGE.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _remove_unused(current: Path) -> None:
    """Remove caches of other versions that were not used for 30 days."""
    for other in current.parent.glob("loops-*"):
        with contextlib.suppress(OSError):
            if other != current and time.time() - (other / _USED).stat().st_mtime > _UNUSED_SECONDS:
                shutil.rmtree(other)


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    """Disable the cyclic garbage collector: it takes a fifth of the time to load numba."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _has_numba() -> bool:
    try:
        with _without_collector():
            import numba  # noqa: F401, PLC0415 - slow to import
    except ImportError:  # not installed, or "Numba needs NumPy 2.4 or less"
        return False
    return True


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or type(error).__name__


@functools.cache
def _warn_once(message: str) -> None:
    sys.stderr.write(f"tdxtrace: {message}\n")
    sys.stderr.flush()
