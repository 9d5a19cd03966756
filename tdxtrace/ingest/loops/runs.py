"""Decide which returns of tdx_vcpu_run entered a vCPU, and which repeat an earlier return.

While a zap holds vCPUs off, tdx_vcpu_run returns at once, with the status of the previous entry and
without a kvm_entry (Linux 6.16 arch/x86/kvm/vmx/tdx.c, wait_for_sept_zap).  tdx_handle_exit follows
each return (arch/x86/kvm/x86.c, vcpu_enter_guest).
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from tdxtrace.ingest.batch import I32Array, I64Array, U64Array

# Kinds of events.
IN_GUEST: Final = 0
"""kvm_entry or kvm_exit: the vCPU was entered."""
RETURNED: Final = 1
"""tdx_vcpu_run returned."""
HANDLED: Final = 2
"""tdx_handle_exit was called or returned."""

# Fates of events.
ENTERED: Final = 0
"""It belongs to a vCPU entry."""
TOLD_AGAIN: Final = 1
"""It repeats the entry that the previous event already reported."""
STALE: Final = 2
"""It belongs to no entry."""
UNDECIDED: Final = 3
"""It belongs to no entry if kvm_entry is still recorded; the thread's next events decide that."""
UNRECORDED: Final = 4
"""It belongs to an entry whose kvm_entry was not recorded, as its status is a new one."""

# Columns of the state of a thread.
SEEN, PASSED, LAST, STATUS, TIME = range(5)
N_STATES: Final = 5
Bytes = NDArray[np.uint8]


def judge_returns(
    thread: I32Array,
    what: Bytes,
    status: U64Array,
    ts_ns: I64Array,
    cpu: I64Array,
    lost_from: I64Array,
    lost_to: I64Array,
    first_lost: I64Array,
    state: I64Array,
    coming: Bytes,
    fate: Bytes,
) -> None:
    """Write the fate of each event.

    A return belongs to no entry if the kvm_entry events of its thread are recorded, none came since
    the previous return, the status equals that of the previous return, and the CPU lost no events
    in between: kvm_entry comes from the same function, on the same CPU.  A new status without a
    kvm_entry shows that kvm_entry is no longer recorded: the undecided returns did enter.

    Args:
        thread: Index of each event's thread; events are in the order of the source.
        what: By event: its kind, one of the first constants above.
        status: By event: status of TDH.VP.ENTER; meaningless for IN_GUEST.
        ts_ns: By event: its time, ns.
        cpu: By event: its CPU, -1: not recorded.
        lost_from: Start of each window in which events were lost, grouped by CPU, first those of
            CPU -1, which apply to every CPU; windows of one CPU do not overlap.
        lost_to: End of each window, ascending within a CPU.
        first_lost: By CPU + 1: its first window; one more entry than CPUs.
        state: By thread and column: carried from batch to batch, initially 0.
        coming: By thread, written: the fate of its undecided returns of earlier batches,
            UNDECIDED while it is unknown.
        fate: By event, written: one of the fates above.
    """
    for at in range(len(thread)):
        mine = thread[at]
        if what[at] == IN_GUEST:
            state[mine, SEEN] = state[mine, PASSED] = 1
            fate[at] = ENTERED
            continue
        told = np.int64(status[at])
        last = state[mine, LAST]
        is_same = last != IN_GUEST and state[mine, STATUS] == told
        since, until = state[mine, TIME], ts_ns[at]
        is_lost = _overlap(lost_from, lost_to, first_lost[0], first_lost[1], since, until)
        place = cpu[at] + 1
        if 0 < place < len(first_lost) - 1:
            low, high = first_lost[place], first_lost[place + 1]
            is_lost |= _overlap(lost_from, lost_to, low, high, since, until)
        if state[mine, PASSED] or is_lost:
            fate[at] = ENTERED
        elif is_same and what[at] == HANDLED and last == RETURNED:
            fate[at] = TOLD_AGAIN
        elif not state[mine, SEEN] or last == IN_GUEST:
            fate[at] = ENTERED
        elif is_same:
            fate[at] = UNDECIDED
        else:
            fate[at] = UNRECORDED
            state[mine, SEEN] = 0
        state[mine, PASSED] = 0
        state[mine, LAST] = what[at]
        state[mine, STATUS] = told
        state[mine, TIME] = ts_ns[at]
    coming[:] = UNDECIDED
    for at in range(len(thread) - 1, -1, -1):
        mine = thread[at]
        if what[at] == IN_GUEST:
            coming[mine] = STALE
        elif fate[at] == UNRECORDED:
            coming[mine] = ENTERED
            fate[at] = ENTERED
        elif fate[at] == UNDECIDED:
            fate[at] = coming[mine]


def _overlap(
    lost_from: I64Array,
    lost_to: I64Array,
    low: np.int64,
    high: np.int64,
    start: np.int64,
    end: np.int64,
) -> bool:
    """Return whether any window from index ``low`` to ``high`` overlaps ``start`` to ``end``."""
    last = high
    while low < high:
        middle = (low + high) // 2
        if lost_to[middle] <= start:
            low = middle + 1
        else:
            high = middle
    return bool(low < last and lost_from[low] < end)
