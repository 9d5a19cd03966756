"""Parse text lines that match known patterns byte for byte: prefix, event name, arguments.

The text is an array of the little-endian 64-bit word that begins at each byte: whole lines, each
ended by a newline, followed by 64 readable bytes.  The arrays of :class:`LinePatterns` describe
the patterns.  For a line that fits no pattern only its position is recorded.

All numbers are unsigned 64-bit: numba checks every signed index for a negative value.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np

from tdxtrace.ingest.batch import MAX_CPUS, I8Array, I32Array, I64Array, U64Array

U = np.uint64


class LinePatterns(NamedTuple):
    """Patterns of lines, as arrays; made by text.patterns.PatternCache."""

    prefixes: U64Array
    """By prefix and PREFIX column: offsets of its parts, in bytes from the start of the line."""
    flags: U64Array
    """Hash table of flags: key (:func:`flags_key`) and in_irq + 2; 0: empty slot."""
    names: U64Array
    """Hash table of event names with their colon, by NAME column."""
    nodes: U64Array
    """Tree of argument patterns, see :func:`read_arguments`; index 0 is not a node."""


class Columns(NamedTuple):
    """Output arrays of :func:`read_lines`; one entry per parsed line unless stated otherwise."""

    line: I64Array
    """Index of the line in this call, from 0."""
    ts_ns: I64Array
    tid: I32Array
    tgid: I32Array
    cpu: I32Array
    in_irq: I8Array
    event: I32Array
    layout: I32Array
    """-1 for a line whose event produces no rows."""
    first_word: I64Array
    words: U64Array
    """The fields of all lines, concatenated."""
    left: I64Array
    """By line that fits no pattern: its index, first byte and end byte."""
    threads: U64Array
    """By thread seen: the two words of its name, tid, tgid, and 1 if one of its lines has rows."""
    thread_table: I32Array
    """Hash table of ``threads``: 1 + index; 0: empty slot."""
    events: I64Array
    """By event: number of lines, and index of the first one."""
    cpus: I64Array
    """By CPU: number of lines, first and last time in ns."""
    used: I8Array
    """By prefix: whether any line has it."""
    numbers: U64Array
    """Scratch space for the N_NUMBERS numbers of one prefix."""


# Columns of LinePatterns.prefixes.  A number has three columns: its offset, its width in bytes,
# and on which side of its digits blanks are allowed.
EVENT_AT, COMM_AT, COMM_MASK_1, COMM_MASK_2, FLAGS_AT, FLAGS_MASK = range(6)
TID, TGID, CPU, WHOLE, PART = range(6, 21, 3)
N_NUMBERS: Final = 5
WHOLE_NS, PART_NS, MAX_WHOLE, N_LITERALS, LITERALS = range(21, 26)
NO_BLANKS, BLANKS_BEFORE, BLANKS_AFTER = range(3)
# A literal has three columns: the offset of a word, its value, and a mask of the bits to compare.
MAX_LITERALS: Final = 24
PREFIX_COLUMNS: Final = LITERALS + 3 * MAX_LITERALS
# Columns of LinePatterns.names; the words of the name begin at NAME_WORDS.
NAME_SIZE, NAME_EVENT, NAME_ROOT, NAME_OPENS, NAME_WORDS = range(5)
# The kernel allows 64 bytes for a name and for its group (MAX_EVENT_NAME_LEN, Linux
# kernel/trace/trace.h); names in use are far shorter.
MAX_NAME_WORDS: Final = 8
NAME_COLUMNS: Final = NAME_WORDS + MAX_NAME_WORDS
# Kinds of nodes.  HEX and DECIMAL numbers become fields; SKIPPED hexadecimal digits do not.
LITERAL, HEX, DECIMAL, SKIPPED, END = map(U, range(5))
# Most fields of one line, in words.
MAX_FIELDS: Final = 64
# Most threads that one call can record.
MAX_THREADS: Final = 2048
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
    words: U64Array, at: U, n_bytes: U, max_bytes: U, patterns: LinePatterns, into: Columns
) -> tuple[U, U, U, U, U, U, U]:
    """Parse lines until the end of the text or until an output array is full.

    Args:
        words: The word at each byte of the text.
        at: The byte at which the first line begins.
        n_bytes: Length of the text.
        max_bytes: Lines longer than this count as fitting no pattern.
        patterns: Patterns of lines.
        into: Filled; the caller zeroes ``thread_table``, ``events``, ``cpus`` and ``used``.

    Returns:
        The byte at which to continue; the number of lines read, of parsed lines among them, and
        of parsed lines with rows; the number of field words, of lines that fit no pattern, and of
        threads.
    """
    n_lines = n_read = n_own = n_words = n_left = n_threads = prefix = _0
    # Always 1: with this check the compiler omits a multiplication from every read of a word.
    if words.strides[0] != 1:
        return at, n_lines, n_read, n_own, n_words, n_left, n_threads
    while at < n_bytes and has_room(into, n_read, n_words, n_left, n_threads):
        end = line_end(words, at)
        stop = before_returns(words, at, end)
        found = _NONE
        if end - at <= max_bytes:
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
    """Return whether the output arrays have room for another line after these counts."""
    return bool(
        n_read < U(len(into.line))
        and n_left < U(len(into.left))
        and n_threads < U(len(into.threads))
        and n_words + U(MAX_FIELDS) <= U(len(into.words))
    )


def before_returns(words: U64Array, at: U, end: U) -> U:
    """Return the end of a line without its trailing carriage returns."""
    while end > at and words[end - _1] & _255 == _CR:
        end -= _1
    return end


def read_prefix(
    words: U64Array, at: U, stop: U, last: U, patterns: LinePatterns, into: Columns, row: U
) -> U:
    """Match the prefix of a line against all prefix patterns, the ``last`` matched one first.

    Returns:
        Index of the matching pattern; NONE if none matches.
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
    """Parse a prefix by one pattern into ``row``; return whether it matches."""
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
    if whole >= known[prefix, MAX_WHOLE]:
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
    """Parse a number of a prefix; 0 if the pattern has no such number, NONE if it is malformed."""
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
    """Parse ``n`` (1 to 16) decimal digits; NONE if there are fewer."""
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
    """Return the hash table key of a prefix and its flags, which are at most 5 characters."""
    return flags | (prefix << _56)


def find_flags(table: U64Array, key: U) -> U:
    """Return in_irq + 2 for a flags key; 0 if it is not in the table."""
    last = U(len(table)) - _1
    slot = ((key * MIX) >> _32) & last
    while table[slot, 1] != _0 and table[slot, 0] != key:
        slot = (slot + _1) & last
    return U(table[slot, 1])


def find_thread(
    words: U64Array, at: U, prefixes: U64Array, prefix: U, into: Columns, row: U, n_threads: U
) -> U:
    """Find the thread of a line in ``into.threads``, or append it.

    Returns:
        Index of the thread; NONE if its name makes the line ambiguous to parse.
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
    """Return whether a 16-byte thread name is free of text that parsers take for syntax.

    It has no control character, no colon before a blank, which ends a prefix, no colon as its last
    byte, and does not start with '>' or '#', which mark other kinds of lines.
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
    """Parse the event name and arguments of a line; write its fields from ``first`` on.

    Returns:
        The event, NONE if the line fits no pattern; and the END node of its pattern, 0 for an
        event without rows.
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
    """Return a hash and the length of the name at a byte: up to a blank or control character."""
    key = size = _0
    for _ in range(MAX_NAME_WORDS):
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
    """Return whether the name of ``size`` bytes at ``at`` equals the name in a table slot."""
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
    """Parse arguments, which end at ``stop``, by the first matching pattern of a tree.

    A node is its kind, the alternative node if it does not match, and its data; the node to match
    next follows it.  Data of LITERAL: size, mask of the last word, words.  Data of END: event,
    layout, number of field words; the words that are constant in every such line.

    Returns:
        The END node; 0 if no pattern matches.
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
    """Return whether the text at a byte equals the text of a LITERAL node."""
    place = node + _4
    last = place + ((nodes[node + _2] - _1) >> _3)
    while place != last:
        if words[at] != nodes[place]:
            return False
        at += _8
        place += _1
    return bool((words[at] ^ nodes[place]) & nodes[node + _3] == _0)


def decimal(words: U64Array, at: U) -> tuple[U, U]:
    """Return the number of decimal digits at a byte and their value; 0 digits if more than 15.

    Sixteen digits are bare hexadecimal: events.fields.to_word.
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
    """Return the number of lower-case hexadecimal digits at a byte, at most 16, and their value."""
    n, value = _eight_hex(words[at])
    if n == _8:
        more, low = _eight_hex(words[at + _8])
        value = (value << (more << _2)) | low
        n += more
    return n, value


def hexadecimal_digits(words: U64Array, at: U) -> U:
    """Return the number of lower-case hexadecimal digits at a byte, at most 16."""
    n = _first_byte_of(_not_hex(words[at]))
    if n == _8:
        n += _first_byte_of(_not_hex(words[at + _8]))
    return n


def count(into: Columns, row: U, event: U) -> None:
    """Add a line to the counts of its event and its CPU."""
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
    """Return the byte of the next newline; the text must contain one."""
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
    """Return a mask of the first ``n`` bytes (1 to 8) of a word."""
    return _NONE >> (_64 - (n << _3))


def _first_mark(marks: U) -> U:
    """Return the index of the first nonzero byte; bytes must be 0 or 0x80, and not all 0."""
    return (((((marks & (~marks + _1)) - _1) & _ONES) * _ONES) >> _56) - _1


def _zero_bytes(word: U) -> U:
    """Return a word with 0x80 in every byte that is zero in ``word``, 0 elsewhere."""
    return ~((((word & ~_HIGH) + ~_HIGH) | word) | ~_HIGH)


def _first_byte_of(word: U) -> U:
    """Return the index of the first nonzero byte; 8 if all are zero."""
    marks = (((word & ~_HIGH) + ~_HIGH) | word) & _HIGH
    return _first_mark(marks) if marks != _0 else _8


def _not_decimal(word: U) -> U:
    """Return a word whose bytes are zero where ``word`` has a decimal digit."""
    # The high nibble of a digit is 3, and adding 6 to its low nibble does not carry.
    carry = ((word & _LOW) + _SIXES) & _CARRY
    return ((word & ~_LOW) ^ _ZEROS) | carry


def _eight_digits(word: U, n: U) -> U:
    """Return the value of the first ``n`` (1 to 8) decimal digits."""
    # The shift fills with zero bytes, which count as the digit 0.
    w = (word - _ZEROS) << (_64 - (n << _3))
    w = (w * _10) + (w >> _8)
    low = (w & _4TH) * _MILLIONS
    high = ((w >> _16) & _4TH) * _THOUSANDS
    return (low + high) >> _32


def _eight_hex(word: U) -> tuple[U, U]:
    """Return the number of hexadecimal digits at the start of a word, and their value."""
    n = _first_byte_of(_not_hex(word))
    if n == _0:
        return _0, _0
    w = ((word & _LOW) + ((word >> _6) & _ONES) * _9) << (_64 - (n << _3))
    w = ((w << _4) | (w >> _8)) & _2ND
    w = ((w << _8) | (w >> _16)) & _PAIRS
    return n, ((w << _16) | (w >> _32)) & _HALF


def _not_hex(word: U) -> U:
    """Return a word whose bytes are zero where ``word`` has a lower-case hexadecimal digit."""
    nibbles = (word & _LOW) + ((word >> _6) & _ONES) * _9
    # Encode each nibble as a digit again and compare with the byte: only a lower-case
    # hexadecimal digit gives a nibble below 16 and encodes to itself.
    letter = ((nibbles + _SIXES) >> _4) & _ONES
    return ((nibbles + _ZEROS + letter * _TO_LETTER) ^ word) | (nibbles & ~_LOW)
