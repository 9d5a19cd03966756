"""Grade each vCPU entry by whether the preceding entries armed zero-step mitigation."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FAULTED, MOVED, UNMOVED, REFUSED, NOT_ENTERED = range(5)
"""How an entry ended, in this order: EPT violation; exit caused by an executed instruction; other
exit; refused as busy on the SEPT tree; did not enter, or unknown."""
ARMED, PERHAPS_ARMED, ARMED_UNKNOWN, NOT_ARMED = range(4)
"""Grades of an entry; see :func:`~tdxtrace.analysis.causes.candidates.armed_entries`."""
_RUN, _FAULTS, _WAS_REFUSED = range(3)


def grade_armed_entries(
    thread: NDArray[np.int32],
    kind: NDArray[np.uint8],
    armed_after: int,
    state: NDArray[np.int32],
    refused_in_run: NDArray[np.bool_],
    armed: NDArray[np.uint8],
) -> None:
    """Write the grade of each entry.

    A run is the entries of one thread after an entry that executed an instruction, up to and
    including the next such entry.

    Args:
        thread: Thread number of each entry, from 0; entries are in time order.
        kind: How each entry ended: FAULTED to NOT_ENTERED.
        armed_after: Number of faults in a run after which the next entry is armed.
        state: Scratch, shape (3, number of threads): the current run, its faults, and whether the
            last entry was refused.
        refused_in_run: Scratch, all False on input; length: number of entries plus threads.
        armed: Output: grade of each entry.
    """
    n_threads = state.shape[1]
    for turn in range(2):
        # A grade depends on refusals later in the run: the first pass records them.
        n_runs = n_threads
        for own in range(n_threads):
            state[_RUN, own] = own
            state[_FAULTS, own] = state[_WAS_REFUSED, own] = 0
        for row in range(len(thread)):
            own = thread[row]
            run = state[_RUN, own]
            if turn == 0:
                refused_in_run[run] |= kind[row] == REFUSED
            elif kind[row] >= REFUSED:
                armed[row] = NOT_ARMED
            elif state[_WAS_REFUSED, own]:
                armed[row] = ARMED
            elif state[_FAULTS, own] >= armed_after and refused_in_run[run]:
                armed[row] = PERHAPS_ARMED
            # The first run of a thread began before the trace; its earlier faults are unknown.
            elif state[_FAULTS, own] >= armed_after or run < n_threads:
                armed[row] = ARMED_UNKNOWN
            else:
                armed[row] = NOT_ARMED
            state[_FAULTS, own] += kind[row] == FAULTED
            state[_WAS_REFUSED, own] = kind[row] == REFUSED
            if kind[row] == MOVED:
                state[_RUN, own] = n_runs
                state[_FAULTS, own] = 0
                n_runs += 1
