"""Arrays with room before them, and reading without looking for reference cycles."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

N = TypeVar("N", bound=np.number)

# Entries that the calls still open when a batch ends may need before those of the next: one
# for each CPU of a large host.  Where there are more, both batches are copied.
ROOM: Final = 256


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
