"""A SEAMCALL of the lower layer belongs to the wrapper's call around it, if both were recorded."""

from __future__ import annotations

from tdxtrace.ingest.batch import BoolArray, I32Array, I64Array, U64Array


def wait_for_wrappers(
    thread: I32Array, is_inner: BoolArray, is_open: BoolArray, outer: I64Array
) -> None:
    """Mark as open also what lies inside a wrapper's call that has not returned yet.

    The wrapper names the request of the SEAMCALLs inside, so they wait for its return.

    Args:
        thread: Number of each event's thread, in the order of time.
        is_inner: Whether it is of the lower layer.
        is_open: By event: an entry that has not returned; more are marked.
        outer: By thread: -1; scratch.
    """
    for at in range(len(thread)):
        if is_open[at] and not is_inner[at]:
            outer[thread[at]] = at
    for at in range(len(thread)):
        if is_inner[at] and 0 <= outer[thread[at]] < at:
            is_open[at] = True


def find_enclosing(
    thread: I32Array,
    start: I64Array,
    end: I64Array,
    is_inner: BoolArray,
    row_at: I64Array,
    latest: I64Array,
    wrapper: I64Array,
) -> None:
    """Write which wrapper's call each SEAMCALL lies inside.

    It is the call of the thread that began last before the SEAMCALL, if it returned after it.

    Args:
        thread: Number of each row's thread.
        start: Place of each row's entry; -1: not recorded.
        end: Place of each row's return; -1: not recorded.
        is_inner: Whether the row is of the lower layer.
        row_at: By place of an event: -1; scratch.
        latest: By thread: -1; scratch.
        wrapper: By row: -1; the row of its wrapper's call is written.
    """
    for row in range(len(thread)):
        if end[row] >= 0:
            row_at[start[row] if start[row] >= 0 else end[row]] = row
    for at in range(len(row_at)):
        row = row_at[at]
        if row < 0:
            continue
        around = latest[thread[row]]
        if not is_inner[row]:
            if start[row] >= 0:
                latest[thread[row]] = row
        elif around >= 0 and end[around] > end[row]:
            wrapper[row] = around


def find_returned(
    thread: I32Array,
    start: I64Array,
    end: I64Array,
    is_inner: BoolArray,
    leaf: I32Array,
    status: U64Array,
    after: I64Array,
    ends_at: I64Array,
    wrapper: I64Array,
) -> None:
    """Write which wrapper's return, recorded without its entry, ended each SEAMCALL's call.

    It is the next row of the thread after SEAMCALLs of its leaf, with the status of the last:
    a wrapper hands on what its SEAMCALL answered, and could not have issued another one unseen.

    Args:
        thread: Number of each row's thread; rows are in the order of their last event.
        start: Place of each row's entry; -1: not recorded.
        end: Place of each row's return; -1: not recorded.
        is_inner: Whether the row is of the lower layer.
        leaf: Of each row.
        status: Of each row, 0 where it has none.
        after: By thread: -1; scratch.
        ends_at: By row: -1; scratch.
        wrapper: By row: written where it is -1.
    """
    for row in range(len(thread) - 1, -1, -1):
        follower = after[thread[row]]
        after[thread[row]] = row
        if follower < 0 or not is_inner[row] or end[row] < 0 or leaf[row] != leaf[follower]:
            continue
        if is_inner[follower]:
            ends_at[row] = ends_at[follower]
        elif start[follower] < 0 and status[row] == status[follower]:
            ends_at[row] = follower
        if wrapper[row] < 0:
            wrapper[row] = ends_at[row]
