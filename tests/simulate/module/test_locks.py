"""The locks against the truth tables of the module's source, row by row."""

from dataclasses import dataclass

import pytest

from tdxtrace.simulate.module.locks import (
    ACQUIRED,
    BUSY,
    BUSY_HOST_PRIORITY,
    EntryLock,
    SharexHpLock,
    SharexLock,
)


@dataclass(eq=False)
class Caller:
    guest: bool = False


HOST, GUEST = False, True
SHARED, EXCLUSIVE = False, True


def _in_state(state: str) -> SharexHpLock:
    lock = SharexHpLock()
    words = state.split()
    if "readers" in words:
        lock.acquire(Caller(), SHARED)
        lock.acquire(Caller(), SHARED)
    if "exclusive" in words:
        lock.acquire(Caller(), EXCLUSIVE)
    lock.host_priority = "hp" in words
    return lock


@pytest.mark.parametrize(
    ("guest", "exclusive", "before", "result", "hp_after"),
    [
        (HOST, SHARED, "", ACQUIRED, False),
        (HOST, SHARED, "readers", ACQUIRED, False),
        (HOST, SHARED, "hp", ACQUIRED, False),
        (HOST, SHARED, "readers hp", ACQUIRED, False),
        (HOST, SHARED, "exclusive", BUSY, True),
        (HOST, EXCLUSIVE, "", ACQUIRED, False),
        (HOST, EXCLUSIVE, "hp", ACQUIRED, False),
        (HOST, EXCLUSIVE, "readers", BUSY, True),
        (HOST, EXCLUSIVE, "exclusive", BUSY, True),
        (GUEST, SHARED, "", ACQUIRED, False),
        (GUEST, SHARED, "readers", ACQUIRED, False),
        (GUEST, SHARED, "hp", BUSY_HOST_PRIORITY, True),
        (GUEST, SHARED, "readers hp", BUSY_HOST_PRIORITY, True),
        (GUEST, SHARED, "exclusive", BUSY, False),
        (GUEST, EXCLUSIVE, "hp", BUSY_HOST_PRIORITY, True),
        (GUEST, EXCLUSIVE, "readers", BUSY, False),
        (GUEST, EXCLUSIVE, "readers hp", BUSY, True),
        (GUEST, EXCLUSIVE, "exclusive", BUSY, False),
    ],
)
def test_sharex_with_host_priority(
    guest: bool, exclusive: bool, before: str, result: int, hp_after: bool
) -> None:
    lock = _in_state(before)
    assert lock.acquire(Caller(guest), exclusive) == result
    assert lock.host_priority == hp_after


@pytest.mark.parametrize(("n_readers", "result"), [(1, ACQUIRED), (2, BUSY)])
@pytest.mark.parametrize("hp", [False, True])
def test_promotion_needs_a_single_reader(n_readers: int, result: int, hp: bool) -> None:
    lock, readers = SharexHpLock(), [Caller() for _ in range(n_readers)]
    for reader in readers:
        lock.acquire(reader, SHARED)
    lock.host_priority = hp
    assert lock.promote(readers[0]) == result
    assert lock.host_priority == (result == BUSY)
    assert (lock.exclusive is readers[0]) == (result == ACQUIRED)
    assert len(lock.holders()) == n_readers


@pytest.mark.parametrize("exclusive", [SHARED, EXCLUSIVE])
def test_release_keeps_host_priority(exclusive: bool) -> None:
    lock, first, second = SharexHpLock(), Caller(), Caller()
    lock.acquire(first, EXCLUSIVE)
    assert lock.acquire(second, exclusive) == BUSY
    lock.release(first)
    assert lock.host_priority
    assert lock.acquire(Caller(GUEST), SHARED) == BUSY_HOST_PRIORITY
    assert lock.acquire(Caller(), SHARED) == ACQUIRED
    assert not lock.host_priority


def test_plain_sharex_lets_an_exclusive_seeker_starve() -> None:
    lock, readers = SharexLock(), [Caller(), Caller()]
    seeker = Caller()
    lock.acquire(readers[0], SHARED)
    for turn in range(4):
        assert lock.acquire(seeker, EXCLUSIVE) == BUSY
        lock.acquire(readers[(turn + 1) % 2], SHARED)
        lock.release(readers[turn % 2])
    lock.release(lock.holders()[0])
    assert lock.acquire(seeker, EXCLUSIVE) == ACQUIRED


def test_entry_lock_refuses_a_guest_until_the_host_acquired_it() -> None:
    entry, guest, host = EntryLock(), Caller(GUEST), Caller()
    assert entry.acquire(guest) == ACQUIRED
    assert entry.acquire(host) == BUSY
    assert entry.host_priority
    entry.release(guest)
    assert entry.acquire(guest) == BUSY_HOST_PRIORITY
    assert entry.holders() == ()
    assert entry.acquire(host) == ACQUIRED
    assert not entry.host_priority


def test_a_failed_guest_sets_no_priority() -> None:
    entry, first = EntryLock(), Caller(GUEST)
    entry.acquire(first)
    assert entry.acquire(Caller(GUEST)) == BUSY
    assert not entry.host_priority


def test_another_host_may_acquire_a_lock_reserved_for_a_host() -> None:
    entry, holder = EntryLock(), Caller()
    entry.acquire(holder)
    assert entry.acquire(Caller()) == BUSY
    entry.release(holder)
    assert entry.acquire(Caller()) == ACQUIRED
