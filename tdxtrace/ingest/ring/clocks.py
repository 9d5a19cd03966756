"""What moment a stamp of the ring buffer means, in ns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from tdxtrace.ingest.raw import I64Array, U64Array
from tdxtrace.ingest.ring.datoptions import Options, Shift

_FAR: Final = np.uint64((1 << 63) - 1)
_MASK: Final = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Clock:
    """How stamps become ns: scaled, if they count cycles, and moved.

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

    @property
    def is_plain(self) -> bool:
        """Whether stamps are ns as they are."""
        return not self.mult and not self.offset_ns

    def to_ns(self, stamps: U64Array) -> I64Array:
        """Return the moments of ``stamps``."""
        made = stamps if not self.mult else _scaled(stamps, self.mult, self.shift)
        if self.offset_ns:
            made = made + np.uint64(self.offset_ns & _MASK)
        ns: I64Array = (made if self.offset_ns else np.minimum(made, _FAR)).view(np.int64)
        return ns

    def one(self, stamp: int | None) -> int | None:
        """The moment of a single stamp."""
        return None if stamp is None else int(self.to_ns(np.array([stamp], np.uint64))[0])


def _scaled(stamps: U64Array, mult: int, shift: int) -> U64Array:
    """``stamps * mult >> shift`` without losing high bits (mul_u64_u32_shr in the kernel)."""
    low, high = stamps & np.uint64(0xFFFF_FFFF), stamps >> np.uint64(32)
    made = low * np.uint64(mult) >> np.uint64(shift)
    carried = high * np.uint64(mult)
    moved = carried << np.uint64(32 - shift) if shift <= 32 else carried >> np.uint64(shift - 32)
    total: U64Array = made + moved
    return total


def corrected(stamps: U64Array, shift: Shift) -> U64Array:
    """Return a guest CPU's stamps as the host's clock would have shown them.

    Between two corrections the one before holds, or a line from it to the next,
    as the recording says (trace-cmd, lib/trace-cmd/trace-input.c, timestamp_host_sync).
    """
    if not shift.time:
        return stamps
    offset = np.array(shift.offset, np.int64)
    if len(shift.time) == 1:
        made: U64Array = stamps + offset.view(np.uint64)[0]
        return made
    time = np.array(shift.time, np.uint64)
    low = np.clip(np.searchsorted(time, stamps, "right") - 1, 0, len(time) - 2)
    moved = offset[low]
    if shift.interpolate:
        delta = (time[low + 1] - time[low]).view(np.int64)
        rise = (stamps - time[low]).view(np.int64) * (offset[low + 1] - offset[low])
        moved = moved + _towards_zero(rise + delta // 2, delta)
    scaling = np.array([value & _MASK for value in shift.scaling], np.uint64)[low]
    fraction = np.array([min(value, 63) for value in shift.fraction], np.uint64)[low]
    scaled: U64Array = stamps * scaling >> fraction
    return scaled + moved.view(np.uint64)


def _towards_zero(value: I64Array, by: I64Array) -> I64Array:
    """Divide as C does."""
    made: I64Array = np.sign(value) * (np.abs(value) // np.maximum(by, 1))
    return made
