"""The module's locks: an attempt fails immediately if the lock is held; calls never wait.

``SharexLock`` and ``EntryLock`` are single locks; ``LockGroup`` and ``PamtPageLock`` acquire
several.

Sources: intel/tdx-module 1.5.01 to 1.5.25, ``src/common/helpers/tdx_locks.h``
(``acquire_sharex_lock*``, ``release_sharex_lock*``, ``sept_lock_acquire_host``,
``sept_lock_acquire_guest``, ``sept_lock_release``);
``src/common/memory_handlers/pamt_manager.c``: a walk to a 4 KB entry holds its 2 MB parent
shared (``pamt_walk``), operations on a 2 MB page lock the 2 MB entry itself (``pamt_promote``,
``pamt_demote``); ``tdh_mem_page_promote.c`` of 1.5.01 to 1.5.16 locks the 512 entries below
the entry that it promotes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

from tdxtrace.simulate.module.abi import page_bytes

# Result of an attempt to acquire a lock.
ACQUIRED: Final = 0
BUSY: Final = 1
BUSY_HOST_PRIORITY: Final = 2
"""Returned to a guest only: the lock is free, but reserved for a host that failed before."""


class Holder(Protocol):
    """A holder of a lock: a SEAMCALL of the host or a TDCALL of a guest."""

    guest: bool
    """Whether it is a TDCALL of a guest."""


class SharexLock:
    """A lock with many sharers or one exclusive holder; no queue, no fairness, no priority."""

    __slots__ = ("exclusive", "sharers")

    def __init__(self) -> None:
        self.exclusive: Holder | None = None
        # A dict keeps the order of acquisition; the order of a set is not reproducible.
        self.sharers: dict[Holder, int] = {}
        """Hold count of each sharer: a call on two pages shares their common parent twice."""

    def acquire(self, holder: Holder, exclusive: bool) -> int:
        """Try to acquire the lock; returns ACQUIRED or BUSY."""
        if self.exclusive is not None or (exclusive and self.sharers):
            return BUSY
        if exclusive:
            self.exclusive = holder
        else:
            self.sharers[holder] = self.sharers.get(holder, 0) + 1
        return ACQUIRED

    def release(self, holder: Holder) -> None:
        """Release the lock, shared or exclusive."""
        if self.exclusive is holder:
            self.exclusive = None
        elif self.sharers[holder] > 1:
            self.sharers[holder] -= 1
        else:
            del self.sharers[holder]

    def holders(self) -> tuple[Holder, ...]:
        """Current holders, the longest-standing first."""
        return (self.exclusive,) if self.exclusive is not None else tuple(self.sharers)


class SharexHpLock(SharexLock):
    """A sharex lock with host priority: after a failed attempt of the host, guests are refused.

    Only a failed attempt of the host sets ``host_priority``, only a successful attempt of the
    host clears it; a release keeps it.  It excludes guests, but not other calls of the host.
    """

    __slots__ = ("host_priority",)

    def __init__(self) -> None:
        super().__init__()
        self.host_priority = False

    def acquire(self, holder: Holder, exclusive: bool) -> int:
        """Try to acquire the lock; returns ACQUIRED, BUSY, or for a guest BUSY_HOST_PRIORITY."""
        if holder.guest:
            return self._acquire_as_guest(holder, exclusive)
        if self.exclusive is not None or (exclusive and self.sharers):
            self.host_priority = True
            return BUSY
        self.host_priority = False
        if exclusive:
            self.exclusive = holder
        else:
            self.sharers[holder] = self.sharers.get(holder, 0) + 1
        return ACQUIRED

    def promote(self, holder: Holder) -> int:
        """Try to upgrade a host's shared lock to exclusive; on BUSY it stays shared."""
        if len(self.sharers) > 1:
            self.host_priority = True
            return BUSY
        del self.sharers[holder]
        self.exclusive = holder
        self.host_priority = False
        return ACQUIRED

    def _acquire_as_guest(self, holder: Holder, exclusive: bool) -> int:
        # An exclusive attempt of a guest tests the holders before the priority bit, a shared
        # attempt tests the bit first: truth table of acquire_sharex_lock_hp_sh/ex.
        if exclusive and (self.exclusive is not None or self.sharers):
            return BUSY
        if self.host_priority:
            return BUSY_HOST_PRIORITY
        return super().acquire(holder, exclusive)


class EntryLock:
    """The lock bit (TDEL) and host-priority bit (TDHP) of one Secure EPT entry."""

    __slots__ = ("host_priority", "owner", "priority_of")

    def __init__(self) -> None:
        self.owner: Holder | None = None
        self.host_priority = False
        self.priority_of: Holder | None = None
        """The failed attempt of the host that set the bit last."""

    def acquire(self, holder: Holder, exclusive: bool = True) -> int:
        """Try to lock the entry; returns ACQUIRED, BUSY, or for a guest BUSY_HOST_PRIORITY."""
        assert exclusive, "an entry lock is never shared"
        if self.owner is not None:
            if not holder.guest:
                self.host_priority, self.priority_of = True, holder
            return BUSY
        if holder.guest and self.host_priority:
            return BUSY_HOST_PRIORITY
        self.owner = holder
        if not holder.guest:
            self.host_priority = False
        return ACQUIRED

    def release(self, holder: Holder) -> None:
        """Unlock the entry; the priority bit does not change."""
        assert self.owner is holder
        self.owner = None

    def holders(self) -> tuple[Holder, ...]:
        """The current holder, if any."""
        return () if self.owner is None else (self.owner,)


Lock = SharexLock | EntryLock


class LockGroup:
    """Locks that are acquired in order, all or none."""

    __slots__ = ("_acquired", "_busy", "_locks")

    def __init__(self, locks: Sequence[Lock]) -> None:
        self._locks = locks
        self._acquired: list[Lock] = []
        self._busy: Lock | None = None

    def acquire(self, holder: Holder, exclusive: bool) -> int:
        """Try to acquire every lock in order; returns the result of the first that fails."""
        for lock in self._locks:
            result = lock.acquire(holder, exclusive)
            if result != ACQUIRED:
                self._busy = lock
                self.release(holder)
                return result
            self._acquired.append(lock)
        return ACQUIRED

    def release(self, holder: Holder) -> None:
        """Release all locks of the group."""
        while self._acquired:
            self._acquired.pop().release(holder)

    def holders(self) -> tuple[Holder, ...]:
        """Holders of the lock whose acquisition failed."""
        return () if self._busy is None else self._busy.holders()


class PamtPageLock:
    """The lock of the PAMT entry of one page, together with its 2 MB parent, shared."""

    __slots__ = ("_busy", "_own", "_pamt", "_parent")

    def __init__(self, pamt: Pamt, page: int, level: int) -> None:
        self._pamt = pamt
        self._own = page & -page_bytes(level) | level
        self._parent = page & -page_bytes(1) | 1 if level == 0 else None
        self._busy: SharexLock | None = None

    def acquire(self, holder: Holder, exclusive: bool) -> int:
        """Try to acquire the parent, then the entry; if one fails, neither is held."""
        entry = self._pamt.entry
        if self._parent is not None:
            parent = entry(self._parent)
            result = parent.acquire(holder, False)
            if result != ACQUIRED:
                self._busy = parent
                return result
        own = entry(self._own)
        result = own.acquire(holder, exclusive)
        if result != ACQUIRED:
            self._busy = own
            if self._parent is not None:
                self._pamt.release(self._parent, holder)
        return result

    def release(self, holder: Holder) -> None:
        """Release the entry and its parent."""
        self._pamt.release(self._own, holder)
        if self._parent is not None:
            self._pamt.release(self._parent, holder)

    def holders(self) -> tuple[Holder, ...]:
        """Holders of the PAMT entry whose acquisition failed."""
        return () if self._busy is None else self._busy.holders()


class Pamt:
    """The PAMT entries that are locked or reserved for the host; others are not stored."""

    __slots__ = ("_entries", "_host_priority")

    def __init__(self, host_priority: bool) -> None:
        self._host_priority = host_priority
        self._entries: dict[int, SharexLock] = {}

    def page(self, page: int, level: int) -> PamtPageLock:
        """Return the lock of a page of ``level`` (0 is 4 KB, 1 is 2 MB), including its parent."""
        return PamtPageLock(self, page, level)

    def entry(self, key: int) -> SharexLock:
        """Return the lock of a PAMT entry; ``key`` is the page's address and level combined."""
        lock = self._entries.get(key)
        if lock is None:
            lock = self._entries[key] = SharexHpLock() if self._host_priority else SharexLock()
        return lock

    def release(self, key: int, holder: Holder) -> None:
        """Release an entry, and forget it if it is neither held nor reserved for the host."""
        lock = self._entries[key]
        lock.release(holder)
        idle = lock.exclusive is None and not lock.sharers
        if idle and not getattr(lock, "host_priority", False):
            del self._entries[key]
