"""The Secure EPT of one TD: entries by page and level, their states and locks.

Levels count as the module does: 0 is 4K, 1 is 2M, 2 is 1G, 3 is 512G.  An entry that
points to a table of the next level is NL_MAPPED; one that maps a page is a leaf.

Sources: intel/tdx-module ``src/common/memory_handlers/sept_manager.{c,h}``.
"""

from __future__ import annotations

from typing import Final

from tdxtrace.simulate.locks import EntryLock
from tdxtrace.simulate.words import (
    BLOCKED,
    FREE,
    MAPPED,
    NL_BLOCKED,
    NL_MAPPED,
    PENDING,
    PENDING_BLOCKED,
)

ROOT_LEVEL: Final = 3
_BITS_4K: Final = 12
_BITS_PER_LEVEL: Final = 9

BLOCKS: Final = {MAPPED: BLOCKED, PENDING: PENDING_BLOCKED, NL_MAPPED: NL_BLOCKED}
UNBLOCKS: Final = {blocked: open_ for open_, blocked in BLOCKS.items()}


class Entry(EntryLock):
    """One entry: its lock, its state, the page it maps, the epoch it was blocked in."""

    __slots__ = ("blocked_in", "gpa", "level", "page", "state")

    def __init__(self, gpa: int, level: int) -> None:
        super().__init__()
        self.gpa = gpa
        self.level = level
        self.state = FREE
        self.page = 0
        self.blocked_in = 0

    def word(self) -> int:
        """The architectural entry as a failed leaf returns it in RCX: the page, no more."""
        return self.page


_BYTES: Final = tuple(1 << (_BITS_4K + _BITS_PER_LEVEL * level) for level in range(5))


def page_bytes(level: int) -> int:
    """Size of a page of ``level``, in bytes."""
    return _BYTES[level]


class Sept:
    """The entries of a TD; those never touched are free and not stored."""

    __slots__ = ("entries",)

    def __init__(self) -> None:
        self.entries: dict[int, Entry] = {}

    def entry(self, gpa: int, level: int) -> Entry:
        """The entry of ``level`` that ``gpa`` falls in, whether its table exists or not."""
        base = gpa & -page_bytes(level)
        found = self.entries.get(base | level)
        if found is None:
            found = self.entries[base | level] = Entry(base, level)
        return found

    def walk(self, gpa: int, level: int) -> Entry:
        """Walk down to ``level``; returns the entry where the walk ends, maybe above it.

        Walks upwards from the wanted entry, which comes to the same: its parents'
        tables are there all or none, since KVM and the module add them top down.
        """
        entries = self.entries
        ended = level
        for above in range(level + 1, ROOT_LEVEL + 1):
            parent = entries.get((gpa & -_BYTES[above]) | above)
            if parent is not None and parent.state == NL_MAPPED:
                break
            ended = above
        return self.entry(gpa, ended)

    def mapping(self, gpa: int) -> Entry:
        """The entry where a guest's access to ``gpa`` ends: a leaf of any size, or a hole."""
        return self.walk(gpa, 0)

    def install_table(self, entry: Entry, page: int) -> None:
        """Let ``entry`` point to a table of the level below, all of whose entries are free."""
        entry.state, entry.page = NL_MAPPED, page

    def children(self, entry: Entry) -> list[Entry]:
        """The entries of the table below ``entry``, those never touched included."""
        step = page_bytes(entry.level - 1)
        return [self.entry(entry.gpa + i * step, entry.level - 1) for i in range(512)]
