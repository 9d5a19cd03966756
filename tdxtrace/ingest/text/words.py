"""Words of eight bytes, one at a time: as bytewise has them, in loops that are compiled."""

from __future__ import annotations

from typing import Final

import numpy as np

from tdxtrace.ingest.compiled import inlined
from tdxtrace.ingest.raw import U64Array

U = np.uint64

# In place of what is not there or not known; as a signed number -1.
NONE: Final = U(0xFFFFFFFFFFFFFFFF)
NO_NUMBER: Final = U(0xFFFFFFFFFFFFFFFE)
_DASHES: Final = U(0x002D2D2D2D2D2D2D)
_ONES: Final = U(0x0101010101010101)
_HIGH: Final = U(0x8080808080808080)
_NEWLINES: Final = U(0x0A0A0A0A0A0A0A0A)
_BLANKS: Final = U(0x2020202020202020)
_ZEROS: Final = U(0x3030303030303030)
_LOW: Final = U(0x0F0F0F0F0F0F0F0F)
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
_16, _24, _32, _56, _64, _255 = map(U, (16, 24, 32, 56, 64, 255))
_BLANK, _DIGIT_0 = map(U, b" 0")


@inlined
def line_end(words: U64Array, at: U) -> U:
    """The next newline: there is one."""
    a = b = c = d = _0
    while not a | b | c | d:
        a, b = words[at] ^ _NEWLINES, words[at + _8] ^ _NEWLINES
        c, d = words[at + _16] ^ _NEWLINES, words[at + _24] ^ _NEWLINES
        a, b = (a - _ONES) & ~a & _HIGH, (b - _ONES) & ~b & _HIGH
        c, d = (c - _ONES) & ~c & _HIGH, (d - _ONES) & ~d & _HIGH
        at += _32
    if a:
        return at - _32 + first_mark(a)
    if b:
        return at - _24 + first_mark(b)
    return at - _16 + first_mark(c) if c else at - _8 + first_mark(d)


@inlined
def first_bytes(n: U) -> U:
    """A mask of the first ``n`` bytes (1 to 8) of a word."""
    return NONE >> (_64 - (n << _3))


@inlined
def first_mark(marks: U) -> U:
    """The first byte whose highest bit is set, and no other of its bits: there is one."""
    return (((((marks & (~marks + _1)) - _1) & _ONES) * _ONES) >> _56) - _1


@inlined
def not_decimal(word: U) -> U:
    """A word whose bytes are zero where there is a decimal digit: bytewise has the same."""
    carry = ((word & _LOW) + _SIXES) & _CARRY
    return ((word & ~_LOW) ^ _ZEROS) | carry


@inlined
def eight_digits(word: U, n: U) -> U:
    """The value of the first ``n`` (1 to 8) decimal digits."""
    w = (word - _ZEROS) << (_64 - (n << _3))
    w = (w * _10) + (w >> _8)
    low = (w & _4TH) * _MILLIONS
    high = ((w >> _16) & _4TH) * _THOUSANDS
    return (low + high) >> _32


@inlined
def decimal(words: U64Array, at: U, n: U) -> tuple[U, bool]:
    """Read ``n`` (1 to 16) decimal digits; say whether there are as many."""
    word, first = words[at], min(n, _8)
    value, wrong = eight_digits(word, first), not_decimal(word) & first_bytes(first)
    for k in range(_8, n):
        digit = (words[at + k] & _255) - _DIGIT_0
        value, wrong = value * _10 + digit, wrong | U(digit > _9)
    return value, wrong == _0


@inlined
def hexadecimal(words: U64Array, at: U, n: U) -> tuple[U, bool]:
    """Read ``n`` (1 to 16) lower-case hexadecimal digits; say whether there are as many."""
    value, wrong = _eight_hex(words[at], min(n, _8))
    if n > _8:
        low, is_wrong = _eight_hex(words[at + _8], n - _8)
        value, wrong = (value << ((n - _8) << _2)) | low, wrong | is_wrong
    return value, wrong == _0


@inlined
def _eight_hex(word: U, n: U) -> tuple[U, U]:
    """The value of the first ``n`` (1 to 8) hexadecimal digits; 0 if they are."""
    letter = (word >> _6) & _ONES
    nibbles = (word & _LOW) + letter * _9
    letter = ((nibbles + _SIXES) >> _4) & _ONES
    wrong = ((nibbles + _ZEROS + letter * _TO_LETTER) ^ word) | (nibbles & ~_LOW)
    w = nibbles << (_64 - (n << _3))
    w = ((w << _4) | (w >> _8)) & _2ND
    w = ((w << _8) | (w >> _16)) & _PAIRS
    return ((w << _16) | (w >> _32)) & _HALF, wrong & first_bytes(n)


@inlined
def thread(word: U, width: U, is_dashed: U) -> U:
    """The thread's number, with blanks behind it or (perf) before it."""
    while not is_dashed and width and word & _255 == _BLANK:
        word, width = word >> _8, width - _1
    if width < _8:  # what lies behind the columns reads as blank
        word = (word & ~(NONE << (width << _3))) | (_BLANKS << (width << _3))
    wrong = not_decimal(word)
    wrong = (wrong | ((wrong & ~_HIGH) + ~_HIGH)) & _HIGH
    n = first_mark(wrong) if wrong else _8
    if n == _0 or (n < _8 and (word ^ _BLANKS) >> (n << _3)):
        return NO_NUMBER
    return eight_digits(word, n)


@inlined
def process(word: U) -> U:
    """The number in seven columns; NONE where it is dashes."""
    n, word = _7, word & first_bytes(_7)
    if word == _DASHES:
        return NONE
    while n and word & _255 == _BLANK:
        word, n = word >> _8, n - _1
    if n == _0 or not_decimal(word) & first_bytes(n):
        return NO_NUMBER
    return eight_digits(word, n)
