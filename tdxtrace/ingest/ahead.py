"""Reading ahead of decoding, in a second thread."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from queue import Queue
from threading import Event, Thread
from typing import Final, TypeVar

T = TypeVar("T")

# Batches queued: enough to even out slow ones, few enough to bound memory.
_DEPTH: Final = 4
# A batch, or the end: an error, or None.
_Given = tuple[bool, T | BaseException | None]


def ahead(batches: Iterator[T]) -> Generator[T]:
    """Yield what ``batches`` yields, iterated by a second thread up to _DEPTH items ahead.

    An exception of ``batches`` is raised here, after the items before it. Closing this waits for
    the item in progress.
    """
    waiting: Queue[_Given[T]] = Queue(_DEPTH)
    is_over = Event()
    thread = Thread(target=_work, args=(batches, waiting, is_over), daemon=True)
    thread.start()
    try:
        while True:
            is_batch, given = waiting.get()
            if isinstance(given, BaseException):
                raise given
            if not is_batch:
                return
            yield given  # type: ignore[misc]
    finally:
        is_over.set()
        while thread.is_alive():
            # The thread may be blocked in put.
            while not waiting.empty():
                waiting.get()
            thread.join(0.01)


def _work(batches: Iterator[T], waiting: Queue[_Given[T]], is_over: Event) -> None:
    try:
        for batch in batches:
            if is_over.is_set():
                return
            waiting.put((True, batch))
        waiting.put((False, None))
    except BaseException as error:
        waiting.put((False, error))
