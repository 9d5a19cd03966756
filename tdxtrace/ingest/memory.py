"""How memory is given back while much is read: not between one batch and the next."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

N = TypeVar("N", bound=np.number)

# Below 32 MiB (DEFAULT_MMAP_THRESHOLD_MAX on 64 bits), the largest size that moves the
# thresholds: mallopt(3), M_MMAP_THRESHOLD.
_BYTES: Final = 31 << 20
# Entries that the calls still open when a batch ends may need before those of the next: one
# for each CPU of a large host.  Where there are more, both batches are copied.
ROOM: Final = 256


def keep_freed() -> None:
    """Let the allocator of the C library keep what a batch frees for the next one.

    glibc gives freed memory back to the kernel as soon as there is more of it than twice
    the largest piece that was ever freed; every batch would then pay for its page faults
    again.  To free one large piece, which was never touched, ends that; at most twice its
    size is then kept.  Other C libraries are not impressed.
    """
    np.empty(_BYTES, np.uint8)


@contextmanager
def without_collector() -> Iterator[None]:
    """Let Python not look for circles of objects meanwhile, as modules that are loaded are.

    What reading makes is in none, and to look through hundreds of thousands of objects again
    and again took a twentieth of the time.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def roomy(n: int, wanted: DTypeLike) -> NDArray[Any]:
    """An array of ``n`` entries with room for others before them."""
    return np.empty(n + ROOM, wanted)[ROOM:]


def behind(first: NDArray[N], values: NDArray[N]) -> NDArray[N]:
    """Values behind others: where they are, if :func:`roomy` made them and those fit."""
    owner, n = values.base, len(first)
    is_roomy = (
        isinstance(owner, np.ndarray)
        and owner.nbytes == values.nbytes + ROOM * values.itemsize
        and values.ctypes.data == owner.ctypes.data + ROOM * values.itemsize
    )
    if owner is None or not is_roomy or n > ROOM:
        return np.concatenate([first, values])
    both: NDArray[N] = owner.view(values.dtype)[ROOM - n :]
    both[:n] = first
    return both
