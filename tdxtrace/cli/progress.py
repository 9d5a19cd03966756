"""What a command is doing, on stderr of a terminal, once it has taken a second."""

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

# What is done faster than this is not shown.
_SHOWN_AFTER_S: Final = 1.0

ReadProgress = Callable[[str, int, int | None], None]
"""Called with a path, the bytes read so far and the size of the input; None: unknown."""


@contextmanager
def reading(quiet: bool) -> Iterator[ReadProgress | None]:
    """Yield a callback that draws a bar with the rate and the time left; None: none is shown."""
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


class Steps:
    """Shows the step that runs, with the time that it has taken, until the outermost one ends.

    How long a step takes is not known before: no time left is shown.

    Args:
        quiet: Whether to show nothing.
    """

    def __init__(self, quiet: bool) -> None:
        self._is_shown = not quiet and sys.stderr.isatty()
        self._names: list[str] = []

    @contextmanager
    def step(self, name: str, n_events: int) -> Iterator[None]:
        """Show a step while it runs.

        Args:
            name: What it finds.
            n_events: How many events it looks at.
        """
        if not self._is_shown:
            yield
            return
        self._names.append(f"{name.replace('_', ' ')} of {n_events:,} events")
        try:
            if len(self._names) > 1:
                yield
                return
            bar = self._bar()
            # The step itself is one call that returns when it is done.
            later = threading.Timer(_SHOWN_AFTER_S, bar.start)
            later.daemon = True
            later.start()
            try:
                yield
            finally:
                later.cancel()
                later.join()
                bar.stop()
        finally:
            self._names.pop()

    def _bar(self) -> Progress:
        from rich.console import Console
        from rich.progress import Progress, ProgressColumn, SpinnerColumn, Task, TimeElapsedColumn
        from rich.text import Text

        names = self._names

        class Running(ProgressColumn):
            """The innermost step that runs."""

            def render(self, task: Task) -> Text:
                return Text(names[-1] if names else task.description)

        columns = (SpinnerColumn(), Running(), TimeElapsedColumn())
        bar = Progress(*columns, console=Console(stderr=True), transient=True)
        bar.add_task("", total=None)
        return bar
