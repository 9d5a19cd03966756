"""Words and numbers of eight bytes at a time, held against Python's own."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdxtrace.ingest.source import block_of
from tdxtrace.ingest.text import bytewise
from tdxtrace.ingest.text.bytewise import Text, Words

# Every byte, and more of those next to digits and letters.
NEAR = b"/:0189@AFGafg`\x2f\x3a\x60\x67 \x1f\x21\0\x7f\x80\xb0\xb9\xe1\xff"
byte = st.one_of(st.sampled_from(NEAR), st.integers(0, 255)).filter(lambda b: b != 10)
texts = st.lists(byte, min_size=24, max_size=24).map(bytes)
digits = st.text("0123456789", min_size=24, max_size=24).map(str.encode)
hexadecimals = st.text("0123456789abcdef", min_size=24, max_size=24).map(str.encode)


def words(text: bytes) -> Words:
    """The three words of a line of 24 bytes."""
    made = Text(block_of([text, b"\n"]))
    return made.load(made.starts, 3)


@st.composite
def nearly(draw: st.DrawFn) -> bytes:
    """Digits of which one is another byte."""
    text = bytearray(draw(st.one_of(digits, hexadecimals)))
    text[draw(st.integers(0, 23))] = draw(byte)
    return bytes(text)


some = st.one_of(texts, digits, hexadecimals, nearly())
places = st.tuples(st.integers(0, 8), st.integers(1, bytewise.MAX_DIGITS))


@given(some, places)
def test_decimal_numbers(text: bytes, place: tuple[int, int]) -> None:
    offset, n = place
    piece = text[offset : offset + n]
    value, good = bytewise.decimal(words(text), offset, n)
    is_number = re.fullmatch(rb"[0-9]+", piece) is not None
    assert bool(good[0]) is is_number
    assert not is_number or int(value[0]) == int(piece)


@given(some, places)
def test_hexadecimal_numbers(text: bytes, place: tuple[int, int]) -> None:
    offset, n = place
    piece = text[offset : offset + n]
    value, good = bytewise.hexadecimal(words(text), offset, n)
    is_number = re.fullmatch(rb"[0-9a-f]+", piece) is not None
    assert bool(good[0]) is is_number
    assert not is_number or int(value[0]) == int(piece, 16)


@pytest.mark.parametrize("at", range(16))
@pytest.mark.parametrize("wrong", [b"/", b":", b"`", b"g", b"@", b"G", b"A", b"\xb5", b"\0"])
def test_one_wrong_byte_at_any_place_is_noticed(at: int, wrong: bytes) -> None:
    text = bytearray(b"4" * 24)
    text[at : at + 1] = wrong
    for read in (bytewise.decimal, bytewise.hexadecimal):
        assert read(words(b"4" * 24), 0, 16)[1][0]
        assert not read(words(bytes(text)), 0, 16)[1][0]


@given(some, st.integers(0, 16))
def test_a_word_at_any_place(text: bytes, offset: int) -> None:
    column = bytewise.column(words(text), offset)
    assert int(column[0]) == int.from_bytes(text[offset : offset + 8], "little")


def first_word(text: bytes) -> Words:
    found: Words = words(text)[0]
    return found


@given(some, st.integers(0, 8))
def test_first_bytes(text: bytes, n: int) -> None:
    kept = int.from_bytes(text[:n], "little")
    assert int(bytewise.first_bytes(first_word(text), n)[0]) == kept
    assert int(bytewise.keep(first_word(text), np.array([n], np.uint64))[0]) == kept


@given(some | st.text(" 0a", min_size=24, max_size=24).map(str.encode))
def test_counts_of_leading_bytes(text: bytes) -> None:
    head = text[:8]
    assert int(bytewise.spaces(first_word(text))[0]) == len(head) - len(head.lstrip(b" "))
    n = len(re.match(rb"[0-9]*", head)[0])  # type: ignore[index]
    assert int(bytewise.digits(first_word(text))[0]) == n


@given(some, st.integers(0, 8))
def test_eight_digits_reads_the_first_of_them(text: bytes, n: int) -> None:
    piece = text[:n]
    if re.fullmatch(rb"[0-9]*", piece):
        assert int(bytewise.eight_digits(first_word(text), n)[0]) == int(piece or b"0")


@given(st.lists(texts.map(lambda text: text[:9]), max_size=6))
def test_lines_of_a_block(lines: list[bytes]) -> None:
    text = Text(block_of([b"".join(line + b"\n" for line in lines)]))
    assert len(text) == len(lines)
    assert [text.line(n) for n in range(len(lines))] == lines
