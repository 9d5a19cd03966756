"""One cell's capture: written, read back, and each line traced to what it stands for."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from tdxtrace.errors import FormatError
from tdxtrace.ingest.read import read_trace
from tdxtrace.pipeline import analyze
from tdxtrace.simulate.engine import Run
from tdxtrace.simulate.journal import Request
from tdxtrace.simulate.module.state import Call
from tdxtrace.simulate.record import faults, output
from tdxtrace.simulate.record.probes import Capture
from tdxtrace.simulate.record.recording import TraceEvent
from tdxtrace.tables.trace import Findings, Trace
from tdxtrace.validate.cells import Cell


@dataclass(slots=True)
class Captured:
    """What a cell's capture shows, what was read of it, and what it stands for."""

    cell: Cell
    run: Run
    trace: Trace
    findings: Findings
    lines: dict[int, TraceEvent]
    """Event that each line of the file stands for."""
    returns: dict[int, int]
    """Line of the return of each SEAMCALL, by id of its call, where it can be read."""
    entries: dict[int, int]
    """Line of its entry."""
    settling: dict[tuple[int, str, int, int], list[Request]]
    """Requests that succeeded, by what they were for."""
    partial_line: int = 0
    """Line that the end of the file cuts in two; 0 if none."""


def capture(run: Run, cell: Cell) -> Captured | None:
    """Write one capture of a run, read and analyse it.

    Returns:
        What came of it; None if the capture holds nothing that could be read.
    """
    probed = Capture(cell.probes, vp_enter=cell.vp_enter, arguments=cell.arguments)
    recording = faults.record(run, probed, tuple(map(faults.parse_fault, cell.faults)))
    form = output.parse_format(cell.form, cell.options)
    rendered = output.render_lines(recording, form)
    data = output.render_bytes(run, recording, form)
    n_whole = data.count(b"\n")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.txt"
        path.write_bytes(data)
        try:
            trace = read_trace(path)
        except FormatError:
            return None
        findings = analyze(trace)
    lines = {
        number: item
        for number, (_, item) in enumerate(rendered[:n_whole], 1)
        if isinstance(item, TraceEvent)
    }
    made = Captured(cell, run, trace, findings, lines, {}, {}, {})
    if not data.endswith(b"\n") and n_whole < len(rendered):
        made.partial_line = n_whole + 1
        item = rendered[n_whole][1]
        if isinstance(item, TraceEvent):
            lines[made.partial_line] = item
    for request in run.journal.requests:
        if request.outcome == "succeeded":
            made.settling.setdefault(request.key, []).append(request)
    _place(made)
    return made


def _place(made: Captured) -> None:
    single = made.cell.form == "graph"
    for number, seen in made.lines.items():
        if not seen.calls:
            continue
        places = made.returns if seen.spec.kind == "return" else made.entries
        for call in seen.calls:
            places[id(call)] = number
            if single and seen.spec.kind == "return":
                made.entries.setdefault(id(call), number)


def row_of(made: Captured, call: Call) -> int | None:
    """The ``seq`` of the seamcalls row that stands for a call; None if nothing was seen of it."""
    return made.returns.get(id(call), made.entries.get(id(call)))
