"""Pair entries with returns, and low-level SEAMCALLs with the wrapper calls that enclose them.

A return belongs to the last open entry of its function in its thread.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from tdxtrace.ingest.batch import BoolArray, I8Array, I32Array, I64Array, U64Array
from tdxtrace.tdx.wrappers import PAGES

# Fates of events, as :func:`pair` writes them.
ENTRY_OF_PAIR: Final = 0
OPEN: Final = 1
"""An entry that may still return."""
RETURN_OF_PAIR: Final = 2
GIVEN_UP: Final = 3
"""An entry that cannot return any more."""
ORPHAN: Final = 4
"""A return without an entry."""

AMBIGUOUS: Final = -2
"""Partner of an open entry whose return cannot be distinguished from that of another entry."""


def pair(
    thread: I32Array,
    event: I32Array,
    function: I32Array,
    is_return: BoolArray,
    depth: int,
    top: I64Array,
    below: I64Array,
    partner: I64Array,
    fate: NDArray[np.uint8],
) -> None:
    """Write the entry of each return and the fate of each event.

    A return also gives up the calls that were opened after its entry: they cannot return any more.

    Args:
        thread: Index of each event's thread; events are in time order.
        event: Kind of each event, an index into ``function`` and ``is_return``.
        function: Number of the called function, equal for its entry and its return.
        is_return: Whether the kind is a return.
        depth: Most open calls of one function in one thread; beyond that the oldest is given up.
        top: By thread: its last open entry; -1 before the first one.
        below: By entry: the entry that was open before it in its thread; written only.
        partner: By event: for a return the index of its entry; otherwise unchanged.
        fate: By event: one of the constants above; written.
    """
    for at in range(len(event)):
        kind = event[at]
        current = thread[at]
        last = top[current]
        if not is_return[kind]:
            if last >= 0:
                _give_up_oldest(event, function, function[kind], depth, current, top, below, fate)
            below[at] = top[current]
            top[current] = at
            fate[at] = OPEN
            continue
        callee = function[kind]
        found = last
        while found >= 0 and function[event[found]] != callee:
            found = below[found]
        if found < 0:
            fate[at] = ORPHAN
            continue
        while last != found:
            fate[last] = GIVEN_UP
            last = below[last]
        top[current] = below[found]
        partner[at] = found
        fate[found] = ENTRY_OF_PAIR
        fate[at] = RETURN_OF_PAIR


def _give_up_oldest(
    event: I32Array,
    function: I32Array,
    callee: int,
    depth: int,
    thread: int,
    top: I64Array,
    below: I64Array,
    fate: NDArray[np.uint8],
) -> None:
    """Give up the oldest open entry of function ``callee`` if ``depth`` of them are open."""
    n_open = 0
    oldest = above_oldest = above = np.int64(-1)
    place = top[thread]
    while place >= 0:
        if function[event[place]] == callee:
            n_open += 1
            oldest, above_oldest = place, above
        above, place = place, below[place]
    if n_open < depth:
        return
    fate[oldest] = GIVEN_UP
    _unlink(oldest, above_oldest, thread, top, below)


def pair_without_threads(
    cpu: I32Array,
    event: I32Array,
    function: I32Array,
    is_return: BoolArray,
    depth: I64Array,
    top: I64Array,
    below: I64Array,
    partner: I64Array,
    fate: NDArray[np.uint8],
) -> None:
    """Pair events whose thread is unknown by place (CPU) instead; otherwise as :func:`pair`.

    A return belongs to the only open entry of its function at its place. Where several are
    open, it may belong to any of them: it stays without an entry, and these entries stay without a
    return, as do those that begin before all of these calls have returned.

    Args:
        cpu: Index of each event's CPU, one index for all events whose CPU is unknown; -1: skip.
        event: As for :func:`pair`.
        function: As for :func:`pair`.
        is_return: As for :func:`pair`.
        depth: By place: most open calls of one function; beyond that the oldest is given up.
        top: By place: its last open entry; -1 before the first one.
        below: By entry: the entry that was open before it at its place; written only.
        partner: By event: -1, or AMBIGUOUS for an entry that an earlier batch marked so.
        fate: By event: one of the constants above; written.
    """
    for at in range(len(event)):
        current_cpu = cpu[at]
        if current_cpu < 0:
            continue
        callee = function[event[at]]
        n_open = 0
        found = oldest = above_found = above_oldest = above = np.int64(-1)
        other = top[current_cpu]
        while other >= 0:
            if function[event[other]] == callee:
                n_open += 1
                if found < 0:
                    found, above_found = other, above
                oldest, above_oldest = other, above
            above, other = other, below[other]
        if not is_return[event[at]]:
            if n_open >= depth[current_cpu]:
                fate[oldest] = GIVEN_UP
                _unlink(oldest, above_oldest, current_cpu, top, below)
            below[at] = top[current_cpu]
            top[current_cpu] = at
            fate[at] = OPEN
        elif n_open == 0:
            fate[at] = ORPHAN
        elif n_open == 1 and partner[found] != AMBIGUOUS:
            _unlink(found, above_found, current_cpu, top, below)
            partner[at] = found
            fate[found] = ENTRY_OF_PAIR
            fate[at] = RETURN_OF_PAIR
        else:
            other = top[current_cpu]
            while other >= 0:
                if function[event[other]] == callee:
                    partner[other] = AMBIGUOUS
                other = below[other]
            fate[oldest] = GIVEN_UP
            fate[at] = ORPHAN
            _unlink(oldest, above_oldest, current_cpu, top, below)


def _unlink(
    entry: np.int64, above: np.int64, current_cpu: int | np.int32, top: I64Array, below: I64Array
) -> None:
    """Remove an entry from the linked list of open entries of a place."""
    if above < 0:
        top[current_cpu] = below[entry]
    else:
        below[above] = below[entry]


def wait_for_wrappers(
    thread: I32Array, is_inner: BoolArray, is_open: BoolArray, outer: I64Array
) -> None:
    """Mark low-level events inside a wrapper call that has not returned yet as open too.

    The wrapper's arguments identify the request of the SEAMCALLs inside, so they wait for its
    return.

    Args:
        thread: Index of each event's thread; events are in time order.
        is_inner: Whether the event is from a low-level probe.
        is_open: By event: an entry that has not returned; updated.
        outer: By thread: scratch, filled with -1.
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
    """Write the wrapper call that encloses each SEAMCALL.

    It is the thread's last wrapper call that began before the SEAMCALL, if it returned after it.

    Args:
        thread: Index of each row's thread.
        start: Index of each row's entry event; -1: not recorded.
        end: Index of each row's return event; -1: not recorded.
        is_inner: Whether the row is from a low-level probe.
        row_at: By event: scratch, filled with -1.
        latest: By thread: scratch, filled with -1.
        wrapper: By row: -1; replaced by the row of the enclosing wrapper call.
    """
    for row in range(len(thread)):
        if end[row] >= 0:
            row_at[start[row] if start[row] >= 0 else end[row]] = row
    for at in range(len(row_at)):
        row = row_at[at]
        if row < 0:
            continue
        enclosing = latest[thread[row]]
        if not is_inner[row]:
            if start[row] >= 0:
                latest[thread[row]] = row
        elif enclosing >= 0 and end[enclosing] > end[row]:
            wrapper[row] = enclosing


def find_returned(
    thread: I32Array,
    start: I64Array,
    end: I64Array,
    is_inner: BoolArray,
    leaf: I32Array,
    status: U64Array,
    next_row: I64Array,
    followed_by: I64Array,
    wrapper: I64Array,
) -> None:
    """Write the wrapper return, recorded without its entry, that follows each SEAMCALL.

    It is the thread's next row after SEAMCALLs of its leaf, with the status of the last of them:
    a wrapper returns the status of its SEAMCALL, and another SEAMCALL of it would have been
    recorded.

    Args:
        thread: Index of each row's thread; rows are in the order of their last event.
        start: Index of each row's entry event; -1: not recorded.
        end: Index of each row's return event; -1: not recorded.
        is_inner: Whether the row is from a low-level probe.
        leaf: Leaf of each row.
        status: Status of each row, 0 where it has none.
        next_row: By thread: scratch, filled with -1.
        followed_by: By row: scratch, filled with -1.
        wrapper: By row: written where it is -1.
    """
    for row in range(len(thread) - 1, -1, -1):
        follower = next_row[thread[row]]
        next_row[thread[row]] = row
        if follower < 0 or not is_inner[row] or end[row] < 0 or leaf[row] != leaf[follower]:
            continue
        if is_inner[follower]:
            followed_by[row] = followed_by[follower]
        elif start[follower] < 0 and status[row] == status[follower]:
            followed_by[row] = follower
        if wrapper[row] < 0:
            wrapper[row] = followed_by[row]


# Roles of events in :func:`find_entry_starts`.
IGNORED: Final = 0
KVM_ENTRY: Final = 1
KVM_EXIT: Final = 2
RUN_RETURN: Final = 3
"""The return of the function that enters the vCPU."""
OUTSIDE: Final = 4
"""An event that the thread emits only outside that function."""


def find_entry_starts(
    thread: I32Array,
    role: I64Array,
    cpu: I64Array,
    vcpu: I64Array,
    entered: I64Array,
    exited: I64Array,
    start: I64Array,
) -> None:
    """Write the kvm_entry of each return of the function that enters a vCPU.

    It is the thread's latest kvm_entry, if at most one kvm_exit lies between the two and if vCPU
    and CPU are the same, where they are recorded.

    Args:
        thread: Index of each event's thread; events are in time order.
        role: By event: one of the constants above.
        cpu: By event: its CPU, -1: not recorded.
        vcpu: By event: number of the vCPU, -1: not recorded.
        entered: By thread: -1 on input; on output its kvm_entry without a return yet, or -1.
        exited: By thread: -1 on input; on output the kvm_exit after that kvm_entry, or -1.
        start: By event: -1; for a return replaced by the index of its kvm_entry.
    """
    for at in range(len(thread)):
        current = thread[at]
        found = entered[current]
        if role[at] == KVM_ENTRY:
            entered[current], exited[current] = at, -1
        elif role[at] == KVM_EXIT and found >= 0 and exited[current] < 0:
            exited[current] = at
        elif role[at] != IGNORED:
            entered[current] = exited[current] = -1
            if role[at] == RUN_RETURN and found >= 0:
                is_same = vcpu[at] < 0 or vcpu[found] < 0 or vcpu[at] == vcpu[found]
                if is_same and (cpu[at] < 0 or cpu[found] < 0 or cpu[at] == cpu[found]):
                    start[at] = found


REGISTERS: Final = ("rcx", "rdx", "r8")
IN_REGISTERS: Final = ("td_id", "vp_id", "gpa", *PAGES, "level")
"""Operands that are passed in registers."""
FIELDS: Final = (*IN_REGISTERS, "fn", "leaf", "version", "gfn", *REGISTERS)
"""Rows of ``value`` and ``present`` in :func:`read_operands`."""
NO_REGISTER: Final = -1
_N_OPERANDS: Final = len(IN_REGISTERS)
_GPA, _LEVEL = FIELDS.index("gpa"), FIELDS.index("level")
_FN, _LEAF, _VERSION = FIELDS.index("fn"), FIELDS.index("leaf"), FIELDS.index("version")
_GFN, _FIRST_REGISTER = FIELDS.index("gfn"), FIELDS.index("rcx")
# RAX at entry: leaf in bits 15:0, version in 23:16.  intel/tdx-module 1.5.01
# src/vmm_dispatcher/tdx_vmm_dispatcher.c.
_LEAF_MASK: Final = np.uint64(0xFFFF)
_VERSION_SHIFT: Final = np.uint64(16)
_VERSION_MASK: Final = np.uint64(0xFF)
_PAGE_SHIFT: Final = np.uint64(12)
# An address and a level that share a register: bits 51:12 and 2:0.  Linux
# arch/x86/virt/vmx/tdx/tdx.c passes gpa | level; TDX module ABI, TDH.MEM.PAGE.AUG.
_PAGE_MASK: Final = np.uint64(0x000F_FFFF_FFFF_F000)
_LEVEL_MASK: Final = np.uint64(0x7)


def read_operands(registers: I8Array, value: U64Array, present: BoolArray, leaf: I32Array) -> None:
    """Fill in leaf, version and operands of each call from its registers, where unknown.

    Args:
        registers: By leaf and index in IN_REGISTERS: index in REGISTERS of the register that
            holds the operand, or NO_REGISTER.
        value: One row per field of FIELDS, one entry per call; updated.
        present: Where a value is known, of the same shape; updated.
        leaf: Leaf of each call according to its probe, -1: unknown; updated.
    """
    for row in range(len(leaf)):
        if present[_FN, row]:
            fn = value[_FN, row]
            leaf[row] = np.int32(fn & _LEAF_MASK)
            if not present[_VERSION, row]:
                value[_VERSION, row] = fn >> _VERSION_SHIFT & _VERSION_MASK
                present[_VERSION, row] = True
        if present[_LEAF, row]:
            leaf[row] = np.int32(value[_LEAF, row] & _LEAF_MASK)
        if present[_GFN, row] and not present[_GPA, row]:
            value[_GPA, row] = value[_GFN, row] << _PAGE_SHIFT
            present[_GPA, row] = True
        number = leaf[row]
        if number < 0 or number >= len(registers):
            continue
        of_level = registers[number, _LEVEL]
        for field in range(_N_OPERANDS):
            register = registers[number, field]
            if register == NO_REGISTER or not present[_FIRST_REGISTER + register, row]:
                continue
            word = value[_FIRST_REGISTER + register, row]
            if field == _LEVEL:
                word = word & _LEVEL_MASK
            elif register == of_level:
                word = word & _PAGE_MASK
            if not present[field, row]:
                value[field, row] = word
                present[field, row] = True
            if field == _GPA and of_level == NO_REGISTER and not present[_LEVEL, row]:
                # A guest physical address without a level is the address of a 4K page.
                value[_LEVEL, row] = 0
                present[_LEVEL, row] = True
