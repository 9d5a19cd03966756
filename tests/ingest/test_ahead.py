"""Batches made ahead by a thread come as they would without it."""

import threading
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import pytest

from tdxtrace.ingest.ahead import Behind, ahead


def test_batches_come_in_order() -> None:
    assert list(ahead(iter(range(100)))) == list(range(100))


def test_errors_come_after_what_was_given_before() -> None:
    def failing() -> Iterator[int]:
        yield 1
        raise ValueError("broken")

    batches = ahead(failing())
    assert next(batches) == 1
    with pytest.raises(ValueError, match="broken"):
        next(batches)


def test_the_thread_ends_with_whoever_asked() -> None:
    before = threading.active_count()
    batches = ahead(iter(range(1000)))
    assert next(batches) == 0
    assert isinstance(batches, Iterator)
    batches.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def test_things_are_done_behind_in_order() -> None:
    done: list[int] = []
    with Behind() as behind:
        for n in range(100):
            behind.do(partial(done.append, n))
    assert done == list(range(100))


def test_the_first_error_ends_what_is_done_behind() -> None:
    done: list[int] = []
    before = threading.active_count()

    def fail(n: int) -> None:
        done.append(n)
        raise ValueError(str(n))

    def give(things: Iterable[Callable[[], None]], at_last: type[Exception] | None = None) -> None:
        with Behind() as behind:
            for thing in things:
                behind.do(thing)
            if at_last is not None:
                raise at_last

    many = [partial(done.append, 0), *(partial(fail, n) for n in range(1, 1000))]
    with pytest.raises(ValueError, match="1"):
        give(many)
    assert done == [0, 1]
    with pytest.raises(KeyError):
        give([partial(fail, 2)], KeyError)
    assert threading.active_count() == before
