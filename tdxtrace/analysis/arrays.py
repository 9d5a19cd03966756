"""Types of numpy columns: times in ns, row numbers, and flags."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Times = NDArray[np.int64]
Index = NDArray[np.intp]
Flags = NDArray[np.bool_]
Rows = NDArray[np.uint32]


def read_only(*arrays: NDArray[Any]) -> tuple[NDArray[Any], ...]:
    """Return contiguous read-only views, so that loops are compiled for one kind of array only."""
    views = tuple(np.ascontiguousarray(array).view() for array in arrays)
    for view in views:
        view.flags.writeable = False
    return views
