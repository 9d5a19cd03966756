"""Link the calls of each thread into chains of attempts at the same request.

A call is another attempt if the thread's last call for the same request may have to be repeated,
whatever else the thread called in between.  A call without the operands that identify its request,
where other calls of its leaf have them, continues no chain: it may belong to any open chain.

A thread that returns to a request after other calls may also return to a request that was open
before a gap.  ``Leaves.max_between`` records the largest number of calls in between.

The calls are passed in the order of their starts, in one or more batches.  The state that later
calls depend on is kept in three tables: threads, leaves of each thread, and open chains.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

NONE: Final = -1

# Bits for the recorded values of a call; first the operands that identify requests.
TD: Final = 1 << 0
GPA: Final = 1 << 1
LEVEL: Final = 1 << 2
VP: Final = 1 << 3
PAGE: Final = 1 << 4
TID: Final = 1 << 5
TGID: Final = 1 << 6
START: Final = 1 << 7
END: Final = 1 << 8
RETURNED: Final = 1 << 9
# Bits for properties of a call.
RETRYABLE: Final = 1 << 10
OPENS: Final = 1 << 11
"""The call begins a chain, as given by the caller."""
CLOSES: Final = 1 << 12
"""The call ends a chain, as given by the caller."""

# Values of ``Leaves.shared``: which other threads may make the same request.
BY_PAGE: Final = 1
BY_TD: Final = 2
# Values of ``Leaves.kind``: leaves that need special treatment.
ENTRY: Final = 1
FAULT: Final = 2

_Any = NDArray[np.void]
# Table row: a record in numba, possibly a dict in Python; and a row number.
_Row = Any
_Number = Any
_I64 = NDArray[np.int64]
_I32 = NDArray[np.int32]
_U64 = NDArray[np.uint64]
_U32 = NDArray[np.uint32]
_U16 = NDArray[np.uint16]
_U8 = NDArray[np.uint8]
_Flags = NDArray[np.bool_]


class CallColumns(NamedTuple):
    """Columns of calls in the order of their starts; a value is 0 if its bit in ``flags`` is 0."""

    owner: _U64
    """The thread, or the CPU if the call interrupted a thread."""
    leaf: _U16
    flags: _U16
    seq: _U64
    tid: _I32
    tgid: _I32
    td: _U64
    gpa: _U64
    level: _U8
    vp: _U64
    page: _U64
    begins: _I64
    ends: _I64
    status: _U64


class Leaves(NamedTuple):
    """Properties of each leaf, indexed by leaf number."""

    identifies: _U16
    """Operands that identify its requests."""
    captured: _U16
    """The identifying operands that at least one call of the leaf has in this capture."""
    shared: _U8
    kind: _U8
    max_between: _I64
    """Output: largest number of calls of the leaf between two attempts of a thread at one request,
    over attempts that were separated by any other call; NONE without such attempts."""


class CallPositions(NamedTuple):
    """Output: position of each call in its chain."""

    first_seq: _U64
    """``seq`` of the first call of the chain."""
    begins: _I64
    """Start of that call."""
    n_busy: _U32
    """Number of retryable answers in the chain so far."""


class Tables(NamedTuple):
    """State after the calls so far, with room for all rows that this batch can add."""

    owners: _Any
    pairs: _Any
    chains: _Any
    owner_heads: _I32
    pair_heads: _I32
    key_heads: _I32
    request_heads: _I32
    next_key: _I32
    """By chain: the next chain in its hash slot of ``key_heads``."""
    next_request: _I32
    counts: _I64
    """Numbers of owners, of pairs, of chains, and of successes already processed."""


OWNER: Final = np.dtype(
    [
        ("number", "u8"),
        ("next", "i4"),
        ("seen_ends", "i8"),
        ("seen_cpu", "i8"),
        ("is_seen", "u1"),
        ("last", "i8"),
        ("ends", "i8"),
        ("is_tainted", "u1"),
        ("n_gaps", "i8"),
        ("entries", "i8"),
        ("began", "i8"),
        ("began_other", "i8"),
        ("last_other", "i8"),
        ("opened", "i4"),
    ]
)
"""A thread: its last call, number of gaps in which events may be lost, and its last new request."""

PAIR: Final = np.dtype(
    [
        ("owner", "i4"),
        ("leaf", "u2"),
        ("next", "i4"),
        ("is_seen", "u1"),
        ("n_gaps", "i8"),
        ("n_open", "i8"),
        ("ambiguous", "i8"),
        ("last_ambiguous", "i8"),
        ("unidentified", "i4"),
        ("n", "i8"),
        ("n_before_gap", "i8"),
    ]
)
"""A leaf of a thread: number of open requests, calls that do not identify their request, and number
of calls."""

CHAIN: Final = np.dtype(
    [
        ("pair", "i4"),
        ("leaf", "u2"),
        ("flags", "u2"),
        ("operands", "u2"),
        ("known", "u2"),
        ("tid", "i4"),
        ("tgid", "i4"),
        ("process", "i4"),
        ("td", "u8"),
        ("gpa", "u8"),
        ("level", "u1"),
        ("vp", "u8"),
        ("page", "u8"),
        ("first_seq", "u8"),
        ("last_seq", "u8"),
        ("begins", "i8"),
        ("last_begins", "i8"),
        ("ends", "i8"),
        ("last_flags", "u2"),
        ("status", "u8"),
        ("n", "i8"),
        ("n_busy", "i8"),
        ("n_segments", "i8"),
        ("last", "i8"),
        ("at", "i8"),
        ("after_gap", "i8"),
        ("n_gaps", "i8"),
        ("entries", "i8"),
        ("by_loss", "u1"),
        ("by_start", "u1"),
        ("is_doubtful", "u1"),
        ("is_open", "u1"),
        ("is_followed", "u1"),
        ("is_unidentified", "u1"),
        ("is_shared", "u1"),
        ("is_lost", "u1"),
        ("until", "i8"),
        ("is_settled", "u1"),
        ("settled_seq", "u8"),
        ("settled_tid", "i4"),
        ("settled_flags", "u2"),
        ("settled_ends", "i8"),
        ("last_settled", "i8"),
        ("is_void", "u1"),
        ("next_opened", "i4"),
    ]
)
"""A request.  ``flags`` are the flags of its first call, whose operands and numbers follow.
``known`` has the bits TD, VP and TGID that any of its calls has.  ``at`` is the index of its last
call among the calls of its pair.  ``after_gap`` is the index of its first call among the calls of
its pair since a gap, NONE without a gap."""

SUCCESS: Final = np.dtype(
    [
        ("ends", "i8"),
        ("seq", "u8"),
        ("tid", "i4"),
        ("leaf", "u2"),
        ("flags", "u2"),
        ("td", "u8"),
        ("gpa", "u8"),
        ("level", "u1"),
        ("voids", "u1"),
    ]
)
"""A call that completed a request for all threads that make it, or made it void (``voids``)."""


def find_threads(calls: CallColumns, tables: Tables, pair_of: _I32) -> None:
    """Write the row number in ``pairs`` of each call; add new pairs and owners to the tables."""
    owners, pairs, counts = tables.owners, tables.pairs, tables.counts
    last_owner = np.uint64(len(tables.owner_heads) - 1)
    last_pair = np.uint64(len(tables.pair_heads) - 1)
    for row in range(len(calls.leaf)):
        number, leaf = calls.owner[row], calls.leaf[row]
        if row > 0 and number == calls.owner[row - 1] and leaf == calls.leaf[row - 1]:
            pair_of[row] = pair_of[row - 1]
            continue
        slot = mixed(np.uint64(number), np.uint64(leaf)) & last_pair
        found = tables.pair_heads[slot]
        while found != NONE and (
            pairs[found]["leaf"] != leaf or owners[pairs[found]["owner"]]["number"] != number
        ):
            found = pairs[found]["next"]
        if found == NONE:
            owner_slot = mixed(np.uint64(number), np.uint64(0)) & last_owner
            owner = tables.owner_heads[owner_slot]
            while owner != NONE and owners[owner]["number"] != number:
                owner = owners[owner]["next"]
            if owner == NONE:
                owner = counts[0]
                counts[0] += 1
                _begin_owner(owners[owner], number, tables.owner_heads[owner_slot])
                tables.owner_heads[owner_slot] = owner
            found = counts[1]
            counts[1] += 1
            _begin_pair(pairs[found], owner, leaf, tables.pair_heads[slot])
            tables.pair_heads[slot] = found
        pair_of[row] = found


def _begin_owner(owner: _Row, number: np.uint64, next_row: np.int32) -> None:
    owner["number"] = number
    owner["next"] = next_row
    owner["last"] = NONE
    owner["began"] = NONE
    owner["began_other"] = NONE
    owner["last_other"] = NONE
    owner["opened"] = NONE


def _begin_pair(
    pair: _Row,
    owner: _Number,
    leaf: np.uint16,
    next_row: np.int32,
) -> None:
    pair["owner"] = owner
    pair["leaf"] = leaf
    pair["next"] = next_row
    pair["ambiguous"] = NONE
    pair["last_ambiguous"] = NONE
    pair["unidentified"] = NONE


def find_previous_calls(
    pair_of: _I32, last_cpu: _I64, ends: _I64, tables: Tables, since: _I64, cpu: _I64
) -> None:
    """Write the end time and CPU of the previous call in each call's thread.

    Args:
        pair_of: Output of :func:`find_threads`.
        last_cpu: CPU on which each call ended.
        ends: End of each call.
        tables: State of earlier calls; the owners are updated.
        since: Output: end of the previous call; unchanged for the first call of a thread.
        cpu: Output: CPU on which the previous call ended; unchanged for the first call of a thread.
    """
    for row in range(len(pair_of)):
        owner = tables.owners[tables.pairs[pair_of[row]]["owner"]]
        if owner["is_seen"]:
            since[row] = owner["seen_ends"]
            cpu[row] = owner["seen_cpu"]
        owner["is_seen"] = 1
        owner["seen_ends"] = ends[row]
        owner["seen_cpu"] = last_cpu[row]


def rebuild_indexes(tables: Tables, n_chains: int, must_rebuild_owners: bool) -> None:
    """Add the chains that earlier batches left open to the empty hash tables of this batch.

    Args:
        tables: State of earlier calls; no owner and no pair refers to a chain.
        n_chains: Number of open chains.
        must_rebuild_owners: Whether the hash tables of owners and pairs are empty too, and must be
            filled.
    """
    if must_rebuild_owners:
        _enter_owners(tables)
        _enter_pairs(tables)
    for row in range(n_chains):
        number = row
        chain = tables.chains[number]
        if chain["is_unidentified"]:
            tables.pairs[chain["pair"]]["unidentified"] = number
        if not chain["is_followed"]:
            _link_key(tables, number)
        if not _is_decided(chain):
            _link_request(tables, number)
        if not chain["is_lost"]:
            _link_owner(tables, number)


def _enter_owners(tables: Tables) -> None:
    last = np.uint64(len(tables.owner_heads) - 1)
    for row in range(tables.counts[0]):
        owner = tables.owners[row]
        slot = mixed(np.uint64(owner["number"]), np.uint64(0)) & last
        owner["next"] = tables.owner_heads[slot]
        tables.owner_heads[slot] = row


def _enter_pairs(tables: Tables) -> None:
    last = np.uint64(len(tables.pair_heads) - 1)
    for row in range(tables.counts[1]):
        pair = tables.pairs[row]
        number = tables.owners[pair["owner"]]["number"]
        slot = mixed(np.uint64(number), np.uint64(pair["leaf"])) & last
        pair["next"] = tables.pair_heads[slot]
        tables.pair_heads[slot] = row


def link_attempts(
    calls: CallColumns,
    leaves: Leaves,
    pair_of: _I32,
    may_miss: _Flags,
    inside: _Flags,
    process: _I32,
    successes: _Any,
    base: int,
    started_midway: bool,
    tables: Tables,
    positions: CallPositions,
) -> None:
    """Assign each call to a chain; write its position and update the chain.

    Args:
        calls: Calls of this batch; none begins before a call of an earlier batch.
        leaves: Properties of leaves; ``max_between`` is updated.
        pair_of: Output of :func:`find_threads`.
        may_miss: Whether events may be lost just before each call or inside it; empty if no events
            were lost.
        inside: Whether events may be lost inside each call; empty if ``may_miss`` is.
        process: Process of each call, which distinguishes threads with the same number; or 0.
        successes: Calls that completed a request for other threads, in the order of their ends.
        base: Number of the first call: the number of calls in earlier batches.
        started_midway: Whether calls were in progress when the trace began.
        tables: State of earlier calls; updated.
        positions: Output: position of each call.
    """
    for row in range(len(calls.leaf)):
        settle(tables, successes, calls.begins[row])
        pair_index = pair_of[row]
        pair = tables.pairs[pair_index]
        owner = tables.owners[pair["owner"]]
        n_gaps_before = owner["n_gaps"]
        if len(may_miss) and _is_lossy(owner, may_miss[row], calls.begins[row]):
            _mark_lost(tables.chains, owner)
        if owner["n_gaps"] > pair["n_gaps"]:
            pair["n_before_gap"] = pair["n"]
        call_number = base + row
        leaf, flags = calls.leaf[row], calls.flags[row]
        operands = flags & leaves.identifies[leaf]
        is_named = leaves.captured[leaf] & ~operands == 0
        found = NONE
        if is_named and pair["n_open"] > 0:
            found = _find(calls, row, operands, pair_index, process[row], tables)
        is_doubtful = _update_ambiguity(tables.chains, pair, found, is_named, call_number)
        is_joined = found != NONE and _is_joined(tables.chains[found], owner, flags)
        number, kind = found, leaves.kind[leaf]
        if not is_joined:
            number = tables.counts[2]
            tables.counts[2] += 1
            chain = tables.chains[number]
            _begin(chain, calls, row, operands, pair_index, process[row])
            if found != NONE:
                chain["by_loss"] = tables.chains[found]["last_flags"] & RETURNED == 0
                tables.chains[found]["is_followed"] = 1
                _unlink_key(tables, found)
            _set_begin(chain, pair, owner, n_gaps_before, kind != 0, started_midway)
        elif tables.chains[number]["last"] != owner["last"]:
            _update_max_between(leaves, leaf, pair["n"] - tables.chains[number]["at"] - 1)
        chain = tables.chains[number]
        if is_doubtful:
            chain["is_doubtful"] = 1
        _append_call(chain, calls, row, call_number, pair, owner, kind, is_joined)
        _update_owner(pair, owner, calls, row, call_number, kind, is_joined)
        owner["is_tainted"] = len(may_miss) > 0 and inside[row] and flags & RETRYABLE != 0
        _update_indexes(tables, pair, number, is_named, flags, is_joined, leaves.shared[leaf])
        _write_position(positions, row, chain)


def _write_position(positions: CallPositions, row: int, chain: _Row) -> None:
    """Write the position of a call in its chain."""
    positions.first_seq[row] = chain["first_seq"]
    positions.begins[row] = chain["begins"]
    positions.n_busy[row] = chain["n_busy"]


def _update_max_between(leaves: Leaves, leaf: np.uint16, between: _Number) -> None:
    """Record the number of calls of the leaf after which a thread returned to a request."""
    leaves.max_between[leaf] = max(leaves.max_between[leaf], between)


def _update_owner(
    pair: _Row,
    owner: _Row,
    calls: CallColumns,
    row: int,
    call_number: _Number,
    kind: np.uint8,
    is_joined: bool,
) -> None:
    """Update the state of the thread and its leaf that later calls depend on."""
    pair["is_seen"] = 1
    pair["n"] += 1
    pair["n_gaps"] = owner["n_gaps"]
    owner["last"] = call_number
    owner["ends"] = calls.ends[row]
    if kind != ENTRY:
        owner["last_other"] = call_number
    if not is_joined:
        owner["began"] = call_number
        if kind != ENTRY:
            owner["began_other"] = call_number


def _is_lossy(owner: _Row, may_miss: np.bool_, begins: _Number) -> bool:
    """Return whether events of the thread may be lost from its last call to the end of this one.

    The return after a loss may belong to another call whose entry was lost; if that call was busy,
    the next call retries it.  A thread makes one call at a time.  If a call appears to begin inside
    another, the return of the outer call was lost, and its entry was paired with the return of a
    later call.
    """
    return bool(may_miss) or (
        owner["last"] != NONE and (owner["is_tainted"] != 0 or owner["ends"] > begins)
    )


def _mark_lost(chains: _Any, owner: _Row) -> None:
    """Mark the thread's open chains as lost: their later attempts may not be recorded."""
    owner["n_gaps"] += 1
    number = owner["opened"]
    while number != NONE:
        chain = chains[number]
        if chain["is_open"] and not chain["is_void"]:
            chain["is_lost"] = 1
            chain["until"] = owner["ends"]
        number = chain["next_opened"]
    owner["opened"] = NONE


def settle(tables: Tables, successes: _Any, now: _Number) -> None:
    """Apply the ``successes`` that ended before ``now`` to the open chains of their request."""
    last = np.uint64(len(tables.request_heads) - 1)
    while tables.counts[3] < len(successes) and successes[tables.counts[3]]["ends"] < now:
        success = successes[tables.counts[3]]
        tables.counts[3] += 1
        slot = _request(success) & last
        number, previous = tables.request_heads[slot], NONE
        while number != NONE:
            chain = tables.chains[number]
            following = tables.next_request[number]
            if chain["begins"] <= success["ends"] and _is_same_request(chain, success):
                if success["voids"]:
                    chain["is_void"] = 1
                else:
                    _settle(chain, success)
            if _is_decided(chain):
                if previous == NONE:
                    tables.request_heads[slot] = following
                else:
                    tables.next_request[previous] = following
            else:
                previous = number
            number = following


def _is_decided(chain: _Row) -> bool:
    """Return whether no further call can change the chain.

    That is so if the request was made void, or if it gets no more attempts and has its first
    success.
    """
    is_over = chain["is_followed"] or chain["is_lost"]
    return bool(chain["is_void"] or (is_over and chain["is_settled"]))


def _settle(chain: _Row, success: _Row) -> None:
    chain["last_settled"] = success["ends"]
    if not chain["is_settled"]:
        chain["is_settled"] = 1
        chain["settled_seq"] = success["seq"]
        chain["settled_tid"] = success["tid"]
        chain["settled_flags"] = success["flags"]
        chain["settled_ends"] = success["ends"]


def _is_same_request(chain: _Row, success: _Row) -> bool:
    return bool(
        chain["td"] == success["td"]
        and chain["gpa"] == success["gpa"]
        and chain["leaf"] == success["leaf"]
        and chain["level"] == success["level"]
        and (chain["flags"] ^ success["flags"]) & (GPA | LEVEL) == 0
    )


def _find(
    calls: CallColumns,
    row: int,
    operands: np.uint16,
    pair: _Number,
    process: np.int32,
    tables: Tables,
) -> _Number:
    """Return the number of the open chain whose request the call identifies, else NONE."""
    td = calls.td[row] if operands & TD else np.uint64(0)
    gpa = calls.gpa[row] if operands & GPA else np.uint64(0)
    level = calls.level[row] if operands & LEVEL else np.uint8(0)
    vp = calls.vp[row] if operands & VP else np.uint64(0)
    page = calls.page[row] if operands & PAGE else np.uint64(0)
    key = _key(pair, td, gpa, level, vp, page)
    number = tables.key_heads[key & np.uint64(len(tables.key_heads) - 1)]
    while number != NONE:
        chain = tables.chains[number]
        if (
            chain["pair"] == pair
            and chain["operands"] == operands
            and chain["process"] == process
            and (not operands & TD or chain["td"] == td)
            and (not operands & GPA or chain["gpa"] == gpa)
            and (not operands & LEVEL or chain["level"] == level)
            and (not operands & VP or chain["vp"] == vp)
            and (not operands & PAGE or chain["page"] == page)
        ):
            return number
        number = tables.next_key[number]
    return NONE


def _is_joined(chain: _Row, owner: _Row, flags: np.uint16) -> bool:
    """Return whether a call is another attempt at the open request that it identifies.

    It is, if the last attempt got a retryable status, no event may be lost since, nothing made the
    request void, and no other thread completed it before this thread returned to it after other
    calls.  A success of another thread does not count if the call directly follows the last
    attempt: it comes from the caller's retry loop, which did not check in between.
    """
    is_next = chain["last"] == owner["last"]
    is_settled = chain["is_settled"] != 0 and chain["last_settled"] > chain["last_begins"]
    return bool(
        chain["last_flags"] & RETRYABLE
        and chain["n_gaps"] == owner["n_gaps"]
        and (is_next or not is_settled)
        and not chain["is_void"]
        and not flags & OPENS
        and not chain["last_flags"] & CLOSES
    )


def _update_ambiguity(
    chains: _Any,
    pair: _Row,
    found: _Number,
    is_named: bool,
    call_number: _Number,
) -> bool:
    """Return whether a chain may lack an attempt because a call does not identify its request.

    Updates the pair's open count and its calls without identified request.
    """
    is_doubtful = False
    if found != NONE:
        pair["n_open"] -= 1
        is_doubtful = pair["ambiguous"] > chains[found]["last"]
    elif not is_named:
        # The call may belong to any open request of the leaf.
        if pair["n_open"] > 0:
            pair["ambiguous"] = call_number
            pair["last_ambiguous"] = call_number
            is_doubtful = True
    elif pair["unidentified"] != NONE:
        # The call may continue the chain whose request is not identified.
        unidentified = chains[pair["unidentified"]]
        unidentified["is_doubtful"] = 1
        pair["last_ambiguous"] = max(pair["last_ambiguous"], unidentified["last"])
        unidentified["is_unidentified"] = 0
        pair["unidentified"] = NONE
        is_doubtful = True
    return is_doubtful


def _begin(
    chain: _Row,
    calls: CallColumns,
    row: int,
    operands: np.uint16,
    pair: _Number,
    process: np.int32,
) -> None:
    """Initialize a chain from its first call."""
    chain["pair"] = pair
    chain["leaf"] = calls.leaf[row]
    chain["flags"] = calls.flags[row]
    chain["operands"] = operands
    chain["tid"] = calls.tid[row]
    chain["tgid"] = calls.tgid[row]
    chain["process"] = process
    chain["td"] = calls.td[row]
    chain["gpa"] = calls.gpa[row]
    chain["level"] = calls.level[row]
    chain["vp"] = calls.vp[row]
    chain["page"] = calls.page[row]
    chain["first_seq"] = calls.seq[row]
    chain["begins"] = calls.begins[row]
    chain["n_segments"] = 1
    chain["known"] = calls.flags[row] & (TD | VP | TGID)
    chain["next_opened"] = NONE


def _set_begin(
    chain: _Row,
    pair: _Row,
    owner: _Row,
    n_gaps_before: _Number,
    is_of_vcpu: bool,
    started_midway: bool,
) -> None:
    """Record whether the request may have begun before its first recorded call.

    Without a gap it began after the thread's previous call, up to which there were
    ``n_gaps_before`` gaps.  A request of a vCPU stays open across the thread's other calls, so for
    vCPU leaves the previous call of the same leaf counts.
    """
    has_previous = owner["last"] != NONE
    if is_of_vcpu:
        has_previous = pair["is_seen"] != 0
        n_gaps_before = pair["n_gaps"]
    if owner["n_gaps"] > n_gaps_before:
        chain["by_loss"] = 1
    chain["by_start"] = started_midway and not has_previous
    is_after_gap = started_midway or owner["n_gaps"] > 0
    chain["after_gap"] = pair["n"] - pair["n_before_gap"] if is_after_gap else NONE


def _append_call(
    chain: _Row,
    calls: CallColumns,
    row: int,
    call_number: _Number,
    pair: _Row,
    owner: _Row,
    kind: np.uint8,
    is_joined: bool,
) -> None:
    """Update a chain with one of its calls."""
    flags = calls.flags[row]
    if is_joined and kind != ENTRY and owner["entries"] != chain["entries"]:
        chain["n_segments"] += 1
    new_flags = flags & ~chain["known"]
    if new_flags & TD:
        chain["td"] = calls.td[row]
    if new_flags & VP:
        chain["vp"] = calls.vp[row]
    if new_flags & TGID:
        chain["tgid"] = calls.tgid[row]
    chain["known"] |= flags & (TD | VP | TGID)
    if kind == ENTRY:
        owner["entries"] += 1
    chain["last_seq"] = calls.seq[row]
    chain["last_begins"] = calls.begins[row]
    chain["ends"] = calls.ends[row]
    chain["last_flags"] = flags
    chain["status"] = calls.status[row]
    chain["n"] += 1
    if flags & RETRYABLE:
        chain["n_busy"] += 1
    chain["last"] = call_number
    chain["at"] = pair["n"]
    chain["n_gaps"] = owner["n_gaps"]
    chain["entries"] = owner["entries"]


def _update_indexes(
    tables: Tables,
    pair: _Row,
    number: _Number,
    is_named: bool,
    last_flags: np.uint16,
    is_joined: bool,
    shared: np.uint8,
) -> None:
    """Add a new open chain to the lookup tables; remove a chain that is no longer open."""
    chain = tables.chains[number]
    is_open = last_flags & RETRYABLE != 0 or last_flags & RETURNED == 0
    if is_open:
        pair["n_open"] += 1
    if is_open and not is_joined:
        chain["is_open"] = 1
        flags = chain["flags"]
        chain["is_shared"] = (shared == BY_PAGE and flags & GPA != 0) or (
            shared == BY_TD and (flags & TD != 0 or chain["td"] != 0)
        )
        if is_named:
            _link_key(tables, number)
        else:
            if pair["unidentified"] != NONE:
                tables.chains[pair["unidentified"]]["is_unidentified"] = 0
            chain["is_unidentified"] = 1
            pair["unidentified"] = number
        _link_request(tables, number)
        _link_owner(tables, number)
    elif is_joined and not is_open:
        chain["is_open"] = 0
        _unlink_key(tables, number)
        _unlink_request(tables, number)


def _key_of(chain: _Row) -> np.uint64:
    operands = chain["operands"]
    td = np.uint64(chain["td"]) if operands & TD else np.uint64(0)
    gpa = np.uint64(chain["gpa"]) if operands & GPA else np.uint64(0)
    level = np.uint8(chain["level"]) if operands & LEVEL else np.uint8(0)
    vp = np.uint64(chain["vp"]) if operands & VP else np.uint64(0)
    page = np.uint64(chain["page"]) if operands & PAGE else np.uint64(0)
    return _key(chain["pair"], td, gpa, level, vp, page)


def _key(
    pair: _Number, td: np.uint64, gpa: np.uint64, level: np.uint8, vp: np.uint64, page: np.uint64
) -> np.uint64:
    return mixed(mixed(np.uint64(pair), td ^ vp), mixed(gpa ^ page, np.uint64(level)))


def _request(row: _Row) -> np.uint64:
    """Return the hash of a request, equal for its chains and its ``successes``."""
    return mixed(
        mixed(np.uint64(row["td"]), np.uint64(row["leaf"])),
        mixed(np.uint64(row["gpa"]), np.uint64(row["level"])),
    )


def _link_key(tables: Tables, number: _Number) -> None:
    _link(tables.key_heads, tables.next_key, _key_of(tables.chains[number]), number)


def _unlink_key(tables: Tables, number: _Number) -> None:
    _unlink(tables.key_heads, tables.next_key, _key_of(tables.chains[number]), number)


def _link_request(tables: Tables, number: _Number) -> None:
    chain = tables.chains[number]
    if chain["is_shared"]:
        _link(tables.request_heads, tables.next_request, _request(chain), number)


def _unlink_request(tables: Tables, number: _Number) -> None:
    chain = tables.chains[number]
    if chain["is_shared"]:
        _unlink(tables.request_heads, tables.next_request, _request(chain), number)


def _link(heads: _I32, next_row: _I32, key: np.uint64, number: _Number) -> None:
    """Insert a row at the head of its slot's list."""
    slot = key & np.uint64(len(heads) - 1)
    next_row[number] = heads[slot]
    heads[slot] = number


def _unlink(heads: _I32, next_row: _I32, key: np.uint64, number: _Number) -> None:
    """Remove a row from its slot's list, if present."""
    slot = key & np.uint64(len(heads) - 1)
    other, previous = heads[slot], NONE
    while other not in (NONE, number):
        other, previous = next_row[other], other
    if other == NONE:
        return
    if previous == NONE:
        heads[slot] = next_row[number]
    else:
        next_row[previous] = next_row[number]


def _link_owner(tables: Tables, number: _Number) -> None:
    owner = tables.owners[tables.pairs[tables.chains[number]["pair"]]["owner"]]
    tables.chains[number]["next_opened"] = owner["opened"]
    owner["opened"] = number


# The finalizer of MurmurHash3 (A. Appleby, public domain): each input bit affects the whole word.
_MULTIPLIER: Final = np.uint64(0xFF51_AFD7_ED55_8CCD)
_SHIFT: Final = np.uint64(33)


def mixed(key: np.uint64, word: np.uint64) -> np.uint64:
    """Hash a word into a key; unlike exclusive or, (1, 2) and (2, 1) give different results."""
    result = (key ^ word) * _MULTIPLIER
    result ^= result >> _SHIFT
    result = (result + word) * _MULTIPLIER
    return result ^ (result >> _SHIFT)
