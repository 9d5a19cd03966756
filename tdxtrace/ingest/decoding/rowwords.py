"""Where the words of a call's columns are, by the layouts of its entry and its return."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from tdxtrace.ingest.raw import BoolArray, U64Array
from tdxtrace.ingest.records.gather import Places
from tdxtrace.ingest.records.loops import Table

# Slots of the entry or, if it has none, of the return: decoding/attempts.py.
_OF_ENTRY: Final[Mapping[str, tuple[str, ...]]] = {
    name: (name,) for name in ("level", "td_id", "vp_id", "gpa", "page", "ext_err1", "ext_err2")
}
# Slots of the return, the first that it has: among them what a SEAMCALL answered.
_OF_RETURN: Final[Mapping[str, tuple[str, ...]]] = {
    **_OF_ENTRY,
    "ext_err1": ("ext_err1", "out_rcx"),
    "ext_err2": ("ext_err2", "out_rdx"),
    "status": ("status",),
}
# Others, as registers and numbers of functions, say more of a call than is read here.
SIMPLE: Final = frozenset(slot for slots in _OF_RETURN.values() for slot in slots)
_LEVEL: Final = "level"


@dataclass(frozen=True, slots=True)
class Words:
    """Where the words of some columns are, by the layouts of entry and return, and column."""

    names: tuple[str, ...]
    """The first is ``level``, whose numbers are small."""
    of_return: BoolArray
    """Whether it is the return that has the word."""
    offset: Places
    mask: U64Array
    """The bits that count; 0 where neither has the word."""
    sign: U64Array
    """The highest of them, if the number has a sign."""


def words_of(table: Table, names: frozenset[str]) -> Words:
    """Say where the words are of the columns that the slots ``names`` can fill."""
    columns = tuple(
        column
        for column, slots in _OF_RETURN.items()
        if column == _LEVEL or not names.isdisjoint(slots)
    )
    n = len(table.size)
    shape = n, n, len(columns)
    made = Words(
        columns,
        np.zeros(shape, np.bool_),
        np.zeros(shape, np.intp),
        np.zeros(shape, np.uint64),
        np.zeros(shape, np.uint64),
    )
    for at, column in enumerate(columns):
        # The last that is written counts: the entry's, else the first of the return's.
        for slot in reversed(_OF_RETURN[column]):
            _put(made, table, slot, np.s_[:, :, at], of_return=True)
        for slot in _OF_ENTRY.get(column, ()):
            _put(made, table, slot, np.s_[:, :, at], of_return=False)
    flat = n * n, len(columns)
    return Words(
        columns,
        made.of_return.reshape(flat),
        made.offset.reshape(flat),
        made.mask.reshape(flat),
        made.sign.reshape(flat),
    )


def _put(made: Words, table: Table, slot: str, where: Any, *, of_return: bool) -> None:  # noqa: ANN401
    """Say where a slot is, for the layouts that have it."""
    if slot not in table.names:
        return
    row = table.names.index(slot)
    bits = table.bits[row]
    has = bits > 0
    ones = np.where(has, ~np.uint64(0) >> (np.uint64(64) - np.where(has, bits, 1)), np.uint64(0))
    top = np.where(table.is_signed[row], ones ^ (ones >> np.uint64(1)), np.uint64(0))
    every = np.s_[:] if of_return else np.s_[:, None]
    for array, values in (
        (made.of_return, np.full(len(bits), of_return)),
        (made.offset, table.offset[row]),
        (made.mask, ones),
        (made.sign, top),
    ):
        into = array[where]
        np.copyto(into, values[every], where=np.broadcast_to(has[every], into.shape))
