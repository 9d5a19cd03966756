"""Write a recording in one of the output formats, once or repeated."""

from __future__ import annotations

import copy
import dataclasses
import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from tdxtrace.errors import QueryError
from tdxtrace.simulate.engine import Run
from tdxtrace.simulate.record import dmesg, function_graph, libtraceevent, trace_dat, tracefs
from tdxtrace.simulate.record.recording import LostEvents, Recording, RenderedLines

TEXT_FORMATS: Final = ("tracefs", "trace-pipe", "trace-cmd", "perf", "graph")
FORMATS: Final = (*TEXT_FORMATS, "dmesg", "trace.dat", "trace.dat-v6")
# By format, then by option on the command line: the field that it sets, and the value (None: the
# value given by the user).
_OPTIONS: Final[dict[str, dict[str, tuple[str, bool | None]]]] = {
    "tracefs": {
        "tgid": ("tgid", True),
        "latency": ("latency", True),
        "verbose": ("verbose", True),
        "no-irq-info": ("irq_info", False),
        "clock": ("clock", None),
    },
    "trace-cmd": {
        "ns": ("nanoseconds", True),
        "raw": ("raw", True),
        "no-plugin": ("plugin", False),
        "flags": ("flags", True),
        "instance": ("instance", None),
    },
    "perf": {
        "ns": ("nanoseconds", True),
        "process": ("process", True),
        "hide-lost": ("lost_events", False),
    },
}
_OPTIONS["trace-pipe"] = _OPTIONS["tracefs"]


@dataclass(frozen=True, slots=True)
class RecordingFormat:
    """An output format and its options, validated."""

    name: str
    options: tuple[str, ...] = ()


def parse_format(name: str, options: Sequence[str] = ()) -> RecordingFormat:
    """Validate a format's name and its options, each ``WORD`` or ``WORD=VALUE``.

    Raises:
        QueryError: If the format is unknown, or does not have an option.
    """
    if name not in FORMATS:
        nearest = difflib.get_close_matches(name, FORMATS, n=1, cutoff=0)[0]
        raise QueryError(f"no format {name!r}; nearest: {nearest}; all: {', '.join(FORMATS)}")
    known = _OPTIONS.get(name, {})
    for option in options:
        key, equals, value = option.partition("=")
        if key not in known:
            all_ = ", ".join(known) or "none"
            raise QueryError(f"format {name} has no option {option!r}; it has: {all_}")
        if (known[key][1] is None) != bool(equals and value):
            raise QueryError(f"not an option of {name}: {option!r}")
        if key == "clock" and value not in tracefs.CLOCKS:
            raise QueryError(f"no clock {value!r}; there are: {', '.join(tracefs.CLOCKS)}")
    return RecordingFormat(name, tuple(options))


def render_lines(recording: Recording, form: RecordingFormat) -> RenderedLines:
    """Return the lines of a text format, each with the event or loss that it prints."""
    if form.name == "graph":
        return function_graph.render(recording)
    if form.name == "trace-cmd":
        options = _set_options(libtraceevent.TraceCmdOptions(), form)
        return libtraceevent.trace_cmd_report(recording, options)
    if form.name == "perf":
        return libtraceevent.perf_script(recording, _set_options(libtraceevent.PerfOptions(), form))
    assert form.name in ("tracefs", "trace-pipe")
    tracefs_options = tracefs.TracefsOptions(pipe=form.name == "trace-pipe")
    return tracefs.render(recording, _set_options(tracefs_options, form))


def render_bytes(run: Run, recording: Recording, form: RecordingFormat) -> bytes:
    """Return the content of the file, truncated by ``cut_share`` of the recording."""
    if form.name.startswith("trace.dat"):
        data = trace_dat.render(recording, 6 if form.name.endswith("v6") else 7)
    else:
        if form.name == "dmesg":
            lines = dmesg.render(run)
        else:
            lines = [text for text, _ in render_lines(recording, form)]
        data = "".join(line + "\n" for line in lines).encode()
    return data[: len(data) - int(len(data) * recording.cut_share)]


_O = TypeVar("_O")


def _set_options(options: _O, form: RecordingFormat) -> _O:
    changes: dict[str, Any] = {}
    for option in form.options:
        key, _, value = option.partition("=")
        field, fixed = _OPTIONS[form.name][key]
        changes[field] = value if fixed is None else fixed
    return dataclasses.replace(options, **changes)  # type: ignore[type-var]


_SECOND_NS = 1_000_000_000
# Every tool prints the seconds in five columns; more digits would shift the rest of the line.
_SECOND_DIGITS = 5


def without_open_requests(run: Run) -> Run:
    """Return the run without its open requests and unfinished entries.

    Without them no chain continues from one repetition to the next, and no vCPU runs the guest
    at the end of a repetition.
    """
    open_ = {
        id(call)
        for request in run.journal.requests
        if request.outcome in ("cut", "abandoned")
        for call in request.calls
    }
    journal = copy.copy(run.journal)
    journal.calls = [call for call in run.journal.calls if id(call) not in open_]
    return dataclasses.replace(run, journal=journal, unfinished_entries=())


def repeated(
    recording: Recording, form: RecordingFormat, duration_ns: int, repeat: int
) -> Iterator[bytes]:
    """Yield a text trace of any size: the same events ``repeat`` times, shifted by whole seconds.

    Threads, pages, statuses and gaps are the same in every repetition; only the digits of
    the seconds differ.

    Args:
        recording: Recording of a run ``without_open_requests``.
        form: A text format whose timestamps are seconds.
        duration_ns: Length of the run.
        repeat: Number of repetitions.

    Raises:
        QueryError: If the format's timestamps are not seconds, or their digits do not fit.
    """
    if form.name not in ("tracefs", "trace-pipe", "trace-cmd", "perf"):
        raise QueryError(f"--repeat does not support format {form.name}")
    if any(o in ("latency", "verbose") or o.startswith("clock=") for o in form.options):
        raise QueryError("--repeat needs times in seconds; leave latency, verbose and clock out")
    period = 1 + (duration_ns + _SECOND_NS - 1) // _SECOND_NS
    recording.repeat = repeat
    lines = render_lines(recording, form)
    head = [text for text, item in lines if item is None]
    yield "".join(line + "\n" for line in head).encode()
    template, places, seconds = _template([line for line in lines if line[1] is not None])
    if int(seconds.max(initial=0)) + period * repeat >= 10**_SECOND_DIGITS:
        raise QueryError(f"--repeat {repeat} needs more than {_SECOND_DIGITS} digits for seconds")
    for i in range(repeat):
        _write_seconds(template, places, seconds + i * period)
        yield template.tobytes()


Ints = NDArray[np.int64]


def _template(lines: list[tuple[str, object]]) -> tuple[NDArray[np.uint8], Ints, Ints]:
    """Return the bytes of the lines, the offset after the seconds of each, and the seconds."""
    encoded, places, seconds, at = [], [], [], 0
    for text, item in lines:
        data = (text + "\n").encode()
        if not isinstance(item, LostEvents) or "PERF_RECORD_LOST" in text:
            end = data.index(b".", data.index(b"]"))
            while not data[end + 1 : end + 7].isdigit():
                end = data.index(b".", end + 1)
            places.append(at + end)
            seconds.append(int(data[end - _SECOND_DIGITS : end]))
        encoded.append(data)
        at += len(data)
    array = np.frombuffer(b"".join(encoded), np.uint8).copy()
    return array, np.array(places, np.int64), np.array(seconds, np.int64)


def _write_seconds(template: NDArray[np.uint8], places: Ints, seconds: Ints) -> None:
    """Write seconds into the template in place, right-aligned in their columns."""
    rest = seconds.copy()
    for column in range(1, _SECOND_DIGITS + 1):
        digit = (rest % 10 + ord("0")).astype(np.uint8)
        blank = (rest == 0) & (column > 1)
        template[places - column] = np.where(blank, np.uint8(ord(" ")), digit)
        rest //= 10
