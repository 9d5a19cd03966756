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
REPEATED: Final = 1
"""It repeats the entry that the previous event already reported."""
STALE: Final = 2
"""It belongs to no entry."""
UNDECIDED: Final = 3
"""It belongs to no entry if kvm_entry is still recorded; the thread's next events decide that."""
UNRECORDED: Final = 4
"""It belongs to an entry whose kvm_entry was not recorded, as its status is a new one."""

# Columns of the state of a thread.
ENTRIES_RECORDED, ENTERED_SINCE, LAST, STATUS, TIME = range(5)
N_STATES: Final = 5
Bytes = NDArray[np.uint8]


def classify_returns(
    thread: I32Array,
    kind: Bytes,
    status: U64Array,
    ts_ns: I64Array,
    cpu: I64Array,
    loss_start: I64Array,
    loss_end: I64Array,
    first_loss: I64Array,
    state: I64Array,
    pending_fate: Bytes,
    fate: Bytes,
) -> None:
    """Write the fate of each event.

    A return belongs to no entry if the kvm_entry events of its thread are recorded, none came since
    the previous return, the status equals that of the previous return, and the CPU lost no events
    in between: kvm_entry comes from the same function, on the same CPU.  A new status without a
    kvm_entry shows that kvm_entry is no longer recorded: the undecided returns did enter.

    Args:
        thread: Index of each event's thread; events are in the order of the source.
        kind: By event: its kind, one of the first constants above.
        status: By event: status of TDH.VP.ENTER; meaningless for IN_GUEST.
        ts_ns: By event: its time, ns.
        cpu: By event: its CPU, -1: not recorded.
        loss_start: Start of each window in which events were lost, grouped by CPU, first those of
            CPU -1, which apply to every CPU; windows of one CPU do not overlap.
        loss_end: End of each window, ascending within a CPU.
        first_loss: By CPU + 1: its first window; one more entry than CPUs.
        state: By thread and column: carried from batch to batch, initially 0.
        pending_fate: By thread, written: the fate of its undecided returns of earlier batches,
            UNDECIDED while it is unknown.
        fate: By event, written: one of the fates above.
    """
    for at in range(len(thread)):
        current = thread[at]
        if kind[at] == IN_GUEST:
            state[current, ENTRIES_RECORDED] = state[current, ENTERED_SINCE] = 1
            fate[at] = ENTERED
            continue
        new_status = np.int64(status[at])
        last = state[current, LAST]
        is_same = last != IN_GUEST and state[current, STATUS] == new_status
        since, until = state[current, TIME], ts_ns[at]
        is_lost = _overlap(loss_start, loss_end, first_loss[0], first_loss[1], since, until)
        cpu_row = cpu[at] + 1
        if 0 < cpu_row < len(first_loss) - 1:
            low, high = first_loss[cpu_row], first_loss[cpu_row + 1]
            is_lost |= _overlap(loss_start, loss_end, low, high, since, until)
        if state[current, ENTERED_SINCE] or is_lost:
            fate[at] = ENTERED
        elif is_same and kind[at] == HANDLED and last == RETURNED:
            fate[at] = REPEATED
        elif not state[current, ENTRIES_RECORDED] or last == IN_GUEST:
            fate[at] = ENTERED
        elif is_same:
            fate[at] = UNDECIDED
        else:
            fate[at] = UNRECORDED
            state[current, ENTRIES_RECORDED] = 0
        state[current, ENTERED_SINCE] = 0
        state[current, LAST] = kind[at]
        state[current, STATUS] = new_status
        state[current, TIME] = ts_ns[at]
    pending_fate[:] = UNDECIDED
    for at in range(len(thread) - 1, -1, -1):
        current = thread[at]
        if kind[at] == IN_GUEST:
            pending_fate[current] = STALE
        elif fate[at] == UNRECORDED:
            pending_fate[current] = ENTERED
            fate[at] = ENTERED
        elif fate[at] == UNDECIDED:
            fate[at] = pending_fate[current]


def _overlap(
    loss_start: I64Array,
    loss_end: I64Array,
    low: np.int64,
    high: np.int64,
    start: np.int64,
    end: np.int64,
) -> bool:
    """Return whether any window from index ``low`` to ``high`` overlaps ``start`` to ``end``."""
    last = high
    while low < high:
        middle = (low + high) // 2
        if loss_end[middle] <= start:
            low = middle + 1
        else:
            high = middle
    return bool(low < last and loss_start[low] < end)
