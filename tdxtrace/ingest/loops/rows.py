"""A row is an entry with its return, or one of them alone: when and where, and whose thread."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from tdxtrace.ingest.batch import UNKNOWN, BoolArray, I8Array, I32Array, I64Array

OBSERVED: Final = ("start_ns", "end_ns", "start_cpu", "cpu", "tid", "tgid", "in_irq")
"""What may not be known of a row, in the order of the rows of ``seen``."""
_START, _END, _START_CPU, _CPU, _TID, _TGID, _IN_IRQ = range(len(OBSERVED))
_MAX_CPU: Final = 0xFFFF


def make_rows(
    start: I64Array,
    end: I64Array,
    line: I64Array,
    ts_ns: I64Array,
    cpu: I32Array,
    tid: I32Array,
    tgid: I32Array,
    in_irq: I8Array,
    row_seq: I64Array,
    row_start_ns: I64Array,
    row_end_ns: I64Array,
    row_cpus: NDArray[np.uint16],
    row_ids: I32Array,
    row_in_irq: BoolArray,
    seen: BoolArray,
) -> None:
    """Write the columns of rows from the heads of their events.

    Args:
        start: Place of each row's entry; -1: not recorded.
        end: Place of each row's return; -1: not recorded.
        line: By event, as the next ones: its place in the source.
        ts_ns: When it was recorded, ns.
        cpu: Where; UNKNOWN: not told.
        tid: By which thread; UNKNOWN: not told.
        tgid: Of which process; UNKNOWN: not told.
        in_irq: 1 in interrupt context, UNKNOWN: not told.
        row_seq: By row, as the next ones: ``line`` of the last event.
        row_start_ns: Time of the entry, or of the return without one.
        row_end_ns: Time of the return, or of the entry without one.
        row_cpus: CPU of the entry, and of the last event: two rows.
        row_ids: Thread, and process: two rows.
        row_in_irq: Whether the return, or else the entry, was in interrupt context.
        seen: Where each of OBSERVED is known.  The start is not known if it is after the end,
            as clocks of two CPUs may disagree (trace_clock "local").
    """
    for row in range(len(start)):
        first, last = start[row], end[row]
        has_start, has_end = first >= 0, last >= 0
        if not has_start:
            first = last
        if not has_end:
            last = first
        began, ended = ts_ns[first], ts_ns[last]
        row_seq[row], row_start_ns[row], row_end_ns[row] = line[last], began, ended
        seen[_START, row] = has_start and began <= ended
        seen[_END, row] = has_end
        number = cpu[first]
        if has_start and 0 <= number <= _MAX_CPU:
            row_cpus[0, row], seen[_START_CPU, row] = number, True
        number = cpu[last]
        if 0 <= number <= _MAX_CPU:
            row_cpus[1, row], seen[_CPU, row] = number, True
        number = tid[last]
        row_ids[0, row], seen[_TID, row] = number, number != UNKNOWN
        number = max(tgid[first], tgid[last])
        row_ids[1, row], seen[_TGID, row] = number, number != UNKNOWN
        context = in_irq[last]
        if context == UNKNOWN:
            context = in_irq[first]
        if context != UNKNOWN:
            row_in_irq[row], seen[_IN_IRQ, row] = context == 1, True
