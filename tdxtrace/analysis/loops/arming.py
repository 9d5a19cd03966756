"""Entries of vCPUs that zero-step mitigation may have armed, from the entries before each."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FAULTED, MOVED, STOOD, REFUSED, NOT_ENTERED = range(5)
"""How an entry ended: with an EPT violation; with an exit that an executed instruction causes;
with another; it was answered busy on the SEPT tree; it did not enter, or nobody knows."""
ARMED, PERHAPS_ARMED, ARMED_UNKNOWN, NOT_ARMED = range(4)
"""Grades of an entry, :func:`~tdxtrace.analysis.causes.candidates.armed_entries`."""
_RUN, _FAULTS, _WAS_REFUSED = range(3)


def grade_armed_entries(
    thread: NDArray[np.int32],
    what: NDArray[np.uint8],
    armed_after: int,
    state: NDArray[np.int32],
    refused_in_run: NDArray[np.bool_],
    armed: NDArray[np.uint8],
) -> None:
    """Write the grade of each entry.

    A run is the entries of one thread from one that executed something to the next such.

    Args:
        thread: Number of the thread of each entry, from 0; entries are in the order of time.
        what: How it ended, as above.
        armed_after: Faults of a run after which the next entry is armed.
        state: By kind and thread: scratch: run, faults in it, whether the last was refused.
        refused_in_run: By run, as many as entries and threads: False; scratch.
        armed: Written: the grade.
    """
    n_threads = state.shape[1]
    for turn in range(2):
        # Whether an entry of the run is refused may show later: the first turn finds that out.
        n_runs = n_threads
        for own in range(n_threads):
            state[_RUN, own] = own
            state[_FAULTS, own] = state[_WAS_REFUSED, own] = 0
        for row in range(len(thread)):
            own = thread[row]
            run = state[_RUN, own]
            if turn == 0:
                refused_in_run[run] |= what[row] == REFUSED
            elif what[row] >= REFUSED:
                armed[row] = NOT_ARMED
            elif state[_WAS_REFUSED, own]:
                armed[row] = ARMED
            elif state[_FAULTS, own] >= armed_after and refused_in_run[run]:
                armed[row] = PERHAPS_ARMED
            # Its first run began before the trace, with faults that nobody counted.
            elif state[_FAULTS, own] >= armed_after or run < n_threads:
                armed[row] = ARMED_UNKNOWN
            else:
                armed[row] = NOT_ARMED
            state[_FAULTS, own] += what[row] == FAULTED
            state[_WAS_REFUSED, own] = what[row] == REFUSED
            if what[row] == MOVED:
                state[_RUN, own] = n_runs
                state[_FAULTS, own] = 0
                n_runs += 1
