"""How loops run: interpreted for small inputs, compiled by numba for large ones.

A rule over many events is one plain function: a loop over columns.  ``interpreted`` and
``compiled`` both take such a function and return one that does the same.  Whether to
compile is decided once for an input, by :func:`choose`, and passed on as a :data:`Runner`.
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
COMPILING: Final = "compiling loops for this machine; later runs use what is kept"
_PACKAGE: Final = Path(__file__).parent
_USED: Final = "used"
# One loop at a time: where numba keeps machine code is a setting of the whole process.
_PREPARING: Final = Lock()
_UNUSED_SECONDS: Final = 30 * 24 * 3600


def choose(n_bytes: int | None) -> Runner[Any]:
    """Return how to run the loops that read an input of ``n_bytes``; None: size unknown."""
    if n_bytes is None or n_bytes < COMPILE_BYTES:
        return interpreted
    if not _has_numba():
        _tell_once("numba is not installed: reading is some 100 times slower than it can be")
        return interpreted
    return compiled


def interpreted(loop: F) -> F:
    """Return ``loop`` to be run by Python: unsigned numbers wrap, as they do when compiled."""

    @functools.wraps(loop)
    def run(*args: object) -> object:
        with np.errstate(over="ignore"):
            return loop(*args)

    return cast("F", run)


@functools.cache
def compiled(loop: F) -> F:
    """Return ``loop`` compiled by numba, with the functions of this package that it calls.

    Machine code is made at the first call and kept on disk for later runs.  It runs without
    the interpreter's lock and checks no bounds.  A loop makes no arrays: it gets those to fill.
    """
    return cast("F", _Compiled(loop))


class _Compiled:
    """A loop whose machine code is loaded, or made, at the first call."""

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
            mark = folder / f"{self._loop.__module__}.{self._loop.__qualname__}"
            if not mark.exists():
                _tell_once(COMPILING)
            try:
                with cache_in(folder):
                    run = _jit(self._loop, is_kept=True)
                    run.compile(types)
                    mark.touch()
            except Exception as error:
                # numba unpickles what it kept: a damaged file raises whatever pickle meets.
                _tell_once(f"compiled loops in {folder} cannot be used ({_why(error)})")
            else:
                return run
        run = _jit(self._loop, is_kept=False)
        run.compile(types)
        return run


# Loops make no arrays, so that nothing has to be counted (NRT, numba's runtime): to count the
# arrays that a loop of 15 ns an event passes to functions took 200 ns, and 100 ns those that
# it takes out of tuples.
_OPTIONS: Final = {"nogil": True, "error_model": "numpy", "_nrt": False}
# What a loop calls becomes a part of it: nothing calls that from Python, or keeps it by itself.
_PART: Final = {"forceinline": True, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}


@functools.cache
def _jit(loop: FunctionType, *, is_kept: bool, is_called: bool = False) -> Any:  # noqa: ANN401
    """Let numba compile ``loop`` with the functions of this package that it calls as parts."""
    import numba  # noqa: PLC0415 - slow to import

    names = {
        name: _jit(called, is_kept=is_kept, is_called=True)
        for name in loop.__code__.co_names
        if isinstance(called := loop.__globals__.get(name), FunctionType)
        and called.__module__.partition(".")[0] == __name__.partition(".")[0]
    }
    twin = FunctionType(loop.__code__, loop.__globals__ | names, loop.__name__, loop.__defaults__)
    twin.__qualname__, twin.__module__ = loop.__qualname__, loop.__module__
    how = _PART if is_called else {"cache": is_kept}
    return cast("Any", numba.njit)(**how, **_OPTIONS)(twin)


@contextlib.contextmanager
def cache_in(folder: Path) -> Iterator[None]:
    """Let numba keep the machine code of loops that are made meanwhile in ``folder``."""
    from numba import config  # noqa: PLC0415 - slow to import

    settings: Any = config
    before, settings.CACHE_DIR = settings.CACHE_DIR, str(folder)
    try:
        yield
    finally:
        settings.CACHE_DIR = before


@functools.cache
def cache_folder() -> Path | None:
    """The folder of machine code made from these sources, this Python, numba and numpy.

    numba looks only at the file of a loop to see whether it changed; constants of other
    modules are part of the machine code too.  So the folder is named by all of the sources.
    None, and a line on stderr, where no folder can be written that nobody else can write:
    what lies in it is run.
    """
    made = _base_folder() / f"loops-{_key()}"
    try:
        made.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = made.stat()
        if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise PermissionError(0, "others may write there")
        (made / _USED).touch()
    except OSError as error:
        _tell_once(f"compiled loops are not kept in {made} ({_why(error)}); each run compiles")
        return None
    _remove_unused(made)
    return made


def _base_folder() -> Path:
    """NUMBA_CACHE_DIR if it is set, else the user's folder of caches (XDG base directories)."""
    if told := os.environ.get("NUMBA_CACHE_DIR"):
        return Path(told)
    caches = os.environ.get("XDG_CACHE_HOME")
    return (Path(caches) if caches else Path("~/.cache").expanduser()) / "tdxtrace"


def _key() -> str:
    """A digest of the package's sources and of what turns them into machine code."""
    import llvmlite  # noqa: PLC0415 - slow to import
    import numba  # noqa: PLC0415 - slow to import

    versions = sys.version, numba.__version__, llvmlite.__version__, np.__version__
    digest = hashlib.blake2b(repr(versions).encode(), digest_size=8)
    for path in sorted(_PACKAGE.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _remove_unused(mine: Path) -> None:
    """Remove machine code of other versions that was not used for 30 days."""
    for other in mine.parent.glob("loops-*"):
        with contextlib.suppress(OSError):
            if other != mine and time.time() - (other / _USED).stat().st_mtime > _UNUSED_SECONDS:
                shutil.rmtree(other)


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    """Switch the search for reference cycles off: it takes a fifth of the time to load numba."""
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


def _why(error: Exception) -> str:
    return getattr(error, "strerror", None) or type(error).__name__


@functools.cache
def _tell_once(message: str) -> None:
    sys.stderr.write(f"tdxtrace: {message}\n")
    sys.stderr.flush()
