"""The loops over samples that wait for their turn, compiled.

Imported only where compiled.pays says so.  No loop checks bounds; each says in its
docstring what keeps it inside its arrays.
"""

from __future__ import annotations

import numpy as np

from tdxtrace.ingest.compiled import compiled, inlined
from tdxtrace.ingest.perf.loops import BARE, HEAD, LOW, MAX_CPUS, Columns
from tdxtrace.ingest.raw import BoolArray, I32Array, I64Array
from tdxtrace.ingest.records.loops import met


@compiled
def sort(
    ts_ns: I64Array,
    place: I64Array,
    n: int,
    limit: int,
    time: I64Array,
    order: I64Array,
    spare: I64Array,
    bounds: I64Array,
) -> int:
    """Order samples by time, those of one moment as they are.

    Samples come as ascending runs, one of each CPU's buffer; what runs have in common
    is merged, so that runs that follow one another cost nothing.

    Args:
        ts_ns: Of samples.
        place: And what is to be ordered with them.
        n: How many they are.
        limit: Only those up to this moment.
        time: Filled with their times, in order …
        order: … and their places; as long as ``ts_ns``.
        spare: Twice as long.
        bounds: One longer than ``ts_ns``.

    Returns:
        How many they are.
    """
    m, runs = 0, 0
    for i in range(n):
        if ts_ns[i] <= limit:
            if m == 0 or ts_ns[i] < time[m - 1]:
                bounds[runs] = m
                runs += 1
            time[m], order[m] = ts_ns[i], place[i]
            m += 1
    bounds[runs] = m
    while runs > 1:
        for j in range(0, runs - 1, 2):
            _merge(time, order, bounds[j], bounds[j + 1], bounds[j + 2], spare)
        left = 0
        for j in range(0, runs, 2):
            bounds[left] = bounds[j]
            left += 1
        bounds[left] = m
        runs = left
    return m


@inlined
def _after(time: I64Array, low: int, high: int, moment: int) -> int:
    """The first of ascending times that is later than a moment."""
    while low < high:
        middle = (low + high) >> 1
        if time[middle] <= moment:
            low = middle + 1
        else:
            high = middle
    return low


@compiled
def _merge(
    time: I64Array, order: I64Array, first: int, middle: int, end: int, spare: I64Array
) -> None:
    """Merge two neighbouring runs, neither of which is empty, in place."""
    # numpy's searchsorted would be loaded with all that numba knows of arrays.
    first = _after(time, first, middle, time[middle])
    end = _after(time, middle, end, time[middle - 1] - 1)
    n = middle - first
    other = len(spare) >> 1
    for i in range(n):
        spare[i], spare[other + i] = time[first + i], order[first + i]
    i, j, to = 0, middle, first
    while i < n and j < end:
        later = time[j] < spare[i]
        time[to] = time[j] if later else spare[i]
        order[to] = order[j] if later else spare[other + i]
        j += later
        i += not later
        to += 1
    while i < n:
        time[to], order[to] = spare[i], spare[other + i]
        i += 1
        to += 1


@compiled
def give(
    time: I64Array,
    order: I64Array,
    n_before: int,
    store: I64Array,
    event: I32Array,
    found: I64Array,
    heard: Columns,
    rows: Columns,
    threads: tuple[BoolArray, I32Array],
) -> tuple[int, int]:
    """Put the heads of samples one after the other, and see what numbers and CPUs there are.

    Args:
        time: When samples were taken, in order.
        order: Where they are in ``store``; as long.
        n_before: Samples before these.
        store: As loops.hold fills it.
        event: Of each layout.
        found: Counts each number; longer than any that loops.hold was told.
        heard: When each CPU was heard of first, and last; MAX_CPUS and one more for all.
        rows: Filled for the samples that become rows: line, ts_ns, tid, tgid, cpu, in_irq,
            event, base (of its record, in bytes of ``store``) and layout; with room for them.
        threads: By thread number, up to some, whether a row has it, false at first; and,
            filled, the numbers that rows have: unusual ones more than once.

    Returns:
        How many rows, and how many of these numbers.
    """
    is_met, tids = threads
    first_ns, last_ns = heard
    line, ts_out, tid_out, tgid_out, cpu_out, irq_out, event_out, base, layout_out = rows
    n, n_tids = 0, 0
    for k in range(len(order)):
        ts_ns, at = time[k], order[k]
        cpu = np.int32(store[at])
        found[store[at] >> 32] += 1
        if cpu >= 0:
            first_ns[cpu] = min(first_ns[cpu], ts_ns)
            last_ns[cpu] = max(last_ns[cpu], ts_ns)
        which = store[at + 1]
        if which < 0:
            continue
        irq_out[n] = (which >> 32) - 1
        which &= LOW
        line[n], ts_out[n], cpu_out[n], event_out[n] = n_before + k + 1, ts_ns, cpu, event[which]
        tid = np.int32(store[at + 2] >> 32)
        tgid_out[n], tid_out[n] = np.int32(store[at + 2]), tid
        n_tids = met(tid, is_met, tids, n_tids)
        base[n], layout_out[n] = (at + HEAD) << 3, which
        n += 1
    if len(order):
        first_ns[MAX_CPUS] = min(first_ns[MAX_CPUS], time[0])
        last_ns[MAX_CPUS] = max(last_ns[MAX_CPUS], time[len(order) - 1])
    return n, n_tids


@compiled
def keep(
    n: int,
    limit: int,
    ts_ns: I64Array,
    place: I64Array,
    store: I64Array,
    words: I64Array,
    into: I64Array,
) -> tuple[int, int, int]:
    """Drop the samples up to ``limit``: the others move up in the columns, and into a new store.

    Args:
        n: Samples that wait.
        limit: The moment.
        ts_ns: When each was taken …
        place: … and where it is in ``store``.
        store: As loops.hold fills it.
        words: Of each layout's records.
        into: Filled as that; with room for what the samples use of it.

    Returns:
        Samples that wait then, words that they use, and how many of them become rows.
    """
    left, used, n_rows = 0, 0, 0
    for i in range(n):
        if ts_ns[i] <= limit:
            continue
        at, size = place[i], BARE
        if store[at + 1] >= 0:
            size = HEAD + words[store[at + 1] & LOW]
            n_rows += 1
        ts_ns[left], place[left] = ts_ns[i], used
        left += 1
        for word in range(at, at + size):
            into[used] = store[word]
            used += 1
    return left, used, n_rows
