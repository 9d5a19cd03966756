"""Conversion of timestamps of the ring buffer to ns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from tdxtrace.ingest.batch import I64Array, U64Array
from tdxtrace.ingest.loops.pages import FAR, Shifts
from tdxtrace.ingest.tracedat.options import Options, Shift

_MASK: Final = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Clock:
    """How timestamps become ns: scaled, if they count cycles, and moved.

    The offset of TSC2NSEC is not applied, as trace-cmd report does not (lib/trace-cmd/
    trace-input.c, timestamp_calc): its times and ours are the same.
    """

    mult: int = 0
    shift: int = 0
    offset_ns: int = 0

    @classmethod
    def of(cls, options: Options) -> Clock:
        """The clock that the options of a trace.dat describe."""
        usable = options.tsc_shift < 64
        mult = options.tsc_mult if usable else 0
        return cls(mult, options.tsc_shift if usable else 0, options.offset_ns)

    def to_ns(self, timestamps: I64Array) -> I64Array:
        """Convert ``timestamps``, which are not negative."""
        if not self.mult and not self.offset_ns:
            return timestamps
        made = timestamps.view(np.uint64)
        made = made if not self.mult else _scaled(made, self.mult, self.shift)
        if self.offset_ns:
            made = made + np.uint64(self.offset_ns & _MASK)
        ns: I64Array = (made if self.offset_ns else np.minimum(made, np.uint64(FAR))).view(np.int64)
        return ns

    def one(self, timestamp: int) -> int | None:
        """Convert a single timestamp; None if it is negative: there is none."""
        return None if timestamp < 0 else int(self.to_ns(np.array([timestamp], np.int64))[0])


def _scaled(timestamps: U64Array, mult: int, shift: int) -> U64Array:
    """``timestamps * mult >> shift`` without losing high bits (mul_u64_u32_shr in the kernel)."""
    low, high = timestamps & np.uint64(0xFFFF_FFFF), timestamps >> np.uint64(32)
    made = low * np.uint64(mult) >> np.uint64(shift)
    carried = high * np.uint64(mult)
    moved = carried << np.uint64(32 - shift) if shift <= 32 else carried >> np.uint64(shift - 32)
    total: U64Array = made + moved
    return total


def shifts_of(sources: Sequence[Shift | None]) -> Shifts:
    """Put the corrections of the sources' clocks into arrays for ``loops.pages``."""
    each = [Shift(False, (), (), (), ()) if shift is None else shift for shift in sources]
    return (
        np.cumsum([0, *(len(shift.time) for shift in each)], dtype=np.int64),
        np.array([shift.interpolate for shift in each], np.int64),
        np.array([time for shift in each for time in shift.time], np.uint64),
        np.array([offset for shift in each for offset in shift.offset], np.int64),
        np.array([factor & _MASK for shift in each for factor in shift.scaling], np.uint64),
        np.array([min(bits, 63) for shift in each for bits in shift.fraction], np.uint64),
    )
