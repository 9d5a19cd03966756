"""Scores of retry chains (exact, marked as uncertain, or wrong) and of zero-step episodes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import polars as pl

from tdxtrace.simulate.journal import RETRYABLE, Episode, Request
from tdxtrace.simulate.module.abi import EXIT_EPT_VIOLATION, HIGH_HALF, LEAF, OPERAND, OPERAND_BUSY
from tdxtrace.simulate.module.state import Call
from tdxtrace.validate.captured import CapturedRun, Score, row_of

STRENGTHS: Final = ("proof", "strong", "weak")
_BUSY_SEPT: Final = OPERAND_BUSY | OPERAND["SEPT_TREE"]


@dataclass(slots=True)
class _Expected:
    """The chain that a capture can show for one request."""

    request: Request
    rows: list[int | None]
    """``seq`` of each call; None if the call cannot be read."""
    is_whole: list[bool]
    """Whether return and, if entries are probed, entry of each call can be read."""
    n_busy: int
    settled: bool
    outcome: str


def score_chains(captured: CapturedRun) -> Score:
    """Compare every found chain with its simulated request.

    Counts:
        exact: Attempts, busy answers, first call, last call and outcome are equal.
        marked: Not exact, but the chain is marked as cut, or joined by less than ``request``.
        wrong: Neither exact nor marked.
        missing: Requests without a chain.
        extra: Chains whose calls belong to no request.
        needless: Chains that are marked although the capture shows the whole request.
        unseen: Requests without any captured call.
    """
    score = Score()
    found = captured.findings.retry_chains.rows(named=True)
    by_first = {row["first_seq"]: row for row in found}
    by_thread: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for row in found:
        by_thread.setdefault((row["tid"], row["leaf"]), []).append(row)
    claimed: set[int] = set()
    last_of_thread = _last_rows(captured)
    for request in captured.run.journal.requests:
        expected = _expected(captured, request)
        own = [by_first[row] for row in expected.rows if row in by_first]
        claimed.update(row["first_seq"] for row in own)
        verdict = _verdict(expected, own, last_of_thread)
        if verdict == "missing" and _is_in_marked_chain(captured, expected, by_thread):
            verdict = "marked"
        score.counts["requests"] += 1
        score.counts[verdict] += 1
        plain = captured.cell.is_clean and _is_fully_captured(expected, last_of_thread)
        if verdict == "marked" and plain and not _may_have_begun_before(captured, own):
            score.counts["needless"] += 1
            _example(score, "needless", expected, own)
        if verdict in ("wrong", "missing"):
            _example(score, verdict, expected, own)
    known = (
        claimed
        | {row_of(captured, call) for call in captured.run.unfinished_entries}
        | {captured.partial_line}
    )
    extra = [row for row in found if row["first_seq"] not in known and not _is_marked(row)]
    score.counts["extra"] += len(extra)
    score.examples += [f"extra: {row}" for row in extra[:2]]
    return score


def _example(score: Score, verdict: str, expected: _Expected, own: list[dict[str, Any]]) -> None:
    r = expected.request
    got = [(m["first_seq"], m["n_attempts"], m["n_busy"], m["outcome"], m["cut_by"]) for m in own]
    score.add_example(
        f"{verdict}: {r.leaf} tid {r.thread.tid} gpa {r.gpa:#x}: {len(expected.rows)} calls, "
        f"{expected.n_busy} busy, {expected.outcome}, rows {expected.rows[:4]}; found {got}"
    )


def _expected(captured: CapturedRun, request: Request) -> _Expected:
    """Return the expected chain, of wrapper calls or, if those are probed, of SEAMCALLs."""
    calls = request.calls
    if not captured.cell.probes_seamcalls and calls[0].wrapper_call:
        last = {call.wrapper_call: call for call in calls}
        calls = list(last.values())
    rows = [row_of(captured, call) for call in calls]
    outcome = request.outcome
    if outcome == "resolved_elsewhere" and not _settled_in_capture(captured, request):
        # The call that completed the request is not in the capture.
        outcome = "abandoned"
    # tdxtrace capture probes only the return of vCPU entries.
    by_return = captured.cell.probes == "capture" and request.leaf == "TDH.VP.ENTER"
    needs_entry = captured.cell.probes in ("wrappers", "capture") and not by_return
    return _Expected(
        request,
        # A line that is truncated at the end of the file does not count.
        [None if row == captured.partial_line else row for row in rows],
        [
            id(call) in captured.returns and (not needs_entry or id(call) in captured.entries)
            for call in calls
        ],
        sum(_unsettled(call) for call in calls),
        not _unsettled(calls[-1]),
        outcome,
    )


def _settled_in_capture(captured: CapturedRun, given_up: Request) -> bool:
    """Return whether the capture shows a success of the same request after this one began."""
    return any(
        request.calls[-1].end_ns >= given_up.calls[0].start_ns
        and id(request.calls[-1]) in captured.returns
        for request in captured.settling.get(given_up.key, ())
    )


def _unsettled(call: Call) -> bool:
    return call.status & HIGH_HALF in RETRYABLE


def _last_rows(captured: CapturedRun) -> dict[int, int]:
    """Return, by thread, the last row of its own calls: the end of the capture for the thread."""
    rows = captured.trace.seamcalls
    own = rows.filter(~pl.col("in_irq").fill_null(False), pl.col("tid").is_not_null())
    last = own.group_by("tid").agg(pl.col("seq").max())
    return dict(zip(last["tid"], last["seq"], strict=True))


def _may_have_begun_before(captured: CapturedRun, own: list[dict[str, Any]]) -> bool:
    """Return whether a chain may have begun before the capture, because TDs already ran."""
    ran = not all(td.build for td in captured.run.scenario.tds)
    return ran and any(row["cut_by"] == "trace_start" for row in own)


def _is_fully_captured(expected: _Expected, last_of_thread: dict[int, int]) -> bool:
    """Return whether the capture shows the request from its first call to its completion."""
    whole = None not in expected.rows and all(expected.is_whole)
    last = expected.rows[-1]
    ends = last is not None and last < last_of_thread.get(expected.request.thread.tid, 0)
    return whole and (expected.settled or (ends and expected.outcome != "cut"))


def _verdict(
    expected: _Expected,
    own: list[dict[str, Any]],
    last_of_thread: dict[int, int],
) -> str:
    if all(row is None for row in expected.rows):
        return "unseen"
    if not own:
        return "missing"
    if len(own) == 1 and _is_exact(expected, own[0], last_of_thread):
        return "exact"
    return "marked" if all(_is_marked(row) for row in own) else "wrong"


def _is_exact(expected: _Expected, row: dict[str, Any], last_of_thread: dict[int, int]) -> bool:
    outcome = expected.outcome
    if not expected.settled and expected.rows[-1] == last_of_thread.get(
        expected.request.thread.tid
    ):
        # For the last call of a thread, the capture cannot show that the request was abandoned.
        outcome = "cut"
    found = (row["first_seq"], row["last_seq"], row["n_attempts"], row["n_busy"], row["outcome"])
    return found == (
        expected.rows[0],
        expected.rows[-1],
        len(expected.rows),
        expected.n_busy,
        outcome,
    )


def _is_marked(row: dict[str, Any]) -> bool:
    return bool(row["outcome"] == "cut" or row["identity"] != "request")


def _is_in_marked_chain(
    captured: CapturedRun,
    expected: _Expected,
    by_thread: dict[tuple[int, int], list[dict[str, Any]]],
) -> bool:
    """Return whether a chain at the request's first call is marked as uncertain.

    A call whose return was lost can be paired with the return of a later call, so chains of the
    same thread and leaf at that time, within a step of the clock, are examined.  Some of these
    belong to other requests, so one marked chain is enough.
    """
    rows = by_thread.get((expected.request.thread.tid, LEAF[expected.request.leaf]), [])
    first = next(row for row in expected.rows if row is not None)
    began = captured.lines[first].ts_ns
    step = captured.trace.provenance.sources[0].clock_resolution_ns
    over = [
        row
        for row in rows
        if row["first_seq"] <= first <= row["last_seq"]
        or row["start_ns"] - step <= began <= row["end_ns"] + step
    ]
    return any(_is_marked(row) for row in over)


def score_episodes(captured: CapturedRun) -> Score:
    """Compare the found episodes with the simulated ones.

    A found episode is true if the mitigation refused an entry within it, or answered one with an
    emulated fault.  A simulated episode is found if one of its refused entries lies within a found
    episode of the same thread.  A simulated episode counts as ``shown`` if the answer of a refused
    entry can be read in the capture.  If only kvm_exit shows entries, episodes before the first
    executed instruction of the vCPU count as ``at_the_edge`` instead.
    """
    score = Score()
    shown = _shown(captured)
    refused = {line: call for line, call in shown.items() if call.status == _BUSY_SEPT}
    emulated = {line: call for line, call in shown.items() if _is_emulated(call)}
    refused_or_emulated = {**refused, **emulated}
    spans = []
    for row in captured.findings.zero_steps.rows(named=True):
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
    moved = _first_progress(captured)
    decidable = _decidable(captured, refused)
    score.counts["undecidable"] += len(refused) - len(decidable)
    for episode, lines in _episodes(captured, decidable):
        if episode.armed_ns < moved.get(episode.thread.tid, captured.run.end_ns):
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


def _decidable(captured: CapturedRun, refused: dict[int, Call]) -> dict[int, Call]:
    """Return the refused entries that the capture distinguishes from entries refused by TRACK.

    These are all entries if the status of TDH.VP.ENTER is recorded; the entries that overlap no
    TRACK, by any clocks that the CPUs may have, if TRACK is probed; none without probes.  Other
    entries are counted as undecidable.
    """
    if captured.cell.probes == "stock":
        return {}
    if captured.cell.vp_enter:
        return refused
    tracks = sorted(
        (call.start_ns, call.end_ns)
        for call in captured.run.journal.calls
        if call.leaf == "TDH.MEM.TRACK"
    )
    slack = max(1000, captured.trace.provenance.sources[0].drift_ns)
    return {
        line: call
        for line, call in refused.items()
        if not any(a <= call.end_ns + slack and b >= call.start_ns - slack for a, b in tracks)
    }


def _first_progress(captured: CapturedRun) -> dict[int, int]:
    """Return, by thread, the time of the vCPU's first instruction seen in the capture, in ns.

    Runs of faults are complete only after it.  If the status of TDH.VP.ENTER is recorded, the time
    is -1, because no earlier events are needed.
    """
    if captured.cell.vp_enter and captured.cell.probes != "stock":
        return {call.thread.tid: -1 for call in captured.run.journal.calls if call.thread}
    first: dict[int, int] = {}
    for call in captured.run.journal.calls:
        if call.vmcall_reason and call.thread is not None and id(call) in captured.exits:
            first.setdefault(call.thread.tid, call.end_ns)
    return first


def _any(lines: list[int], first: int, last: int) -> bool:
    return any(first <= line <= last for line in lines)


def _shown(captured: CapturedRun) -> dict[int, Call]:
    """Return entries by the line of their answer: that of the status probe, else kvm_exit."""
    entries = {id(call): call for call in captured.run.journal.calls if call.leaf == "TDH.VP.ENTER"}
    if captured.cell.vp_enter and captured.cell.probes != "stock":
        return {captured.returns[i]: call for i, call in entries.items() if i in captured.returns}
    return {captured.exits[i]: call for i, call in entries.items() if i in captured.exits}


def _is_emulated(call: Call) -> bool:
    return call.status == EXIT_EPT_VIOLATION and call.armed and not call.entered


def _episodes(captured: CapturedRun, refused: dict[int, Call]) -> list[tuple[Episode, list[int]]]:
    """Return episodes with the lines of their refused entries; without any, they are left out."""
    found = []
    for episode in captured.run.journal.episodes:
        ends = episode.cleared_ns if episode.cleared_ns is not None else captured.run.end_ns + 1
        lines = [
            line
            for line, call in refused.items()
            if call.thread is episode.thread and episode.armed_ns <= call.start_ns < ends
        ]
        if lines:
            found.append((episode, sorted(lines)))
    return found
