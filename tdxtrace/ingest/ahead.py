"""Reading and decoding at the same time: reading in a thread of its own."""

from __future__ import annotations

from collections.abc import Iterator
from queue import Queue
from threading import Event, Thread
from typing import Final, TypeVar

T = TypeVar("T")

# Batches that wait: enough to bridge a slow one, few enough to stay small.
_DEPTH: Final = 4
# A batch, or how it ended: with an error or, at the end of all, with none.
_Given = tuple[bool, T | BaseException | None]


def ahead(batches: Iterator[T]) -> Iterator[T]:
    """Yield what ``batches`` yields, made ahead by a thread; numpy lets both run.

    Whatever ``batches`` raises is raised here, after what it gave before.
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
            # The thread may wait to hand over a batch that nobody wants any more.
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
