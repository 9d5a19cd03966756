"""The module's locks: none is ever waited for; a failed attempt is answered at once.

Sources: intel/tdx-module ``src/common/helpers/tdx_locks.h`` (``acquire_sharex_lock*``,
``release_sharex_lock*``, ``sept_lock_acquire_host``, ``sept_lock_acquire_guest``,
``sept_lock_release``), 1.5.01 to 1.5.25.
"""

from __future__ import annotations

from typing import Final, Protocol

# What an attempt at a lock came to.
TAKEN: Final = 0
BUSY: Final = 1
BUSY_FOR_HOST: Final = 2
"""Only a guest meets this: the lock is free, but kept for a host that failed before."""


class Holder(Protocol):
    """Who may hold a lock: a call of the host or of a guest."""

    guest: bool
    """Whether it is a TDCALL of a guest."""


class Sharex:
    """Many sharers or one exclusive holder; no queue, no fairness, no host priority."""

    __slots__ = ("exclusive", "sharers")

    def __init__(self) -> None:
        self.exclusive: Holder | None = None
        # A dict keeps the order of arrival; a set of objects would not be reproducible.
        self.sharers: dict[Holder, None] = {}

    def take(self, who: Holder, exclusive: bool) -> int:
        """Try to get the lock; TAKEN or BUSY."""
        if self.exclusive is not None or (exclusive and self.sharers):
            return BUSY
        if exclusive:
            self.exclusive = who
        else:
            self.sharers[who] = None
        return TAKEN

    def drop(self, who: Holder) -> None:
        """Give the lock back, however it was held."""
        if self.exclusive is who:
            self.exclusive = None
        else:
            del self.sharers[who]

    def holders(self) -> tuple[Holder, ...]:
        """Who holds it now, the longest-standing first."""
        return (self.exclusive,) if self.exclusive is not None else tuple(self.sharers)


class SharexHp(Sharex):
    """A sharex lock that a failed host keeps guests from taking until a host gets it.

    Only a failed attempt of the host sets ``host_priority``, only a successful one of
    the host clears it; releasing keeps it.  It shuts out guests, never another host.
    """

    __slots__ = ("host_priority",)

    def __init__(self) -> None:
        super().__init__()
        self.host_priority = False

    def take(self, who: Holder, exclusive: bool) -> int:
        """Try to get the lock; TAKEN, BUSY, or for a guest BUSY_FOR_HOST."""
        if who.guest:
            return self._take_as_guest(who, exclusive)
        if self.exclusive is not None or (exclusive and self.sharers):
            self.host_priority = True
            return BUSY
        self.host_priority = False
        if exclusive:
            self.exclusive = who
        else:
            self.sharers[who] = None
        return TAKEN

    def promote(self, who: Holder) -> int:
        """Try to make a host's shared hold exclusive; on BUSY it stays shared."""
        if len(self.sharers) > 1:
            self.host_priority = True
            return BUSY
        del self.sharers[who]
        self.exclusive = who
        self.host_priority = False
        return TAKEN

    def _take_as_guest(self, who: Holder, exclusive: bool) -> int:
        # The word's reader and exclusive bits come before the priority bit for a
        # guest that wants it alone, after it for one that would share: truth table
        # of acquire_sharex_lock_hp_sh/ex.
        if exclusive and (self.exclusive is not None or self.sharers):
            return BUSY
        if self.host_priority:
            return BUSY_FOR_HOST
        return super().take(who, exclusive)


class EntryLock:
    """The lock bit (TDEL) and host-priority bit (TDHP) of one Secure EPT entry."""

    __slots__ = ("host_priority", "owner")

    def __init__(self) -> None:
        self.owner: Holder | None = None
        self.host_priority = False

    def take(self, who: Holder, exclusive: bool = True) -> int:
        """Try to get the entry; TAKEN, BUSY, or for a guest BUSY_FOR_HOST."""
        assert exclusive, "an entry lock is never shared"
        if self.owner is not None:
            self.host_priority = self.host_priority or not who.guest
            return BUSY
        if who.guest and self.host_priority:
            return BUSY_FOR_HOST
        self.owner = who
        if not who.guest:
            self.host_priority = False
        return TAKEN

    def drop(self, who: Holder) -> None:
        """Give the entry back; the priority bit stays."""
        assert self.owner is who
        self.owner = None

    def holders(self) -> tuple[Holder, ...]:
        """Who holds it now, if anybody."""
        return () if self.owner is None else (self.owner,)


Lock = Sharex | EntryLock
