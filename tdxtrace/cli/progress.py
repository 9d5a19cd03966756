"""Progress display on stderr, if it is a terminal, after the first second."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from tdxtrace.tables.text import one_line

if TYPE_CHECKING:
    from rich.progress import Progress

# Shorter tasks are not shown.
_SHOWN_AFTER_S: Final = 1.0

ReadProgress = Callable[[str, int, int | None], None]
"""Called with a path, the bytes read so far and the size of the input; None: unknown."""


@contextmanager
def reading(quiet: bool) -> Iterator[ReadProgress | None]:
    """Yield a callback that draws a bar with the rate and the remaining time; None: no bar."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    tasks: dict[str, int] = {}
    started = time.monotonic()

    def report(path: str, done: int, size: int | None) -> None:
        if time.monotonic() - started < _SHOWN_AFTER_S:
            return
        if not bar.live.is_started:
            bar.start()
        if path not in tasks:
            tasks[path] = bar.add_task(one_line(path, 30), total=size)
        bar.update(tasks[path], completed=done)  # type: ignore[arg-type]

    try:
        yield report
    finally:
        bar.stop()


State = Callable[[], str]
"""Returns the text of the current step."""


class _Display:
    """A line on stderr that shows the latest running task of any thread, and its elapsed time.

    The remaining time of a task is unknown and not shown.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[object, State] = {}
        self._bar: Progress | None = None
        self._later: threading.Timer | None = None

    @contextmanager
    def task(self, state: State) -> Iterator[None]:
        """Show ``state()`` while a task runs; the line is removed after the last task."""
        key = object()
        with self._lock:
            self._running[key] = state
            if self._later is None:
                self._bar = self._made()
                # A timer starts the display, as the task itself does not return before its end.
                self._later = threading.Timer(_SHOWN_AFTER_S, self._bar.start)
                self._later.daemon = True
                self._later.start()
        try:
            yield
        finally:
            with self._lock:
                del self._running[key]
                if not self._running:
                    self._end()

    def _end(self) -> None:
        assert self._later is not None
        assert self._bar is not None
        self._later.cancel()
        self._later.join()
        self._bar.stop()
        self._later = self._bar = None

    def _text(self) -> str:
        running = tuple(self._running.values())
        return one_line(running[-1](), 200) if running else ""

    def _made(self) -> Progress:
        from rich.console import Console
        from rich.progress import Progress, ProgressColumn, SpinnerColumn, Task, TimeElapsedColumn
        from rich.text import Text

        shown = self._text

        class Running(ProgressColumn):
            """Column with the text of the task that began last."""

            def render(self, task: Task) -> Text:
                return Text(shown() or task.description)

        columns = (SpinnerColumn(), Running(), TimeElapsedColumn())
        bar = Progress(*columns, console=Console(stderr=True), transient=True)
        bar.add_task("", total=None)
        return bar


_DISPLAY: Final = _Display()


@contextmanager
def working(quiet: bool, state: State) -> Iterator[None]:
    """Show the current step and its elapsed time on a terminal while the block runs.

    Args:
        quiet: Whether to show nothing.
        state: Returns the current step; called several times a second.
    """
    if quiet or not sys.stderr.isatty():
        yield
        return
    with _DISPLAY.task(state):
        yield


class Steps:
    """Shows the steps of an analysis while they run.

    Args:
        quiet: Whether to show nothing.
        verbose: Whether to print the duration of each step.
    """

    def __init__(self, quiet: bool, verbose: bool = False) -> None:
        self._quiet = quiet
        self._verbose = verbose

    @contextmanager
    def step(self, name: str, n_events: int) -> Iterator[None]:
        """Show a step while it runs.

        Args:
            name: Name of the result, such as retry_chains.
            n_events: Number of events that it processes.
        """
        text = f"{name.replace('_', ' ')} of {n_events:,} events"
        began = time.monotonic()
        with working(self._quiet, lambda: text):
            yield
        if self._verbose:
            print(f"tdxtrace: {text}: {time.monotonic() - began:.2f} s", file=sys.stderr)
