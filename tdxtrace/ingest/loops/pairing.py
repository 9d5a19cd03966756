"""A return belongs to the last open entry of its function in its thread."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from tdxtrace.ingest.batch import BoolArray, I32Array, I64Array

U8Array = NDArray[np.uint8]

# What became of an event.
ENTRY_OF_PAIR: Final = 0
OPEN: Final = 1
"""An entry that may still return."""
RETURN_OF_PAIR: Final = 2
GIVEN_UP: Final = 3
"""An entry that cannot return any more."""
ORPHAN: Final = 4
"""A return without an entry."""


def pair(
    thread: I32Array,
    event: I32Array,
    function: I32Array,
    is_return: BoolArray,
    depth: int,
    top: I64Array,
    below: I64Array,
    partner: I64Array,
    fate: U8Array,
) -> None:
    """Write the entry of each return, and what became of every event.

    A return also ends the calls that were opened after its entry and never returned: they
    cannot return any more.

    Args:
        thread: Number of each event's thread, in the order of time.
        event: Kind of each event, which indexes ``function`` and ``is_return``.
        function: What is called, comparable between entry and return.
        is_return: Whether the event is a return.
        depth: Most open calls of one function in one thread; the oldest beyond that is given up.
        top: By thread: its last open entry; -1 before any.
        below: By entry: the one that was open before it in its thread; written only.
        partner: By event: of a return the place of its entry; otherwise unchanged.
        fate: By event: one of the constants above.
    """
    for at in range(len(event)):
        kind = event[at]
        mine = thread[at]
        last = top[mine]
        if not is_return[kind]:
            if last >= 0:
                _give_up_oldest(event, function, function[kind], depth, mine, top, below, fate)
            below[at] = top[mine]
            top[mine] = at
            fate[at] = OPEN
            continue
        what = function[kind]
        found = last
        while found >= 0 and function[event[found]] != what:
            found = below[found]
        if found < 0:
            fate[at] = ORPHAN
            continue
        while last != found:
            fate[last] = GIVEN_UP
            last = below[last]
        top[mine] = below[found]
        partner[at] = found
        fate[found] = ENTRY_OF_PAIR
        fate[at] = RETURN_OF_PAIR


def _give_up_oldest(
    event: I32Array,
    function: I32Array,
    what: int,
    depth: int,
    thread: int,
    top: I64Array,
    below: I64Array,
    fate: U8Array,
) -> None:
    """Give up the oldest open entry of function ``what`` if ``depth`` of them are open."""
    n_open = 0
    oldest = above_oldest = above = np.int64(-1)
    place = top[thread]
    while place >= 0:
        if function[event[place]] == what:
            n_open += 1
            oldest, above_oldest = place, above
        above, place = place, below[place]
    if n_open < depth:
        return
    fate[oldest] = GIVEN_UP
    if above_oldest < 0:
        top[thread] = below[oldest]
    else:
        below[above_oldest] = below[oldest]
