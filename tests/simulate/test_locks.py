"""The locks against the truth tables of the module's source, row by row."""

from dataclasses import dataclass

import pytest

from tdxtrace.simulate.locks import BUSY, BUSY_FOR_HOST, TAKEN, EntryLock, Sharex, SharexHp


@dataclass(eq=False)
class Caller:
    guest: bool = False


HOST, GUEST = False, True
SHARED, EXCLUSIVE = False, True


def _in_state(state: str) -> SharexHp:
    lock = SharexHp()
    words = state.split()
    if "readers" in words:
        lock.take(Caller(), SHARED)
        lock.take(Caller(), SHARED)
    if "exclusive" in words:
        lock.take(Caller(), EXCLUSIVE)
    lock.host_priority = "hp" in words
    return lock


@pytest.mark.parametrize(
    ("guest", "exclusive", "before", "result", "hp_after"),
    [
        (HOST, SHARED, "", TAKEN, False),
        (HOST, SHARED, "readers", TAKEN, False),
        (HOST, SHARED, "hp", TAKEN, False),
        (HOST, SHARED, "readers hp", TAKEN, False),
        (HOST, SHARED, "exclusive", BUSY, True),
        (HOST, EXCLUSIVE, "", TAKEN, False),
        (HOST, EXCLUSIVE, "hp", TAKEN, False),
        (HOST, EXCLUSIVE, "readers", BUSY, True),
        (HOST, EXCLUSIVE, "exclusive", BUSY, True),
        (GUEST, SHARED, "", TAKEN, False),
        (GUEST, SHARED, "readers", TAKEN, False),
        (GUEST, SHARED, "hp", BUSY_FOR_HOST, True),
        (GUEST, SHARED, "readers hp", BUSY_FOR_HOST, True),
        (GUEST, SHARED, "exclusive", BUSY, False),
        (GUEST, EXCLUSIVE, "hp", BUSY_FOR_HOST, True),
        (GUEST, EXCLUSIVE, "readers", BUSY, False),
        (GUEST, EXCLUSIVE, "readers hp", BUSY, True),
        (GUEST, EXCLUSIVE, "exclusive", BUSY, False),
    ],
)
def test_sharex_with_host_priority(
    guest: bool, exclusive: bool, before: str, result: int, hp_after: bool
) -> None:
    lock = _in_state(before)
    assert lock.take(Caller(guest), exclusive) == result
    assert lock.host_priority == hp_after


@pytest.mark.parametrize(("n_readers", "result"), [(1, TAKEN), (2, BUSY)])
@pytest.mark.parametrize("hp", [False, True])
def test_promotion_needs_a_single_reader(n_readers: int, result: int, hp: bool) -> None:
    lock, readers = SharexHp(), [Caller() for _ in range(n_readers)]
    for reader in readers:
        lock.take(reader, SHARED)
    lock.host_priority = hp
    assert lock.promote(readers[0]) == result
    assert lock.host_priority == (result == BUSY)
    assert (lock.exclusive is readers[0]) == (result == TAKEN)
    assert len(lock.holders()) == n_readers


@pytest.mark.parametrize("exclusive", [SHARED, EXCLUSIVE])
def test_release_keeps_host_priority(exclusive: bool) -> None:
    lock, first, second = SharexHp(), Caller(), Caller()
    lock.take(first, EXCLUSIVE)
    assert lock.take(second, exclusive) == BUSY
    lock.drop(first)
    assert lock.host_priority
    assert lock.take(Caller(GUEST), SHARED) == BUSY_FOR_HOST
    assert lock.take(Caller(), SHARED) == TAKEN
    assert not lock.host_priority


def test_plain_sharex_lets_an_exclusive_seeker_starve() -> None:
    lock, readers = Sharex(), [Caller(), Caller()]
    seeker = Caller()
    lock.take(readers[0], SHARED)
    for turn in range(4):
        assert lock.take(seeker, EXCLUSIVE) == BUSY
        lock.take(readers[(turn + 1) % 2], SHARED)
        lock.drop(readers[turn % 2])
    lock.drop(lock.holders()[0])
    assert lock.take(seeker, EXCLUSIVE) == TAKEN


def test_entry_lock_keeps_a_guest_out_until_the_host_came() -> None:
    entry, guest, host = EntryLock(), Caller(GUEST), Caller()
    assert entry.take(guest) == TAKEN
    assert entry.take(host) == BUSY
    assert entry.host_priority
    entry.drop(guest)
    assert entry.take(guest) == BUSY_FOR_HOST
    assert entry.holders() == ()
    assert entry.take(host) == TAKEN
    assert not entry.host_priority


def test_a_guest_that_fails_asks_for_no_priority() -> None:
    entry, first = EntryLock(), Caller(GUEST)
    entry.take(first)
    assert entry.take(Caller(GUEST)) == BUSY
    assert not entry.host_priority


def test_another_host_may_take_what_was_kept_for_a_host() -> None:
    entry, holder = EntryLock(), Caller()
    entry.take(holder)
    assert entry.take(Caller()) == BUSY
    entry.drop(holder)
    assert entry.take(Caller()) == TAKEN
