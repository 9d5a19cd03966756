"""A wrapper and the SEAMCALLs inside it, both recorded: the SEAMCALLs stand for the call."""

from __future__ import annotations

from typing import Final

import numpy as np

from tdxtrace.ingest.decoding.pairing import Index
from tdxtrace.ingest.raw import BoolArray, I64Array, U64Array

ABSENT: Final = np.iinfo(np.intp).min


def parents_of_pairs(thread: I64Array, start: Index, end: Index, inner: BoolArray) -> Index:
    """Find the wrapper's call that each SEAMCALL lies inside.

    Args:
        thread: Of each row.
        start: Position of each row's entry, ABSENT where none was seen.
        end: Position of each row's return, ABSENT where none was seen.
        inner: Which rows are SEAMCALLs of the lower layer.

    Returns:
        For each row the row of its wrapper's call, ABSENT where it has none.
    """
    found = np.full(len(start), ABSENT)
    outer = np.flatnonzero(~inner & (start != ABSENT) & (end != ABSENT))
    inside = np.flatnonzero(inner & (end != ABSENT))
    if not (len(outer) and len(inside)):
        return found
    outer = outer[np.lexsort((start[outer], thread[outer]))]
    first = np.where(start[inside] != ABSENT, start[inside], end[inside])
    place = _search(thread[outer], start[outer], thread[inside], first) - 1
    parent = outer[np.maximum(place, 0)]
    fits = (place >= 0) & (thread[parent] == thread[inside]) & (end[parent] > end[inside])
    found[inside[fits]] = parent[fits]
    return found


def parents_of_returns(
    thread: I64Array,
    start: Index,
    end: Index,
    inner: BoolArray,
    leaf: U64Array,
    status: U64Array,
) -> Index:
    """Find the wrapper's return, recorded without its entry, that ended each SEAMCALL's call.

    It is the next thing in the thread after SEAMCALLs of its leaf, with the status
    of the last: the wrapper hands on what its SEAMCALL answered, and could not have
    issued another one unseen.

    Returns:
        As :func:`parents_of_pairs`.
    """
    found = np.full(len(start), ABSENT)
    at = np.where(end != ABSENT, end, start)
    order = np.lexsort((at, thread))
    bare = ~inner & (start == ABSENT)
    here, after = order[:-1], order[1:]
    linked = inner[here] & (end[here] != ABSENT) & (inner | bare)[after]
    linked &= (thread[here] == thread[after]) & (leaf[here] == leaf[after])
    linked &= inner[after] | (status[here] == status[after])
    # The row that ends a run of linked rows is the parent of the others if it is a wrapper's.
    ends = np.append(~linked, True)
    last = order[np.flatnonzero(ends)][np.cumsum(ends) - ends]
    child = bare[last] & (last != order)
    found[order[child]] = last[child]
    return found


def _search(thread: I64Array, at: Index, of_thread: I64Array, of: Index) -> Index:
    """Where ``(of_thread, of)`` would be put after its equals among sorted ``(thread, at)``."""
    n = np.int64(max(int(at.max()), int(of.max())) + 1)
    ids = np.unique(np.concatenate([thread, of_thread]), return_inverse=True)[1]
    mine, others = ids[: len(thread)], ids[len(thread) :]
    return np.searchsorted(mine * n + at, others * n + of, side="right")
