"""Entries with their returns, and SEAMCALLs of the lower layer with the wrappers' calls around.

A return belongs to the last open entry of its function in its thread.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from tdxtrace.ingest.batch import BoolArray, I8Array, I32Array, I64Array, U64Array
from tdxtrace.tdx.wrappers import PAGES

# What became of an event.
ENTRY_OF_PAIR: Final = 0
OPEN: Final = 1
"""An entry that may still return."""
RETURN_OF_PAIR: Final = 2
GIVEN_UP: Final = 3
"""An entry that cannot return any more."""
ORPHAN: Final = 4
"""A return without an entry."""

AMBIGUOUS: Final = -2
"""In place of the partner of an open entry whose return cannot be told from another's."""


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
    fate: NDArray[np.uint8],
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
    _take_out(oldest, above_oldest, thread, top, below)


def pair_without_threads(
    place: I32Array,
    event: I32Array,
    function: I32Array,
    is_return: BoolArray,
    depth: I64Array,
    top: I64Array,
    below: I64Array,
    partner: I64Array,
    fate: NDArray[np.uint8],
) -> None:
    """Do what :func:`pair` does for events whose thread is not known.

    A return belongs to the only open entry of its function at its place. Where several are
    open, it may be of any: it stays without an entry, and so do these entries, and those that
    begin before as many have returned.

    Args:
        place: Number of each event's CPU, or of all CPUs where it is not known; -1: not to be
            paired here.
        event: As for :func:`pair`.
        function: As for :func:`pair`.
        is_return: As for :func:`pair`.
        depth: By place: most open calls of one function; the oldest beyond that is given up.
        top: By place: its last open entry; -1 before any.
        below: By entry: the one that was open before it at its place; written only.
        partner: By event: -1, or AMBIGUOUS of an entry that an earlier batch left so.
        fate: By event: one of the constants above; written.
    """
    for at in range(len(event)):
        here = place[at]
        if here < 0:
            continue
        what = function[event[at]]
        n_open = 0
        found = oldest = above_found = above_oldest = above = np.int64(-1)
        other = top[here]
        while other >= 0:
            if function[event[other]] == what:
                n_open += 1
                if found < 0:
                    found, above_found = other, above
                oldest, above_oldest = other, above
            above, other = other, below[other]
        if not is_return[event[at]]:
            if n_open >= depth[here]:
                fate[oldest] = GIVEN_UP
                _take_out(oldest, above_oldest, here, top, below)
            below[at] = top[here]
            top[here] = at
            fate[at] = OPEN
        elif n_open == 0:
            fate[at] = ORPHAN
        elif n_open == 1 and partner[found] != AMBIGUOUS:
            _take_out(found, above_found, here, top, below)
            partner[at] = found
            fate[found] = ENTRY_OF_PAIR
            fate[at] = RETURN_OF_PAIR
        else:
            other = top[here]
            while other >= 0:
                if function[event[other]] == what:
                    partner[other] = AMBIGUOUS
                other = below[other]
            fate[oldest] = GIVEN_UP
            fate[at] = ORPHAN
            _take_out(oldest, above_oldest, here, top, below)


def _take_out(
    entry: np.int64, above: np.int64, here: int | np.int32, top: I64Array, below: I64Array
) -> None:
    """Take an entry out of the list of open ones of a place."""
    if above < 0:
        top[here] = below[entry]
    else:
        below[above] = below[entry]


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


# What an event means for the vCPU entry of its thread.
NOTHING: Final = 0
KVM_ENTRY: Final = 1
KVM_EXIT: Final = 2
RUN_RETURN: Final = 3
"""The return of the function that enters the vCPU."""
OUTSIDE: Final = 4
"""Something that the thread does only outside of that function."""


def find_entry_starts(
    thread: I32Array,
    role: I64Array,
    cpu: I64Array,
    vcpu: I64Array,
    entered: I64Array,
    exited: I64Array,
    start: I64Array,
) -> None:
    """Write which kvm_entry each return of the function that enters a vCPU belongs to.

    It is the latest of the thread, if nothing but one kvm_exit lies between, and if it is of the
    same vCPU and on the same CPU, where these are told.

    Args:
        thread: Number of each event's thread, in the order of time.
        role: By event: one of the constants above.
        cpu: By event: its CPU, -1: not told.
        vcpu: By event: number of the vCPU, -1: not told.
        entered: By thread: -1; left with the kvm_entry that no return belongs to yet, or -1.
        exited: By thread: -1; left with the kvm_exit after that, or -1.
        start: By event: -1; of a return the place of its kvm_entry is written.
    """
    for at in range(len(thread)):
        mine = thread[at]
        found = entered[mine]
        if role[at] == KVM_ENTRY:
            entered[mine], exited[mine] = at, -1
        elif role[at] == KVM_EXIT and found >= 0 and exited[mine] < 0:
            exited[mine] = at
        elif role[at] != NOTHING:
            entered[mine] = exited[mine] = -1
            if role[at] == RUN_RETURN and found >= 0:
                is_same = vcpu[at] < 0 or vcpu[found] < 0 or vcpu[at] == vcpu[found]
                if is_same and (cpu[at] < 0 or cpu[found] < 0 or cpu[at] == cpu[found]):
                    start[at] = found


REGISTERS: Final = ("rcx", "rdx", "r8")
IN_REGISTERS: Final = ("td_id", "vp_id", "gpa", *PAGES, "level")
"""What registers can hold."""
FIELDS: Final = (*IN_REGISTERS, "fn", "leaf", "version", "gfn", *REGISTERS)
"""Rows of ``value`` and ``seen`` that :func:`read_operands` looks at."""
NO_REGISTER: Final = -1
_N_OPERANDS: Final = len(IN_REGISTERS)
_GPA, _LEVEL = FIELDS.index("gpa"), FIELDS.index("level")
_FN, _LEAF, _VERSION = FIELDS.index("fn"), FIELDS.index("leaf"), FIELDS.index("version")
_GFN, _FIRST_REGISTER = FIELDS.index("gfn"), FIELDS.index("rcx")
# RAX at entry: leaf in bits 15:0, version in 23:16 (see tdx.leaves.split_fn).
_LEAF_MASK: Final = np.uint64(0xFFFF)
_VERSION_SHIFT: Final = np.uint64(16)
_VERSION_MASK: Final = np.uint64(0xFF)
_PAGE_SHIFT: Final = np.uint64(12)
# An address and a level that share a register: bits 51:12 and 2:0.  Linux
# arch/x86/virt/vmx/tdx/tdx.c passes gpa | level; TDX module ABI, TDH.MEM.PAGE.AUG.
_PAGE_MASK: Final = np.uint64(0x000F_FFFF_FFFF_F000)
_LEVEL_MASK: Final = np.uint64(0x7)


def read_operands(registers: I8Array, value: U64Array, seen: BoolArray, leaf: I32Array) -> None:
    """Fill leaf, version and operands of each call from its registers, where not yet known.

    Args:
        registers: By leaf and place in IN_REGISTERS: place in REGISTERS of what holds it,
            or NO_REGISTER.
        value: One row per field of FIELDS, one entry per call.
        seen: Where a value is known, of the same shape.
        leaf: Of each call as its probe tells, -1: it does not.
    """
    for row in range(len(leaf)):
        if seen[_FN, row]:
            fn = value[_FN, row]
            leaf[row] = np.int32(fn & _LEAF_MASK)
            if not seen[_VERSION, row]:
                value[_VERSION, row] = fn >> _VERSION_SHIFT & _VERSION_MASK
                seen[_VERSION, row] = True
        if seen[_LEAF, row]:
            leaf[row] = np.int32(value[_LEAF, row] & _LEAF_MASK)
        if seen[_GFN, row] and not seen[_GPA, row]:
            value[_GPA, row] = value[_GFN, row] << _PAGE_SHIFT
            seen[_GPA, row] = True
        number = leaf[row]
        if number < 0 or number >= len(registers):
            continue
        of_level = registers[number, _LEVEL]
        for field in range(_N_OPERANDS):
            register = registers[number, field]
            if register == NO_REGISTER or not seen[_FIRST_REGISTER + register, row]:
                continue
            word = value[_FIRST_REGISTER + register, row]
            if field == _LEVEL:
                word = word & _LEVEL_MASK
            elif register == of_level:
                word = word & _PAGE_MASK
            if not seen[field, row]:
                value[field, row] = word
                seen[field, row] = True
            if field == _GPA and of_level == NO_REGISTER and not seen[_LEVEL, row]:
                # An address in guest memory without a level is that of a 4K page.
                value[_LEVEL, row] = 0
                seen[_LEVEL, row] = True
