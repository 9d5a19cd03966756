"""The Secure EPT of one TD: entries by page and level, their states and locks.

An entry that points to a table of the next level is NL_MAPPED; one that maps a page is a
leaf.

Sources: intel/tdx-module ``src/common/memory_handlers/sept_manager.{c,h}``.
"""

from __future__ import annotations

from typing import Final

from tdxtrace.simulate.module.abi import (
    BLOCKED,
    FREE,
    MAPPED,
    NL_BLOCKED,
    NL_MAPPED,
    PAGE_BYTES,
    PENDING,
    PENDING_BLOCKED,
    ROOT_LEVEL,
    page_bytes,
)
from tdxtrace.simulate.module.locks import EntryLock

BLOCKED_STATE: Final = {MAPPED: BLOCKED, PENDING: PENDING_BLOCKED, NL_MAPPED: NL_BLOCKED}
UNBLOCKED_STATE: Final = {blocked: state for state, blocked in BLOCKED_STATE.items()}


class SeptEntry(EntryLock):
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
        """The entry as a failed leaf returns it in RCX: only the page."""
        return self.page


class Sept:
    """The entries of a TD; a free one that was never accessed is not stored."""

    __slots__ = ("entries",)

    def __init__(self) -> None:
        self.entries: dict[int, SeptEntry] = {}

    def entry(self, gpa: int, level: int) -> SeptEntry:
        """The entry of ``level`` that covers ``gpa``, whether its table exists or not."""
        base = gpa & -page_bytes(level)
        found = self.entries.get(base | level)
        if found is None:
            found = self.entries[base | level] = SeptEntry(base, level)
        return found

    def walk(self, gpa: int, level: int) -> SeptEntry:
        """Walk down to ``level``; returns the entry where the walk ends, possibly above it.

        The loop goes upwards from the wanted entry, with the same result: the tables of
        its parents exist all or none, since KVM and the module add them top down.
        """
        entries = self.entries
        ended = level
        for above in range(level + 1, ROOT_LEVEL + 1):
            parent = entries.get((gpa & -PAGE_BYTES[above]) | above)
            if parent is not None and parent.state == NL_MAPPED:
                break
            ended = above
        return self.entry(gpa, ended)

    def mapping(self, gpa: int) -> SeptEntry:
        """The entry where a guest's access to ``gpa`` ends: a leaf of any size, or a free one."""
        return self.walk(gpa, 0)

    def children(self, entry: SeptEntry) -> list[SeptEntry]:
        """The 512 entries of the table below ``entry``."""
        step = page_bytes(entry.level - 1)
        return [self.entry(entry.gpa + i * step, entry.level - 1) for i in range(512)]
