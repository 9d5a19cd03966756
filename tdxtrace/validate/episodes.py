"""Score of the zero-step episodes: precision and recall of each form."""

from __future__ import annotations

from typing import Final

from tdxtrace.simulate.journal import Episode
from tdxtrace.simulate.module.abi import EXIT_EPT_VIOLATION, OPERAND, OPERAND_BUSY
from tdxtrace.simulate.module.state import Call
from tdxtrace.simulate.record.symbols import CLOCK_START_NS
from tdxtrace.validate.captured import CapturedRun, Score

STRENGTHS: Final = ("proof", "strong", "weak")
_BUSY_SEPT: Final = OPERAND_BUSY | OPERAND["SEPT_TREE"]


def score_episodes(made: CapturedRun) -> Score:
    """Compare the episodes that were found with the simulated ones.

    A found episode is true if the mitigation refused an entry within it, or answered one
    with an emulated fault.  A simulated episode is found if an entry it refused lies within
    a found one, on its thread.  Only entries whose answer can be read in the capture count
    as shown; where only kvm_exit shows them, only after the vCPU was first seen to execute
    something (else: at the edge).
    """
    score = Score()
    shown = _shown(made)
    refused = {line: call for line, call in shown.items() if call.status == _BUSY_SEPT}
    emulated = {line: call for line, call in shown.items() if _is_emulated(call)}
    refused_or_emulated = {**refused, **emulated}
    spans = []
    for row in made.findings.zero_steps.rows(named=True):
        strength, tid = row["strength"], row["tid"]
        span = range(row["first_seq"], row["last_seq"] + 1)
        is_true = any(
            line in span and call.thread is not None and call.thread.tid == tid
            for line, call in refused_or_emulated.items()
        )
        score.counts[f"{strength}_found"] += 1
        score.counts[f"{strength}_true"] += is_true
        if not is_true and strength != "weak":
            score.add_example(f"not an episode: {row}", 4)
        spans.append((tid, row["first_seq"], row["last_seq"], strength))
    moved = _first_progress(made)
    for episode, lines in _episodes(made, _decidable(made, refused)):
        if episode.armed_ns < moved.get(episode.thread.tid, made.run.end_ns):
            score.counts["at_the_edge"] += 1
            continue
        score.counts["shown"] += 1
        by = {s for tid, a, b, s in spans if tid == episode.thread.tid if _any(lines, a, b)}
        sure = by & {"proof", "strong"}
        score.counts["found_surely"] += bool(sure)
        score.counts["found_weakly"] += bool(by) and not sure
        if not sure:
            score.add_example(f"not found: {episode}, lines {lines[:3]}", 4)
    return score


def _decidable(made: CapturedRun, refused: dict[int, Call]) -> dict[int, Call]:
    """Refused entries that kvm_exit alone can distinguish from those that met a TRACK.

    With the status of TDH.VP.ENTER that is all; where TRACK is probed, those that no
    TRACK overlaps; the others count as neither shown nor at the edge.
    """
    if made.cell.vp_enter or made.cell.probes == "stock":
        return refused
    tracks = sorted(
        (call.start_ns, call.end_ns)
        for call in made.run.journal.calls
        if call.leaf == "TDH.MEM.TRACK"
    )
    return {
        line: call
        for line, call in refused.items()
        if not any(a <= call.end_ns + 1000 and b >= call.start_ns - 1000 for a, b in tracks)
    }


def _first_progress(made: CapturedRun) -> dict[int, int]:
    """Time of each vCPU's first executed instruction: only later runs of faults are whole.

    With the status of TDH.VP.ENTER nothing depends on earlier events.
    """
    if made.cell.vp_enter and made.cell.probes != "stock":
        return {call.thread.tid: -1 for call in made.run.journal.calls if call.thread}
    visible = {(seen.tid, seen.ts_ns) for seen in made.lines.values()}
    first: dict[int, int] = {}
    for call in made.run.journal.calls:
        if call.vmcall_reason and call.thread is not None:
            place = (call.thread.tid, CLOCK_START_NS + call.end_ns)
            if place in visible:
                first.setdefault(call.thread.tid, call.end_ns)
    return first


def _any(lines: list[int], first: int, last: int) -> bool:
    return any(first <= line <= last for line in lines)


def _shown(made: CapturedRun) -> dict[int, Call]:
    """Line with each entry's answer: of the status probe, else of kvm_exit."""
    entries = {id(call): call for call in made.run.journal.calls if call.leaf == "TDH.VP.ENTER"}
    if made.cell.vp_enter and made.cell.probes != "stock":
        return {made.returns[i]: call for i, call in entries.items() if i in made.returns}
    exits = {
        (seen.tid, seen.ts_ns): line
        for line, seen in made.lines.items()
        if seen.spec.name == "kvm_exit"
    }
    found = {}
    for call in entries.values():
        assert call.thread is not None
        line = exits.get((call.thread.tid, CLOCK_START_NS + call.end_ns))
        if line is not None:
            found[line] = call
    return found


def _is_emulated(call: Call) -> bool:
    return call.status == EXIT_EPT_VIOLATION and call.armed and not call.entered


def _episodes(made: CapturedRun, refused: dict[int, Call]) -> list[tuple[Episode, list[int]]]:
    """Episodes with the lines of their refused entries; those without any are left out."""
    found = []
    for episode in made.run.journal.episodes:
        ends = episode.cleared_ns if episode.cleared_ns is not None else made.run.end_ns + 1
        lines = [
            line
            for line, call in refused.items()
            if call.thread is episode.thread and episode.armed_ns <= call.start_ns < ends
        ]
        if lines:
            found.append((episode, sorted(lines)))
    return found
