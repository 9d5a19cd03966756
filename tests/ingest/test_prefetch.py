"""A thread that prefetches batches does not change them."""

import threading
from collections.abc import Iterator

import pytest

from tdxtrace.ingest.read import prefetch


def test_batches_come_in_order() -> None:
    assert list(prefetch(iter(range(100)))) == list(range(100))


def test_errors_come_after_what_was_given_before() -> None:
    def failing() -> Iterator[int]:
        yield 1
        raise ValueError("broken")

    batches = prefetch(failing())
    assert next(batches) == 1
    with pytest.raises(ValueError, match="broken"):
        next(batches)


def test_the_thread_ends_with_its_consumer() -> None:
    before = threading.active_count()
    batches = prefetch(iter(range(1000)))
    assert next(batches) == 0
    assert isinstance(batches, Iterator)
    batches.close()
    assert threading.active_count() == before
