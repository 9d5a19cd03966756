"""Words and numbers at many places of a block of text at once, eight bytes at a time."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from tdxtrace.ingest.raw import BoolArray, U64Array
from tdxtrace.ingest.source import SPARE_BYTES, Block

At = NDArray[np.intp]
Words = NDArray[np.uint64]
"""Shape (k, n): k consecutive words at each of n places."""

NEWLINE: Final = 10
# Bytes looked through for newlines at a time: what that needs stays in a core's cache.
_PART: Final = 1 << 19
# Digits that fit the two words a number is read from.
MAX_DIGITS: Final = 16
_U = np.uint64
_ONES: Final = _U(0x0101010101010101)
_HIGH: Final = _U(0x8080808080808080)
_SPACES: Final = _U(0x2020202020202020)
_ZEROS: Final = _U(0x3030303030303030)
_LOW_NIBBLES: Final = _U(0x0F0F0F0F0F0F0F0F)
_HIGH_NIBBLES: Final = _U(0xF0F0F0F0F0F0F0F0)
_CARRY: Final = _U(0x1010101010101010)
_SIXES: Final = _U(0x0606060606060606)
_ALL: Final = 0xFFFFFFFFFFFFFFFF
_8: Final = _U(8)


class Text:
    """A block of whole lines, readable as bytes and as runs of 8-byte words anywhere."""

    __slots__ = ("_runs", "block", "data", "ends", "starts")

    def __init__(self, block: Block, ends: At | None = None) -> None:
        """Take a block, and the room behind it to load words across its end.

        Args:
            block: Whole lines.
            ends: Where they end, if that is known.
        """
        self.block = block
        self.data: Block = np.ndarray(len(block) + SPARE_BYTES, np.uint8, block.base)
        self._runs: dict[int, NDArray[np.void]] = {}
        self.ends = _ends(block) if ends is None else ends
        self.starts = np.empty_like(self.ends)
        self.starts[:1] = 0
        self.starts[1:] = self.ends[:-1] + 1

    def __len__(self) -> int:
        return len(self.starts)

    def load(self, at: At, n: int) -> Words:
        """Return ``n`` words from each place: row k is the k-th word of every place.

        One gather of a wide element costs little more than one of a narrow one.
        """
        runs = self._runs.get(n)
        if runs is None:
            dtype = np.dtype((np.void, 8 * n))
            size = len(self.data) - 8 * n + 1
            runs = np.ndarray(shape=(size,), dtype=dtype, buffer=self.data, strides=(1,))
            self._runs[n] = runs
        words: Words = runs[at].view("<u8").reshape(len(at), n).T
        return np.ascontiguousarray(words)

    def line(self, number: int) -> bytes:
        """The text of a line, without its newline."""
        return self.data[self.starts[number] : self.ends[number]].tobytes()


def _ends(block: Block) -> At:
    places = range(0, len(block), _PART)
    parts = [np.flatnonzero(block[at : at + _PART] == NEWLINE) + at for at in places]
    return np.concatenate([np.zeros(0, np.intp), *parts])


def column(words: Words, offset: int) -> U64Array:
    """The word at byte ``offset`` of each run."""
    index, shift = divmod(offset, 8)
    made: U64Array = words[index]
    return made if not shift else _shifted(words, index, 8 * shift)


def _shifted(words: Words, index: int, shift: int) -> U64Array:
    low: U64Array = words[index] >> _U(shift)
    if index + 1 < len(words):
        low |= words[index + 1] << _U(64 - shift)
    return low


def first_bytes(words: U64Array, n: int) -> U64Array:
    """Keep the first ``n`` bytes of each word (its low ones)."""
    made: U64Array = words & _U((1 << (8 * n)) - 1)
    return made


def spaces(words: U64Array) -> U64Array:
    """Count the blanks that each word begins with, 0 to 8."""
    return _leading_zero_bytes(words ^ _SPACES)


def token_length(words: U64Array) -> U64Array:
    """Count the bytes of each word before the first blank or control character, 0 to 8."""
    return _leading_zero_bytes((words - _U(0x2121212121212121)) & ~words & _HIGH)


def keep(words: U64Array, n: U64Array) -> U64Array:
    """Keep the first ``n`` bytes (0 to 8) of each word, which may differ."""
    # Shifting by 64 gives 0 in numpy, so that all 8 bytes can be kept.
    return words & ~(_U(_ALL) << (n * _8))


def digits(words: U64Array) -> U64Array:
    """Count the decimal digits that each word begins with, 0 to 8."""
    return _leading_zero_bytes(_not_decimal(words))


def eight_digits(words: U64Array, n: U64Array | int) -> U64Array:
    """The value of the first ``n`` (0 to 8) decimal digits of each word."""
    # Right-align: what is shifted in reads as the digit 0.
    w = (words - _ZEROS) << (_U(64) - _U(8) * np.asarray(n, np.uint64))
    w = (w * _U(10)) + (w >> _8)
    low = (w & _U(0x000000FF000000FF)) * _U(0x000F424000000064)
    high = ((w >> _U(16)) & _U(0x000000FF000000FF)) * _U(0x0000271000000001)
    return (low + high) >> _U(32)


def decimal(words: Words, offset: int, n: int) -> tuple[U64Array, BoolArray]:
    """Read ``n`` (1 to MAX_DIGITS) decimal digits at ``offset``; say where there are as many."""
    first = min(n, 8)
    word = column(words, offset)
    value, good = eight_digits(word, first), first_bytes(_not_decimal(word), first) == 0
    if n > 8:
        word = column(words, offset + 8)
        value = value * _U(10 ** (n - 8)) + eight_digits(word, n - 8)
        good &= first_bytes(_not_decimal(word), n - 8) == 0
    return value, good


def hexadecimal(words: Words, offset: int, n: int) -> tuple[U64Array, BoolArray]:
    """Read ``n`` (1 to MAX_DIGITS) lower-case hexadecimal digits; say where there are as many."""
    first = min(n, 8)
    value, good = _eight_hex(column(words, offset), first)
    if n > 8:
        low, is_low = _eight_hex(column(words, offset + 8), n - 8)
        value = (value << _U(4 * (n - 8))) | low
        good &= is_low
    return value, good


def _leading_zero_bytes(words: U64Array) -> U64Array:
    """Count the zero bytes that each word begins with, 0 to 8."""
    below = (words & (~words + _U(1))) - _U(1)
    return np.bitwise_count(below).astype(np.uint64) >> _U(3)


def _not_decimal(words: U64Array) -> U64Array:
    """Words whose bytes are zero where there is a decimal digit."""
    # A digit's high nibble is 3, and adding 6 does not carry out of the low one.
    carry = ((words & _LOW_NIBBLES) + _SIXES) & _CARRY
    return ((words & _HIGH_NIBBLES) ^ _ZEROS) | carry


def _eight_hex(words: U64Array, n: int) -> tuple[U64Array, BoolArray]:
    """The value of the first ``n`` (1 to 8) hexadecimal digits, and whether they are."""
    letter = (words >> _U(6)) & _ONES
    nibbles = (words & _LOW_NIBBLES) + letter * _U(9)
    # Written as digits again, they must be what they were read from: no other byte gives
    # a number below 16 that is written like it.
    letter = ((nibbles + _SIXES) >> _U(4)) & _ONES
    wrong = (nibbles + _ZEROS + letter * _U(ord("a") - ord("9") - 1)) ^ words
    wrong |= nibbles & _HIGH_NIBBLES
    good: BoolArray = first_bytes(wrong, n) == 0
    w = nibbles << _U(64 - 8 * n) if n < 8 else nibbles
    w = ((w << _U(4)) | (w >> _8)) & _U(0x00FF00FF00FF00FF)
    w = ((w << _8) | (w >> _U(16))) & _U(0x0000FFFF0000FFFF)
    value: U64Array = ((w << _U(16)) | (w >> _U(32))) & _U(0x00000000FFFFFFFF)
    return value, good
