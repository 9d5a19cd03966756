"""Locks made of several: a physical page with its PAMT parent, the entries below an entry.

Sources: intel/tdx-module ``src/common/memory_handlers/pamt_manager.c``: a walk to a 4 KB
entry holds its 2 MB parent shared (``pamt_walk``), work on a 2 MB page takes the 2 MB
entry itself (``pamt_promote``, ``pamt_demote``); ``tdh_mem_page_promote.c`` of 1.5.01 to
1.5.16 locks the 512 entries below the one it promotes.
"""

from __future__ import annotations

from collections.abc import Sequence

from tdxtrace.simulate.locks import TAKEN, Holder, Lock, Sharex, SharexHp
from tdxtrace.simulate.sept import page_bytes


class Bundle:
    """Locks that are taken one after the other, all or none."""

    __slots__ = ("_refused", "_taken", "_wanted")

    def __init__(self, wanted: Sequence[tuple[Lock, bool | None]]) -> None:
        # None stands for the mode the caller asks for.
        self._wanted = wanted
        self._taken: list[Lock] = []
        self._refused: Lock | None = None

    def take(self, who: Holder, exclusive: bool) -> int:
        """Try for every lock in order; the first that fails decides."""
        for lock, mode in self._wanted:
            result = lock.take(who, exclusive if mode is None else mode)
            if result != TAKEN:
                self._refused = lock
                self.drop(who)
                return result
            self._taken.append(lock)
        return TAKEN

    def drop(self, who: Holder) -> None:
        """Give all of them back."""
        while self._taken:
            self._taken.pop().drop(who)

    def holders(self) -> tuple[Holder, ...]:
        """Who holds the one that refused."""
        return () if self._refused is None else self._refused.holders()


class PageLock:
    """The PAMT entry of one page, its 2 MB parent shared; forgotten when nobody needs it."""

    __slots__ = ("_own", "_pamt", "_parent", "_refused")

    def __init__(self, pamt: Pamt, page: int, level: int) -> None:
        self._pamt = pamt
        self._own = page & -page_bytes(level) | level
        self._parent = page & -page_bytes(1) | 1 if level == 0 else None
        self._refused: Sharex | None = None

    def take(self, who: Holder, exclusive: bool) -> int:
        """Try for the parent, then for the entry; none is kept if one fails."""
        entry = self._pamt.entry
        if self._parent is not None:
            parent = entry(self._parent)
            result = parent.take(who, False)
            if result != TAKEN:
                self._refused = parent
                return result
        own = entry(self._own)
        result = own.take(who, exclusive)
        if result != TAKEN:
            self._refused = own
            if self._parent is not None:
                self._pamt.drop(self._parent, who)
        return result

    def drop(self, who: Holder) -> None:
        """Give it back."""
        self._pamt.drop(self._own, who)
        if self._parent is not None:
            self._pamt.drop(self._parent, who)

    def holders(self) -> tuple[Holder, ...]:
        """Who holds the entry that refused."""
        return () if self._refused is None else self._refused.holders()


class Pamt:
    """The PAMT entries that somebody holds, or that are kept for a host."""

    __slots__ = ("_entries", "_host_priority")

    def __init__(self, host_priority: bool) -> None:
        self._host_priority = host_priority
        self._entries: dict[int, Sharex] = {}

    def page(self, page: int, level: int) -> PageLock:
        """The lock of a page of ``level`` (0 is 4 KB, 1 is 2 MB), its parent with it."""
        return PageLock(self, page, level)

    def entry(self, key: int) -> Sharex:
        """The PAMT entry of a page, which is named by its address and level together."""
        lock = self._entries.get(key)
        if lock is None:
            lock = self._entries[key] = SharexHp() if self._host_priority else Sharex()
        return lock

    def drop(self, key: int, who: Holder) -> None:
        """Give an entry back; one that nobody holds or is kept for is not stored."""
        lock = self._entries[key]
        lock.drop(who)
        idle = lock.exclusive is None and not lock.sharers
        if idle and not getattr(lock, "host_priority", False):
            del self._entries[key]
