"""Types of numpy columns: times in ns, row numbers, and flags."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Times = NDArray[np.int64]
Index = NDArray[np.intp]
Flags = NDArray[np.bool_]
