"""Capture of one cell: write it, read it back, and map each line to its simulated event."""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import dataclass, field
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
class CapturedRun:
    """A capture, its findings, and the simulated event of each line."""

    cell: Cell
    run: Run
    trace: Trace
    findings: Findings
    lines: dict[int, TraceEvent]
    """Simulated event of each line of the file, by line number."""
    returns: dict[int, int]
    """Line of the return of each SEAMCALL, by id of its call; readable returns only."""
    entries: dict[int, int]
    """Line of the entry of each SEAMCALL, by id of its call; readable entries only."""
    exits: dict[int, int]
    """Line of the kvm_exit of each TDH.VP.ENTER, by id of its call, whatever its timestamp."""
    settling: dict[tuple[int, str, int, int], list[Request]]
    """Requests that succeeded, by their key."""
    partial_line: int = 0
    """Number of the line that is truncated at the end of the file; 0 if none."""


@dataclass(slots=True)
class Score:
    """Counts by name, and a few examples of wrong results."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def add_example(self, text: str, max_examples: int = 6) -> None:
        """Add an example, unless there are already ``max_examples``."""
        if len(self.examples) < max_examples:
            self.examples.append(text)


def capture_run(run: Run, cell: Cell) -> CapturedRun | None:
    """Write one capture of a run, then read and analyse it.

    Returns:
        The capture and its findings; None if the capture is not a readable trace.
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
    captured = CapturedRun(cell, run, trace, findings, lines, {}, {}, {}, {})
    if not data.endswith(b"\n") and n_whole < len(rendered):
        captured.partial_line = n_whole + 1
        item = rendered[n_whole][1]
        if isinstance(item, TraceEvent):
            lines[captured.partial_line] = item
    for request in run.journal.requests:
        if request.outcome == "succeeded":
            captured.settling.setdefault(request.key, []).append(request)
    _index_lines(captured)
    return captured


def _index_lines(captured: CapturedRun) -> None:
    single = captured.cell.form == "graph"
    for number, seen in captured.lines.items():
        if not seen.calls:
            continue
        if seen.spec.name == "kvm_exit":
            captured.exits.update((id(call), number) for call in seen.calls)
            continue
        places = captured.returns if seen.spec.kind == "return" else captured.entries
        for call in seen.calls:
            places[id(call)] = number
            if single and seen.spec.kind == "return":
                captured.entries.setdefault(id(call), number)


def row_of(captured: CapturedRun, call: Call) -> int | None:
    """Return the ``seq`` of the seamcalls row of a call; None if the call was not recorded."""
    return captured.returns.get(id(call), captured.entries.get(id(call)))
