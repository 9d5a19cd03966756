"""The shape of an event's text: what stays the same, and where the numbers are."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

import numpy as np

from tdxtrace.ingest.events.fields import Fields
from tdxtrace.ingest.raw import BoolArray, U64Array
from tdxtrace.ingest.source import SPARE_BYTES
from tdxtrace.ingest.text import bytewise
from tdxtrace.ingest.text.bytewise import At, Text

_HEX: Final = re.compile(r"0x[0-9a-f]{1,16}")
# Sixteen digits would be bare hexadecimal: fields.to_word.
_DECIMAL: Final = re.compile(r"[0-9]{1,15}")
_BARE_HEX: Final = re.compile(r"[0-9a-f]{1,16}")


@dataclass(frozen=True, slots=True)
class Number:
    """Digits at one place of the text, and the field they fill; None: nothing needs them."""

    offset: int
    n_digits: int
    base: int
    slot: str | None


@dataclass(frozen=True, slots=True)
class Template:
    """The arguments of one event, to the newline: every byte is literal or a digit.

    Numbers of other lengths make another template; a capture has a few of each.
    """

    n_bytes: int
    """Length of the arguments with the newline."""
    masks: tuple[np.uint64, ...]
    literals: tuple[np.uint64, ...]
    """Words of the text, zero where ``masks`` is."""
    numbers: tuple[Number, ...]
    constants: tuple[tuple[str, int], ...]
    """Fields whose value follows from the literals, such as a symbolic exit reason."""

    @property
    def slots(self) -> list[str]:
        """The fields that it fills."""
        numbers = [number.slot for number in self.numbers if number.slot is not None]
        return numbers + [slot for slot, _ in self.constants]

    def match(self, text: Text, at: At) -> tuple[BoolArray, dict[str, U64Array]]:
        """Read arguments of ``n_bytes`` that begin at ``at``.

        Returns:
            Which of them have exactly this shape, and the numbers of those, by slot.
        """
        words = text.load(at, len(self.masks))
        differs = np.zeros(len(at), np.uint64)
        for word, mask, literal in zip(words, self.masks, self.literals, strict=True):
            differs |= (word ^ literal) & mask
        good = differs == 0
        values: dict[str, U64Array] = {}
        for number in self.numbers:
            read = bytewise.hexadecimal if number.base == 16 else bytewise.decimal
            value, is_number = read(words, number.offset, number.n_digits)
            good &= is_number
            if number.slot is not None:
                values[number.slot] = value
        return good, values


def template_of(args: str, fields: Fields, is_narrow: bool) -> Template | None:
    """Return the shape of ``args``, from what the general path read in it.

    Args:
        args: The text after the event's name.
        fields: What was read in it, and where.
        is_narrow: Whether numbers that nothing needs must be the same in other lines:
            addresses of code seldom change, and literal bytes are the quickest to compare.

    Returns:
        None where a number is written in a way that the numbers of other lines could
        not be told apart from: bare hexadecimal, signed, or upper case.
    """
    numbers: list[Number] = []
    spans: list[tuple[int, int, str | None]] = [(*span, s) for s, span in fields.spans.items()]
    if not is_narrow:
        spans += [(*span, None) for span in fields.skips]
    done = 0
    for start, end, slot in sorted(spans, key=lambda span: span[:2]):
        text = args[start:end]
        base = _base(text, bare_hex=slot is None or slot in fields.hexadecimal)
        if base is None or start < done:
            return None
        prefix = 2 if text.startswith("0x") else 0
        numbers.append(Number(start + prefix, end - start - prefix, base, slot))
        done = end
    data = bytearray(args.encode("latin-1") + b"\n")
    mask = bytearray(b"\xff" * len(data))
    for number in numbers:
        place = slice(number.offset, number.offset + number.n_digits)
        data[place] = mask[place] = bytes(number.n_digits)
    if len(data) + 8 > SPARE_BYTES:
        return None
    constants = tuple((s, v) for s, v in fields.values.items() if s not in fields.spans)
    return Template(len(data), _words(mask), _words(data), tuple(numbers), constants)


def _words(data: bytearray) -> tuple[np.uint64, ...]:
    whole = bytes(data) + bytes(-len(data) % 8)
    return tuple(np.frombuffer(whole, np.uint64))


def _base(text: str, *, bare_hex: bool) -> int | None:
    if _HEX.fullmatch(text) or (bare_hex and _BARE_HEX.fullmatch(text)):
        return 16
    return 10 if _DECIMAL.fullmatch(text) else None
