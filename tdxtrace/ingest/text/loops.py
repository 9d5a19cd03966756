"""Loops that read a block of text line by line: compiled, for inputs so large that it pays.

They do what fast.parse does, in one pass over the bytes.  Nothing here checks bounds: lines
end within the block, which has room behind it to load words from (SPARE_BYTES), and what is
known of lines (looped.packed) names no place farther than that behind where one begins.

All numbers are unsigned: a signed index may be meant from the end, which is asked each time.
Constants of the arrays are here: machine code that was kept is not made anew where other
modules change.
"""

from __future__ import annotations

from typing import Final

from tdxtrace.ingest.compiled import compiled, inlined
from tdxtrace.ingest.raw import I8Array, I32Array, I64Array, Index, U64Array
from tdxtrace.ingest.text.words import (
    NO_NUMBER,
    NONE,
    U,
    decimal,
    first_bytes,
    first_mark,
    hexadecimal,
    line_end,
    process,
    thread,
)

# Columns of what is noted.  Of each line where it ends; of those that were left which it is;
N_COLUMNS: Final = 6
END, LEFT = 0, 1
# of those with fields, and of those whose thread may be new, the place among those read;
OWN, THREAD = 2, 3
# and of those that were read the name.
COMM_1, COMM_2 = 4, 5
# What is counted: of each event its lines and the first of them, of each CPU its times, of
# threads that were met a hash, of each layout of heads and of fields whether a line has it.
N_SUMS: Final = 7
COUNT, FIRST, FIRST_NS, LAST_NS, MET, HAS_LAYOUT, HAS_FIELDS_OF = range(N_SUMS)
LEAST_SUMS: Final = 1 << 10
# Where it is said what is known; of a table where it begins, and its last place.
N_HEADS, HEADS, HAS_FIELDS, LONGEST = map(U, range(4))
FLAGS, BEGINNINGS, NAMES, SHAPES = map(U, range(4, 12, 2))
# Words that the fields of a line take.
RECORD_WORDS, N_KNOWN = map(U, (12, 13))
# What is known of a head, in columns of its line.
SIZE, COMM_AT, BRACKET_AT, TGID_AT, N_FLAGS, STAMP_AT, N_SECONDS = map(U, range(7))
N_PART, SCALE, EVENT_AT, IS_DASHED, N_LITERALS, LITERALS = map(U, range(7, 13))
# How the reading of a block ended.
DONE, HAS_CR, IS_FULL = range(3)

_HIGH: Final = U(0x8080808080808080)
_PRINTED: Final = U(0x2121212121212121)
MIX: Final = U(0x9E3779B97F4A7C15)  # knowledge
_0, _1, _2, _3, _4, _5, _6, _7, _8 = map(U, range(9))
_17, _29, _32, _54, _255 = map(U, (17, 29, 32, 54, 255))
_CR, _BLANK = map(U, b"\r ")
_MAX_SECONDS: Final = U(9_000_000_000)  # layouts
_BILLION: Final = U(1_000_000_000)

# Of lines that were read: which it is and what its head says; of those with fields the layout.
_ROW, _TS_NS, _CPU, _TID, _TGID, _IN_IRQ, _EVENT = range(7)
_LAYOUT: Final = 7
_Heads = tuple[I64Array, I64Array, I32Array, I32Array, I32Array, I8Array, I32Array, Index]


@compiled
def parse(
    words: U64Array,
    n_bytes: U,
    may_end_in_cr: bool,
    known: U64Array,
    into: tuple[U64Array, _Heads, U64Array, U64Array],
) -> tuple[int, U, U, U, U, U]:
    """Read a block of whole lines.

    Args:
        words: The word that begins at each of its bytes.
        n_bytes: Its length.
        may_end_in_cr: Whether to stop where a line ends in a carriage return.
        known: What lines look like: looped.packed.
        into: Where to write: columns of what is noted, what heads say, the fields of each
            line with fields behind one another, and what is counted.

    Returns:
        How it ended; how many lines there are, were read, have fields, were left, and
        have a thread that may be new.
    """
    at = n_lines = n_read = n_own = n_left = n_threads = _0
    rows, heads, _, sums = into
    how, n_most = DONE, U(rows.shape[1])
    # It is: said here, it spares a multiplication wherever a word is read.
    if words.strides[0] != 1:
        return IS_FULL, n_lines, n_read, n_own, n_left, n_threads
    while at < n_bytes:
        end = line_end(words, at)
        if n_lines == n_most:
            how = IS_FULL
            break
        if may_end_in_cr and end > _0 and words[end - _1] & _255 == _CR:
            how = HAS_CR
            break
        rows[END, n_lines] = end
        event = _line(words, at, end, known, into, n_read, n_own)
        if event == NONE:
            rows[LEFT, n_left] = n_lines
            n_left += _1
        else:
            heads[_ROW][n_read] = n_lines
            _count(event, heads, n_read, sums)
            if known[known[HAS_FIELDS] + event]:
                n_threads += _meet(rows, heads, n_read, n_threads, sums)
                sums[HAS_FIELDS_OF, U(heads[_LAYOUT][n_own])] = _1
                rows[OWN, n_own] = n_read
                n_own += _1
            n_read += _1
        n_lines += _1
        at = end + _1
    return how, n_lines, n_read, n_own, n_left, n_threads


@inlined
def _line(
    words: U64Array,
    at: U,
    end: U,
    known: U64Array,
    into: tuple[U64Array, _Heads, U64Array, U64Array],
    row: U,
    own: U,
) -> U:
    """Read a line in the first layout that it fits; return its event."""
    rows, heads, values, sums = into
    head = known[HEADS]
    for layout in range(known[N_HEADS]):
        event_at = at + known[head + EVENT_AT]
        if end > event_at and _head(words, at, known, head, rows, heads, row):
            event, args = _event(words, event_at, known)
            if event != NONE and (
                not known[known[HAS_FIELDS] + event]
                or _fields(words, args, end, event, known, values, heads[_LAYOUT], own)
            ):
                heads[_EVENT][row] = event
                sums[HAS_LAYOUT, layout] = _1
                return event
        head += known[head + SIZE]
    return NONE


@inlined
def _head(
    words: U64Array, at: U, known: U64Array, head: U, rows: U64Array, heads: _Heads, row: U
) -> bool:
    """Read the head of a line; return whether it fits the layout in every byte."""
    first = head + LITERALS
    for k in range(first, first + _3 * known[head + N_LITERALS], _3):
        if (words[at + known[k]] ^ known[k + _1]) & known[k + _2]:
            return False
    bracket = at + known[head + BRACKET_AT]
    cpu, is_cpu = decimal(words, bracket + _1, _3)
    if not is_cpu:
        return False
    n_flags, before = known[head + N_FLAGS], known[head + TGID_AT]
    flags = words[bracket + _6] & first_bytes(n_flags) if n_flags else _0
    meaning = _find(known, FLAGS, flags)
    comm, stop = at + known[head + COMM_AT], at + before - _1 if before else bracket
    tid = thread(words[comm + _17], stop - comm - _17, known[head + IS_DASHED])
    stamp, n = at + known[head + STAMP_AT], known[head + N_SECONDS]
    ts_ns, is_stamp = decimal(words, stamp, n)
    if meaning == NONE or not is_stamp or tid == NO_NUMBER:
        return False
    tgid = process(words[at + before]) if before else NONE
    if tgid == NO_NUMBER:
        return False
    if known[head + N_PART]:
        part, is_part = decimal(words, stamp + n + _1, known[head + N_PART])
        if not is_part or ts_ns >= _MAX_SECONDS:
            return False
        ts_ns = ts_ns * _BILLION + part * known[head + SCALE]
    heads[_TS_NS][row], heads[_CPU][row], heads[_TID][row] = ts_ns, cpu, tid
    heads[_IN_IRQ][row], heads[_TGID][row] = meaning - _1, tgid
    rows[COMM_1, row], rows[COMM_2, row] = words[comm], words[comm + _8]
    return True


@inlined
def _event(words: U64Array, at: U, known: U64Array) -> tuple[U, U]:
    """Which event's text begins at a place, and where its arguments do."""
    key = words[at] * MIX
    for k in range(_8, _32, _8):
        key = ((key ^ (key >> _29)) + words[at + k]) * MIX
    found = _find(known, BEGINNINGS, key)
    if found != NONE:
        return found >> _8, at + (found & _255)
    key, n = _0, _8
    for _ in range(6):
        word = words[at]
        controls = (word - _PRINTED) & ~word & _HIGH
        n = first_mark(controls) if controls else _8
        key = (key ^ (word & first_bytes(n) if n else _0)) * MIX
        key ^= key >> _29
        at += n
        if n < _8:
            break
    while words[at] & _255 == _BLANK:
        at += _1
    return _find(known, NAMES, _0 if n == _8 else key), at


@inlined
def _fields(
    words: U64Array,
    args: U,
    end: U,
    event: U,
    known: U64Array,
    values: U64Array,
    layouts: Index,
    own: U,
) -> bool:
    """Read arguments in the first shape of their event and length that they have."""
    size = end - args + _1
    if size > known[LONGEST]:
        return False
    at = _find(known, SHAPES, (event << _32) | size)
    n_shapes = _0 if at == NONE else known[at]
    into = own * known[RECORD_WORDS]
    at += _1
    for _ in range(n_shapes):
        numbers = at + _4 + _2 * known[at]
        constants = numbers + _4 * known[at + _1]
        after = constants + _2 * known[at + _2]
        differs, word = _0, args
        for k in range(at + _4, numbers, _2):
            differs |= (words[word] ^ known[k]) & known[k + _1]
            word += _8
        if not differs and _numbers(words, args, numbers, constants, known, values, into):
            for k in range(constants, after, _2):
                values[into + known[k]] = known[k + _1]
            layouts[own] = known[at + _3]
            return True
        at = after
    return False


@inlined
def _numbers(
    words: U64Array, args: U, first: U, last: U, known: U64Array, values: U64Array, into: U
) -> bool:
    """Read the numbers of a shape; return whether all are numbers."""
    is_good = True
    for k in range(first, last, _4):
        at, n, slot = args + known[k], known[k + _1], known[k + _3]
        if known[k + _2]:
            value, is_number = hexadecimal(words, at, n)
        else:
            value, is_number = decimal(words, at, n)
        is_good &= is_number
        if slot != NONE:
            values[into + slot] = value
    return is_good


@inlined
def _count(event: U, heads: _Heads, row: U, sums: U64Array) -> None:
    """Count a line for its event and its CPU."""
    if sums[COUNT, event] == _0:
        sums[FIRST, event] = row
    sums[COUNT, event] += _1
    cpu, ts_ns = U(heads[_CPU][row]), U(heads[_TS_NS][row])
    sums[FIRST_NS, cpu] = min(sums[FIRST_NS, cpu], ts_ns)
    sums[LAST_NS, cpu] = max(sums[LAST_NS, cpu], ts_ns)


@inlined
def _meet(rows: U64Array, heads: _Heads, row: U, n_threads: U, sums: U64Array) -> U:
    """Note a row if its thread was not met under that name a short while ago; 1 if so."""
    key = (rows[COMM_1, row] ^ (rows[COMM_2, row] * MIX)) * MIX
    key = (key ^ U(heads[_TID][row]) ^ (U(heads[_TGID][row]) << _32)) * MIX
    if sums[MET, key >> _54] == key:
        return _0
    sums[MET, key >> _54] = key
    rows[THREAD, n_threads] = row
    return _1


@inlined
def _find(known: U64Array, table: U, key: U) -> U:
    """What a key stands for in a table; NONE if it is not there."""
    first, last = known[table], known[table + _1]
    at: U = ((key * MIX) >> _32) & last
    while known[first + _2 * at + _1] != NONE and known[first + _2 * at] != key:
        at = (at + _1) & last
    found: U = known[first + _2 * at + _1]
    return found
