"""Reading, decoding and keeping at the same time: each in a thread of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from queue import Queue
from threading import Event, Thread
from types import TracebackType
from typing import Final, Self, TypeVar

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


class Behind:
    """Does what it is given in a thread of its own, one thing after the other.

    The first error ends that; it is raised where the next thing is given, or in the end.
    """

    def __init__(self) -> None:
        self._waiting: Queue[Callable[[], None] | None] = Queue(_DEPTH)
        self._error: BaseException | None = None
        self._thread = Thread(target=self._work, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._waiting.put(None)
        self._thread.join()
        if error is None:
            self._raise()

    def do(self, work: Callable[[], None]) -> None:
        """Have something done; wait if there is much to do already."""
        self._raise()
        self._waiting.put(work)

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (work := self._waiting.get()) is not None:
            if self._error is None:
                try:
                    work()
                except BaseException as error:
                    self._error = error
