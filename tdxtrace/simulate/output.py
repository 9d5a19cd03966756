"""How a run is written: a format by its name, and its options."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from tdxtrace.errors import QueryError
from tdxtrace.simulate.engine import Run
from tdxtrace.simulate.recording import Recording, Rendered
from tdxtrace.simulate.render import dmesg, graph, perf, tracecmd, tracedat, tracefs

TEXT_FORMATS: Final = ("tracefs", "trace-pipe", "trace-cmd", "perf", "graph")
FORMATS: Final = (*TEXT_FORMATS, "dmesg", "trace.dat", "trace.dat-v6")
# Words a user says for an option of a tool, and the field that each sets.
_WORDS: Final[dict[str, dict[str, tuple[str, bool | None]]]] = {
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
_WORDS["trace-pipe"] = _WORDS["tracefs"]


@dataclass(frozen=True, slots=True)
class Form:
    """A format and its options, checked."""

    name: str
    options: tuple[str, ...] = ()


def form_of(name: str, options: Sequence[str] = ()) -> Form:
    """Check a format and what is said of it.

    Raises:
        QueryError: If there is no such format, or an option does not belong to it.
    """
    if name not in FORMATS:
        near = difflib.get_close_matches(name, FORMATS, n=1, cutoff=0)[0]
        raise QueryError(f"no format {name!r}; nearest: {near}; all: {', '.join(FORMATS)}")
    known = _WORDS.get(name, {})
    for option in options:
        word, equals, value = option.partition("=")
        if word not in known:
            all_ = ", ".join(known) or "none"
            raise QueryError(f"format {name} has no option {option!r}; it has: {all_}")
        if (known[word][1] is None) != bool(equals and value):
            raise QueryError(f"not an option of {name}: {option!r}")
        if word == "clock" and value not in tracefs.CLOCKS:
            raise QueryError(f"no clock {value!r}; there are: {', '.join(tracefs.CLOCKS)}")
    return Form(name, tuple(options))


def lines_of(recording: Recording, form: Form) -> Rendered:
    """Return the lines of a text format, each with what it stands for."""
    if form.name == "graph":
        return graph.render(recording)
    if form.name == "trace-cmd":
        return tracecmd.render(recording, _set(tracecmd.Options(), form))
    if form.name == "perf":
        return perf.render(recording, _set(perf.Options(), form))
    assert form.name in ("tracefs", "trace-pipe")
    options = tracefs.Options(pipe=form.name == "trace-pipe")
    return tracefs.render(recording, _set(options, form))


def bytes_of(run: Run, recording: Recording, form: Form) -> bytes:
    """Return the file of a format, cut off where the recording says so."""
    if form.name.startswith("trace.dat"):
        data = tracedat.render(recording, 6 if form.name.endswith("v6") else 7)
    else:
        lines = dmesg.render(run) if form.name == "dmesg" else _texts(lines_of(recording, form))
        data = "".join(line + "\n" for line in lines).encode()
    return data[: len(data) - int(len(data) * recording.cut_share)]


def _texts(rendered: Rendered) -> list[str]:
    return [text for text, _ in rendered]


_O = TypeVar("_O")


def _set(options: _O, form: Form) -> _O:
    changes: dict[str, Any] = {}
    for option in form.options:
        word, _, value = option.partition("=")
        field, fixed = _WORDS[form.name][word]
        changes[field] = value if fixed is None else fixed
    return dataclasses.replace(options, **changes)  # type: ignore[type-var]
