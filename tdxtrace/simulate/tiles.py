"""A trace of any size from one run: the same events again and again, each time later.

What makes a chain (threads, pages, statuses, gaps) is the same in every tile; only the
seconds of the stamps differ, so a tile is the bytes of the first with digits replaced.
Requests that a tile leaves unsettled are left out of it, so that no chain goes on in the
next one; and nobody is inside a guest at its end.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from tdxtrace.errors import QueryError
from tdxtrace.simulate.engine import Run
from tdxtrace.simulate.output import Form, lines_of
from tdxtrace.simulate.recording import Lost, Recording

_SECOND_NS = 1_000_000_000
# Every tool prints the seconds in five columns; a longer number would move the rest.
_COLUMNS = 5


def closed(run: Run) -> Run:
    """Return the run without what it leaves open: such requests, and entries not left."""
    last = {request.thread.tid: request for request in run.journal.requests}
    open_ = {
        id(call)
        for request in run.journal.requests
        if request.outcome == "cut"
        or (request.outcome == "abandoned" and last[request.thread.tid] is request)
        for call in request.calls
    }
    journal = copy.copy(run.journal)
    journal.calls = [call for call in run.journal.calls if id(call) not in open_]
    return dataclasses.replace(run, journal=journal, inside=())


def tiles(recording: Recording, form: Form, duration_ns: int, repeat: int) -> Iterator[bytes]:
    """Yield a text trace ``repeat`` times over, whole seconds apart.

    Args:
        recording: Of a run that is ``closed``.
        form: A text format with a clock of seconds.
        duration_ns: Length of the run.
        repeat: How often.

    Raises:
        QueryError: If the format has no seconds to move.
    """
    if form.name not in ("tracefs", "trace-pipe", "trace-cmd", "perf"):
        raise QueryError(f"--repeat does not go with format {form.name}; its stamps do not tile")
    if any(o in ("latency", "verbose") or o.startswith("clock=") for o in form.options):
        raise QueryError("--repeat needs stamps of seconds; leave latency, verbose and clock out")
    period = 1 + (duration_ns + _SECOND_NS - 1) // _SECOND_NS
    recording.n_written *= repeat
    lines = lines_of(recording, form)
    head = [text for text, item in lines if item is None]
    yield "".join(line + "\n" for line in head).encode()
    template, places, seconds = _template([line for line in lines if line[1] is not None])
    if int(seconds.max(initial=0)) + period * repeat >= 10**_COLUMNS:
        raise QueryError(f"--repeat {repeat} needs stamps of more than {_COLUMNS} digits")
    for tile in range(repeat):
        _stamp(template, places, seconds + tile * period)
        yield template.tobytes()


Ints = NDArray[np.int64]


def _template(lines: list[tuple[str, object]]) -> tuple[NDArray[np.uint8], Ints, Ints]:
    """The bytes of the lines, where each one's seconds end, and what they are."""
    encoded, places, seconds, at = [], [], [], 0
    for text, item in lines:
        data = (text + "\n").encode()
        if not isinstance(item, Lost) or "PERF_RECORD_LOST" in text:
            end = data.index(b".", data.index(b"]"))
            while not data[end + 1 : end + 7].isdigit():
                end = data.index(b".", end + 1)
            places.append(at + end)
            seconds.append(int(data[end - _COLUMNS : end]))
        encoded.append(data)
        at += len(data)
    array = np.frombuffer(b"".join(encoded), np.uint8).copy()
    return array, np.array(places, np.int64), np.array(seconds, np.int64)


def _stamp(template: NDArray[np.uint8], places: Ints, seconds: Ints) -> None:
    """Write other seconds into the template, right-aligned in their columns."""
    left = seconds.copy()
    for column in range(1, _COLUMNS + 1):
        digit = (left % 10 + ord("0")).astype(np.uint8)
        blank = (left == 0) & (column > 1)
        template[places - column] = np.where(blank, np.uint8(ord(" ")), digit)
        left //= 10
