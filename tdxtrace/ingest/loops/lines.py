"""Lines of known patterns become events: prefix, event name, arguments, in every byte.

Text comes as the 64-bit word that begins at each of its bytes, little-endian; whole lines,
each ended by a newline, and 64 bytes behind the last one that may be read.  What lines look
like is in the arrays of :class:`LinePatterns`.  A line that fits no pattern is only noted.

All numbers are unsigned 64-bit ones: a signed index would be asked each time whether it is
meant from the end.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np

from tdxtrace.ingest.batch import MAX_CPUS, I8Array, I32Array, I64Array, U64Array

U = np.uint64


class LinePatterns(NamedTuple):
    """What lines look like: text.patterns.PatternCache makes these arrays."""

    prefixes: U64Array
    """By prefix and PREFIX column: where its parts are, in bytes from the start of the line."""
    flags: U64Array
    """Hash table of flags: key (:func:`flags_key`) and 1 + in_irq + 1; 0: empty."""
    names: U64Array
    """Hash table of event names with their colon, by NAME column."""
    nodes: U64Array
    """Tree of the arguments of events, see :func:`read_arguments`; index 0 is no node."""


class Columns(NamedTuple):
    """What is read from lines, one entry for each: to fill."""

    line: I64Array
    """Place of the line among those read, from 0."""
    ts_ns: I64Array
    tid: I32Array
    tgid: I32Array
    cpu: I32Array
    in_irq: I8Array
    event: I32Array
    layout: I32Array
    """-1 for a line of an event that has no rows."""
    first_word: I64Array
    words: U64Array
    """The fields of all lines, one behind the other."""
    left: I64Array
    """By line that fits no pattern: which it is, where it begins and ends (bytes)."""
    threads: U64Array
    """By thread that was met: both words of its name, tid, tgid, 1 if a line of it has rows."""
    thread_table: I32Array
    """Hash table of ``threads``: 1 + index, 0: empty."""
    events: I64Array
    """By event: its lines, and the place of the first of them."""
    cpus: I64Array
    """By CPU: lines, first and last time in ns."""
    used: I8Array
    """By prefix: whether a line has it."""
    numbers: U64Array
    """Room for the N_NUMBERS numbers of one prefix."""


# Columns of LinePatterns.prefixes: number columns are three, where it begins, its width in
# bytes, and on which side of its digits blanks may be.
EVENT_AT, COMM_AT, COMM_MASK_1, COMM_MASK_2, FLAGS_AT, FLAGS_MASK = range(6)
TID, TGID, CPU, WHOLE, PART = range(6, 21, 3)
N_NUMBERS: Final = 5
WHOLE_NS, PART_NS, MOST_WHOLE, N_LITERALS, LITERALS = range(21, 26)
NO_BLANKS, BLANKS_BEFORE, BLANKS_BEHIND = range(3)
# Literals: where a word begins, its value, and which bits of it count.
MOST_LITERALS: Final = 24
PREFIX_COLUMNS: Final = LITERALS + 3 * MOST_LITERALS
# Columns of LinePatterns.names: the words of a name begin at NAME_WORDS.
NAME_SIZE, NAME_EVENT, NAME_ROOT, NAME_OPENS, NAME_WORDS = range(5)
# The kernel allows 64 bytes for a name and for its group (MAX_EVENT_NAME_LEN, Linux
# kernel/trace/trace.h); names in use are far shorter.
MOST_NAME_WORDS: Final = 8
NAME_COLUMNS: Final = NAME_WORDS + MOST_NAME_WORDS
# Kinds of nodes; of numbers those that are fields, and hexadecimal digits that nobody needs.
LITERAL, HEX, DECIMAL, SKIPPED, END = map(U, range(5))
# Room for the fields of one line, in words.
MOST_FIELDS: Final = 64
# Threads of one call.
MOST_THREADS: Final = 2048
THREAD_COLUMNS: Final = 5

_NONE: Final = U(0xFFFFFFFFFFFFFFFF)
MIX: Final = U(0x9E3779B97F4A7C15)  # 2^64 divided by the golden ratio: Knuth, TAOCP 6.4
_ONES: Final = U(0x0101010101010101)
_HIGH: Final = U(0x8080808080808080)
_LOW: Final = U(0x0F0F0F0F0F0F0F0F)
_NEWLINES: Final = U(0x0A0A0A0A0A0A0A0A)
_BLANKS: Final = U(0x2020202020202020)
_PRINTED: Final = U(0x2121212121212121)
_COLONS: Final = U(0x3A3A3A3A3A3A3A3A)
_ZEROS: Final = U(0x3030303030303030)
_CARRY: Final = U(0x1010101010101010)
_SIXES: Final = U(0x0606060606060606)
_TO_LETTER: Final = U(ord("a") - ord("9") - 1)
_2ND: Final = U(0x00FF00FF00FF00FF)
_4TH: Final = U(0x000000FF000000FF)
_PAIRS: Final = U(0x0000FFFF0000FFFF)
_HALF: Final = U(0x00000000FFFFFFFF)
_MILLIONS: Final = U(0x000F424000000064)
_THOUSANDS: Final = U(0x0000271000000001)
_0, _1, _2, _3, _4, _5, _6, _7, _8, _9, _10 = map(U, range(11))
_16, _24, _29, _32, _40, _56, _63, _64, _255 = map(U, (16, 24, 29, 32, 40, 56, 63, 64, 255))
_BLANK, _CR, _HASH, _OPENING, _QUOTE = map(U, b" \r#(>")
_UNKNOWN: Final = -1
_LITERALS = U(LITERALS)
_NO_BLANKS, _BLANKS_BEFORE = U(NO_BLANKS), U(BLANKS_BEFORE)


def read_lines(
    words: U64Array, at: U, n_bytes: U, most_bytes: U, patterns: LinePatterns, into: Columns
) -> tuple[U, U, U, U, U, U, U]:
    """Read lines until their end or until something that is filled is full.

    Args:
        words: The word at each byte of the text.
        at: The byte at which the first line begins.
        n_bytes: Length of the text.
        most_bytes: Lines of more bytes than this are left.
        patterns: What lines look like.
        into: Filled; ``thread_table``, ``events``, ``cpus`` and ``used`` come as zeros.

    Returns:
        The byte at which to go on; how many lines there were, how many of them are in
        columns, how many of these have rows; words of fields, lines that fit no pattern, and
        threads.
    """
    n_lines = n_read = n_own = n_words = n_left = n_threads = prefix = _0
    # It is: said here, it spares a multiplication wherever a word is read.
    if words.strides[0] != 1:
        return at, n_lines, n_read, n_own, n_words, n_left, n_threads
    while at < n_bytes and has_room(into, n_read, n_words, n_left, n_threads):
        end = line_end(words, at)
        stop = before_returns(words, at, end)
        found = _NONE
        if end - at <= most_bytes:
            found = read_prefix(words, at, stop, prefix, patterns, into, n_read)
        event = _NONE
        leaf = thread = _0
        if found != _NONE:
            prefix = found
            thread = find_thread(words, at, patterns.prefixes, prefix, into, n_read, n_threads)
            if thread != _NONE:
                event, leaf = read_event(words, at, stop, patterns, prefix, into.words, n_words)
        if event == _NONE:
            into.left[n_left, 0], into.left[n_left, 1], into.left[n_left, 2] = n_lines, at, stop
            n_left += _1
        else:
            if thread == n_threads:
                n_threads += _1
            into.line[n_read], into.event[n_read] = n_lines, event
            into.first_word[n_read], into.layout[n_read] = n_words, _UNKNOWN
            if leaf != _0:
                into.layout[n_read] = patterns.nodes[leaf + _3]
                into.threads[thread, 4] = _1
                n_words += patterns.nodes[leaf + _4]
                n_own += _1
            count(into, n_read, event)
            into.used[prefix] = 1
            n_read += _1
        n_lines += _1
        at = end + _1
    return at, n_lines, n_read, n_own, n_words, n_left, n_threads


def has_room(into: Columns, n_read: U, n_words: U, n_left: U, n_threads: U) -> bool:
    """Whether another line fits behind so many."""
    return bool(
        n_read < U(len(into.line))
        and n_left < U(len(into.left))
        and n_threads < U(len(into.threads))
        and n_words + U(MOST_FIELDS) <= U(len(into.words))
    )


def before_returns(words: U64Array, at: U, end: U) -> U:
    """Where a line ends if not with carriage returns."""
    while end > at and words[end - _1] & _255 == _CR:
        end -= _1
    return end


def read_prefix(
    words: U64Array, at: U, stop: U, last: U, patterns: LinePatterns, into: Columns, row: U
) -> U:
    """Read the prefix of a line, which may have any of the patterns; begin with the ``last``.

    Returns:
        Which it has; NONE if none.
    """
    n = U(len(patterns.prefixes))
    for k in range(n):
        prefix = U(k)
        if prefix == _0:
            prefix = last
        elif prefix <= last:
            prefix -= _1
        if stop > at + patterns.prefixes[prefix, EVENT_AT] and read_prefix_of(
            words, at, patterns, prefix, into, row
        ):
            return prefix
    return _NONE


def read_prefix_of(
    words: U64Array, at: U, patterns: LinePatterns, prefix: U, into: Columns, row: U
) -> bool:
    """Read a prefix of one pattern; say whether it is one."""
    known = patterns.prefixes
    last = _LITERALS + _3 * known[prefix, N_LITERALS]
    for k in range(_LITERALS, last, _3):
        if (words[at + known[prefix, k]] ^ known[prefix, k + 1]) & known[prefix, k + 2] != _0:
            return False
    numbers = into.numbers
    for k in range(N_NUMBERS):
        numbers[k] = number(words, at, known, prefix, TID + 3 * k)
        if numbers[k] == _NONE:
            return False
    whole, part = numbers[3], numbers[4]
    if whole >= known[prefix, MOST_WHOLE]:
        return False
    flags = words[at + known[prefix, FLAGS_AT]] & known[prefix, FLAGS_MASK]
    meaning = find_flags(patterns.flags, flags_key(prefix, flags))
    if meaning == _0:
        return False
    into.ts_ns[row] = whole * known[prefix, WHOLE_NS] + part * known[prefix, PART_NS]
    into.in_irq[row] = np.int64(meaning) - 2
    into.tid[row] = into.tgid[row] = into.cpu[row] = _UNKNOWN
    if known[prefix, TID + 1] != _0:
        into.tid[row] = numbers[0]
    if known[prefix, TGID + 1] != _0:
        into.tgid[row] = numbers[1]
    if known[prefix, CPU + 1] != _0:
        into.cpu[row] = numbers[2]
    return True


def number(words: U64Array, at: U, prefixes: U64Array, prefix: U, column: int) -> U:
    """Read a number of a prefix; 0 if the prefix has none, NONE if there is no number."""
    width = prefixes[prefix, column + 1]
    if width == _0:
        return _0
    at += prefixes[prefix, column]
    blanks = prefixes[prefix, column + 2]
    if blanks == _NO_BLANKS:
        return digits(words, at, width)
    word = words[at]
    if blanks == _BLANKS_BEFORE:
        while width > _1 and word & _255 == _BLANK:
            word >>= _8
            width -= _1
    else:
        n = _first_byte_of(_not_decimal(word))
        if n == _0:
            return _NONE
        if n < width:
            if ((word ^ _BLANKS) >> (n << _3)) & _first_bytes(width - n) != _0:
                return _NONE
            width = n
    if _not_decimal(word) & _first_bytes(width) != _0:
        return _NONE
    return _eight_digits(word, width)


def digits(words: U64Array, at: U, n: U) -> U:
    """Read ``n`` (1 to 16) decimal digits; NONE if there are not as many."""
    word, first = words[at], min(n, _8)
    if _not_decimal(word) & _first_bytes(first) != _0:
        return _NONE
    value = _eight_digits(word, first)
    if n > _8:
        word = words[at + _8]
        n -= _8
        if _not_decimal(word) & _first_bytes(n) != _0:
            return _NONE
        for _ in range(n):
            value *= _10
        value += _eight_digits(word, n)
    return value


def flags_key(prefix: U, flags: U) -> U:
    """What flags of a prefix are found by: they are at most 5 characters."""
    return flags | (prefix << _56)


def find_flags(table: U64Array, key: U) -> U:
    """What the flags mean; 0 if they are not in the table."""
    last = U(len(table)) - _1
    slot = ((key * MIX) >> _32) & last
    while table[slot, 1] != _0 and table[slot, 0] != key:
        slot = (slot + _1) & last
    return U(table[slot, 1])


def find_thread(
    words: U64Array, at: U, prefixes: U64Array, prefix: U, into: Columns, row: U, n_threads: U
) -> U:
    """Find the thread of a line among those that were met, or put it behind them.

    Returns:
        Which it is; NONE if its name is one that a line may be misread by.
    """
    masks = prefixes[prefix, COMM_MASK_1], prefixes[prefix, COMM_MASK_2]
    at += prefixes[prefix, COMM_AT]
    first, second = words[at] & masks[0], words[at + _8] & masks[1]
    tid = U(np.int64(into.tid[row]) + 1)
    tgid = U(np.int64(into.tgid[row]) + 1)
    last = U(len(into.thread_table)) - _1
    key = (first ^ (second * MIX)) * MIX
    slot = (((key ^ tid ^ (tgid << _32)) * MIX) >> _40) & last
    known = into.threads
    while into.thread_table[slot] != 0:
        thread = U(into.thread_table[slot]) - _1
        if (
            known[thread, 0] == first
            and known[thread, 1] == second
            and known[thread, 2] == tid
            and known[thread, 3] == tgid
        ):
            return thread
        slot = (slot + _1) & last
    name = first | (_BLANKS & ~masks[0]), second | (_BLANKS & ~masks[1])
    is_blank = masks[0] != _0 and name[0] == _BLANKS and name[1] == _BLANKS
    if is_blank or not _is_plain(name[0], name[1]):
        return _NONE
    known[n_threads, 0], known[n_threads, 1] = first, second
    known[n_threads, 2], known[n_threads, 3], known[n_threads, 4] = tid, tgid, _0
    into.thread_table[slot] = n_threads + _1
    return n_threads


def _is_plain(first: U, second: U) -> bool:
    """Whether a name of 16 bytes has no control character and no end that is a prefix's.

    That is a colon with a blank behind it; '>' and '#' at the start of a line are other marks.
    """
    controls = ((first - _BLANKS) & ~first) | ((second - _BLANKS) & ~second)
    colons, more = _zero_bytes(first ^ _COLONS), _zero_bytes(second ^ _COLONS)
    ends = (colons << _8) & _zero_bytes(first ^ _BLANKS)
    ends |= ((more << _8) | (colons >> _56)) & _zero_bytes(second ^ _BLANKS)
    is_marked = first & _255 == _QUOTE or first & _255 == _HASH
    return controls & _HIGH == _0 and ends == _0 and more >> _63 == _0 and not is_marked


def read_event(
    words: U64Array, at: U, stop: U, patterns: LinePatterns, prefix: U, fields: U64Array, first: U
) -> tuple[U, U]:
    """Read what follows the prefix of a line; put its fields from ``first`` on.

    Returns:
        The event, NONE if the line fits no pattern; and the node at which its pattern ends,
        0 for an event that has no rows.
    """
    names = patterns.names
    at += patterns.prefixes[prefix, EVENT_AT]
    while words[at] & _255 == _BLANK:
        at += _1
    key, size = name_key(words, at)
    last = U(len(names)) - _1
    slot = (key >> _32) & last
    while names[slot, NAME_SIZE] != _0 and not (
        names[slot, NAME_SIZE] == size and _is_name(words, at, size, names, slot)
    ):
        slot = (slot + _1) & last
    at += size
    if names[slot, NAME_SIZE] == _0 or (at != stop and words[at] & _255 != _BLANK):
        return _NONE, _0
    while words[at] & _255 == _BLANK:
        at += _1
    if names[slot, NAME_ROOT] == _0:
        opens = _1 if words[at] & _255 == _OPENING else _0
        return (names[slot, NAME_EVENT] if opens == names[slot, NAME_OPENS] else _NONE), _0
    leaf = read_arguments(words, at, stop, patterns.nodes, names[slot, NAME_ROOT], fields, first)
    return (patterns.nodes[leaf + _2] if leaf != _0 else _NONE), leaf


def name_key(words: U64Array, at: U) -> tuple[U, U]:
    """A hash of the name at a place, and its length: up to a blank or control character."""
    key = size = _0
    for _ in range(MOST_NAME_WORDS):
        word = words[at + size]
        marks = (word - _PRINTED) & ~word & _HIGH
        n = _first_mark(marks) if marks != _0 else _8
        if n != _0:
            key = (key ^ (word & _first_bytes(n))) * MIX
            key ^= key >> _29
        size += n
        if n != _8:
            break
    return key, size


def _is_name(words: U64Array, at: U, size: U, names: U64Array, slot: U) -> bool:
    """Whether a name of this size is that of an entry."""
    place = U(NAME_WORDS)
    while size > _8:
        if words[at] != names[slot, place]:
            return False
        at += _8
        size -= _8
        place += _1
    return bool((words[at] ^ names[slot, place]) & _first_bytes(size) == _0)


def read_arguments(
    words: U64Array, at: U, stop: U, nodes: U64Array, node: U, fields: U64Array, first: U
) -> U:
    """Read arguments, which end at ``stop``, in the pattern of a tree that they have.

    Every node has its kind, and the node to try instead; the next one follows it.  LITERAL:
    size, mask of the last word, words.  END: event, layout, number of words of fields; those
    words that are the same in every such line.

    Returns:
        The node of the end; 0 if there is none.
    """
    n_words = first
    while node != _0:
        kind = nodes[node]
        if kind == LITERAL:
            if _is_literal(words, at, nodes, node):
                at += nodes[node + _2]
                node += _4 + ((nodes[node + _2] + _7) >> _3)
                continue
        elif kind == END:
            if at == stop:
                place = node + _5
                while n_words < first + nodes[node + _4]:
                    fields[n_words] = nodes[place]
                    n_words += _1
                    place += _1
                return node
        else:
            value = _0
            if kind == SKIPPED:
                n = hexadecimal_digits(words, at)
            elif kind == HEX:
                n, value = hexadecimal(words, at)
            else:
                n, value = decimal(words, at)
            if n != _0:
                if kind != SKIPPED:
                    fields[n_words] = value
                    n_words += _1
                at += n
                node += _2
                continue
        node = nodes[node + _1]
    return _0


def _is_literal(words: U64Array, at: U, nodes: U64Array, node: U) -> bool:
    """Whether the text at a place is that of a LITERAL node."""
    place = node + _4
    last = place + ((nodes[node + _2] - _1) >> _3)
    while place != last:
        if words[at] != nodes[place]:
            return False
        at += _8
        place += _1
    return bool((words[at] ^ nodes[place]) & nodes[node + _3] == _0)


def decimal(words: U64Array, at: U) -> tuple[U, U]:
    """The number of decimal digits at a place and their value; 0 if there are more than 15.

    Sixteen would be bare hexadecimal: events.fields.to_word.
    """
    word = words[at]
    n = _first_byte_of(_not_decimal(word))
    if n == _0:
        return _0, _0
    value = _eight_digits(word, n)
    if n == _8:
        word = words[at + _8]
        more = _first_byte_of(_not_decimal(word))
        if more == _8:
            return _0, _0
        if more != _0:
            for _ in range(more):
                value *= _10
            value += _eight_digits(word, more)
            n += more
    return n, value


def hexadecimal(words: U64Array, at: U) -> tuple[U, U]:
    """The number of lower-case hexadecimal digits at a place, at most 16, and their value."""
    n, value = _eight_hex(words[at])
    if n == _8:
        more, low = _eight_hex(words[at + _8])
        value = (value << (more << _2)) | low
        n += more
    return n, value


def hexadecimal_digits(words: U64Array, at: U) -> U:
    """The number of lower-case hexadecimal digits at a place, at most 16."""
    n = _first_byte_of(_not_hex(words[at]))
    if n == _8:
        n += _first_byte_of(_not_hex(words[at + _8]))
    return n


def count(into: Columns, row: U, event: U) -> None:
    """Count a line for its event and its CPU."""
    if into.events[event, 0] == 0:
        into.events[event, 1] = into.line[row]
    into.events[event, 0] += 1
    cpu, ts_ns = min(U(np.int64(into.cpu[row]) + 1), U(MAX_CPUS + 1)), into.ts_ns[row]
    if into.cpus[cpu, 0] == 0:
        into.cpus[cpu, 1] = into.cpus[cpu, 2] = ts_ns
    into.cpus[cpu, 0] += 1
    into.cpus[cpu, 1] = min(into.cpus[cpu, 1], ts_ns)
    into.cpus[cpu, 2] = max(into.cpus[cpu, 2], ts_ns)


def line_end(words: U64Array, at: U) -> U:
    """The next newline: there is one."""
    a = b = c = d = _0
    while (a | b | c | d) == _0:
        a, b = words[at] ^ _NEWLINES, words[at + _8] ^ _NEWLINES
        c, d = words[at + _16] ^ _NEWLINES, words[at + _24] ^ _NEWLINES
        a, b = (a - _ONES) & ~a & _HIGH, (b - _ONES) & ~b & _HIGH
        c, d = (c - _ONES) & ~c & _HIGH, (d - _ONES) & ~d & _HIGH
        at += _32
    if a != _0:
        return at - _32 + _first_mark(a)
    if b != _0:
        return at - _24 + _first_mark(b)
    if c != _0:
        return at - _16 + _first_mark(c)
    return at - _8 + _first_mark(d)


def _first_bytes(n: U) -> U:
    """A mask of the first ``n`` bytes (1 to 8) of a word."""
    return _NONE >> (_64 - (n << _3))


def _first_mark(marks: U) -> U:
    """The first byte whose highest bit is set, and no other of its bits: there is one."""
    return (((((marks & (~marks + _1)) - _1) & _ONES) * _ONES) >> _56) - _1


def _zero_bytes(word: U) -> U:
    """The highest bit of every byte that is zero."""
    return ~((((word & ~_HIGH) + ~_HIGH) | word) | ~_HIGH)


def _first_byte_of(word: U) -> U:
    """The first byte that is not zero; 8 if there is none."""
    marks = (((word & ~_HIGH) + ~_HIGH) | word) & _HIGH
    return _first_mark(marks) if marks != _0 else _8


def _not_decimal(word: U) -> U:
    """A word whose bytes are zero where there is a decimal digit."""
    # A digit's high half is 3, and adding 6 does not carry out of the low one.
    carry = ((word & _LOW) + _SIXES) & _CARRY
    return ((word & ~_LOW) ^ _ZEROS) | carry


def _eight_digits(word: U, n: U) -> U:
    """The value of the first ``n`` (1 to 8) decimal digits."""
    # What is shifted in reads as the digit 0.
    w = (word - _ZEROS) << (_64 - (n << _3))
    w = (w * _10) + (w >> _8)
    low = (w & _4TH) * _MILLIONS
    high = ((w >> _16) & _4TH) * _THOUSANDS
    return (low + high) >> _32


def _eight_hex(word: U) -> tuple[U, U]:
    """The number of hexadecimal digits that a word begins with, and their value."""
    n = _first_byte_of(_not_hex(word))
    if n == _0:
        return _0, _0
    w = ((word & _LOW) + ((word >> _6) & _ONES) * _9) << (_64 - (n << _3))
    w = ((w << _4) | (w >> _8)) & _2ND
    w = ((w << _8) | (w >> _16)) & _PAIRS
    return n, ((w << _16) | (w >> _32)) & _HALF


def _not_hex(word: U) -> U:
    """A word whose bytes are zero where there is a lower-case hexadecimal digit."""
    nibbles = (word & _LOW) + ((word >> _6) & _ONES) * _9
    # Written as digits again, they must be what they were read from: no other byte gives
    # a number below 16 that is written like it.
    letter = ((nibbles + _SIXES) >> _4) & _ONES
    return ((nibbles + _ZEROS + letter * _TO_LETTER) ^ word) | (nibbles & ~_LOW)
