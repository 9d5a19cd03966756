"""Which returns of tdx_vcpu_run entered a vCPU, and which told of an entry a second time.

While a zap holds vCPUs off, tdx_vcpu_run returns at once, with the status of the entry before and
without a kvm_entry (Linux 6.16 arch/x86/kvm/vmx/tdx.c, wait_for_sept_zap).  tdx_handle_exit follows
each return (arch/x86/kvm/x86.c, vcpu_enter_guest).
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from tdxtrace.ingest.batch import I32Array, I64Array, U64Array

# What an event is.
IN_GUEST: Final = 0
"""kvm_entry or kvm_exit: the vCPU was entered."""
RETURNED: Final = 1
"""tdx_vcpu_run returned."""
HANDLED: Final = 2
"""tdx_handle_exit was called or returned."""

# What became of it.
ENTERED: Final = 0
TOLD_AGAIN: Final = 1
"""Of an entry that the event before told of."""
STALE: Final = 2
"""Of no entry."""
UNDECIDED: Final = 3
"""Of no entry, if kvm_entry is still recorded: its thread's next events tell."""
UNRECORDED: Final = 4
"""Of an entry whose kvm_entry was not recorded, as its status is a new one."""

# Columns of the state of threads.
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
    """Write what became of each event.

    A return is of no entry if its thread's kvm_entry are recorded, none came since the return
    before, its status is that of the return before, and its CPU lost no events meanwhile: kvm_entry
    comes from the same function, on the same CPU.  A new status without kvm_entry shows that these
    are no longer recorded: what was undecided did enter.

    Args:
        thread: Number of each event's thread, in the order of the source.
        what: One of the first constants above.
        status: Status of TDH.VP.ENTER; of no meaning for IN_GUEST.
        ts_ns: Time of each event.
        cpu: Its CPU, -1: not recorded.
        lost_from: Start of each window in which events were lost, by CPU, -1 first: any; those of
            one CPU do not overlap.
        lost_to: Its end, ascending within a CPU.
        first_lost: By CPU + 1: its first window; one more entry than CPUs.
        state: By thread and column: carried from batch to batch, 0 at first.
        coming: By thread: written: what its undecided returns of earlier batches are, UNDECIDED
            while that is not known.
        fate: By event: written: one of the constants above.
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
    """Whether any of the windows from place ``low`` to ``high`` overlaps the time between."""
    last = high
    while low < high:
        middle = (low + high) // 2
        if lost_to[middle] <= start:
            low = middle + 1
        else:
            high = middle
    return bool(low < last and lost_from[low] < end)
