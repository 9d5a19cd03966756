"""Score of the retry chains: exact, marked as uncertain, or wrong."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Final

import polars as pl

from tdxtrace.simulate.journal import RETRYABLE, Request
from tdxtrace.simulate.module.abi import HIGH_HALF, LEAF
from tdxtrace.simulate.module.state import Call
from tdxtrace.validate.captured import Captured, row_of

MEASURES: Final = ("requests", "exact", "marked", "wrong", "missing", "extra", "needless", "unseen")


@dataclass(slots=True)
class _Expected:
    """What a capture can show of one request: rows of its wrapper calls, and how it ended."""

    request: Request
    rows: list[int | None]
    """``seq`` of each call; None where nothing of it can be read."""
    is_whole: list[bool]
    """Whether its entry (where entries are probed) and its return can be read."""
    n_busy: int
    settled: bool
    outcome: str


@dataclass(slots=True)
class ChainScore:
    """Counts, and a few examples of what went wrong."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)


def score_chains(made: Captured) -> ChainScore:
    """Hold every chain that was found against the request it should stand for.

    ``exact``: as many attempts, as many busy, the same first and last call and outcome.
    ``marked``: not so, but the chain says of itself that it was cut, or that its calls
    were joined by less than the whole request.  ``wrong``, ``missing``, ``extra``: a
    chain that is sure of something untrue, a request none stands for, a chain of calls
    that belong to none.  ``needless``: marked though the capture shows all of it.
    ``unseen``: requests of which nothing was captured.
    """
    score = ChainScore()
    found = made.findings.retry_chains.rows(named=True)
    by_first = {row["first_seq"]: row for row in found}
    by_thread: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for row in found:
        by_thread.setdefault((row["tid"], row["leaf"]), []).append(row)
    claimed: set[int] = set()
    last_of_thread = _last_rows(made)
    for request in made.run.journal.requests:
        want = _expected(made, request)
        mine = [by_first[row] for row in want.rows if row in by_first]
        claimed.update(row["first_seq"] for row in mine)
        verdict = _verdict(want, mine, last_of_thread)
        if verdict == "missing" and _covered_by_marked(made, want, by_thread):
            verdict = "marked"
        score.counts["requests"] += 1
        score.counts[verdict] += 1
        plain = made.cell.is_clean and _was_plain(want, last_of_thread)
        if verdict == "marked" and plain and not _may_have_begun_before(made, mine):
            score.counts["needless"] += 1
            _example(score, "needless", want, mine)
        if verdict in ("wrong", "missing"):
            _example(score, verdict, want, mine)
    known = (
        claimed | {row_of(made, call) for call in made.run.unfinished_entries} | {made.partial_line}
    )
    extra = [row for row in found if row["first_seq"] not in known and not _is_marked(row)]
    score.counts["extra"] += len(extra)
    score.examples += [f"extra: {row}" for row in extra[:2]]
    return score


def _example(score: ChainScore, verdict: str, want: _Expected, mine: list[dict[str, Any]]) -> None:
    if len(score.examples) < 6:
        r = want.request
        got = [
            (m["first_seq"], m["n_attempts"], m["n_busy"], m["outcome"], m["cut_by"]) for m in mine
        ]
        score.examples.append(
            f"{verdict}: {r.leaf} tid {r.thread.tid} gpa {r.gpa:#x}: {len(want.rows)} calls, "
            f"{want.n_busy} busy, {want.outcome}, rows {want.rows[:4]}; found {got}"
        )


def _expected(made: Captured, request: Request) -> _Expected:
    """The request as its wrapper's calls show it; each SEAMCALL where those are probed."""
    calls = request.calls
    if made.cell.probes != "seamcall" and calls[0].wrapper_call:
        last = {call.wrapper_call: call for call in calls}
        calls = list(last.values())
    rows = [row_of(made, call) for call in calls]
    outcome = request.outcome
    if outcome == "resolved_elsewhere" and not _settled_in_sight(made, request):
        # What settled it lies outside the capture: nothing says that somebody did.
        outcome = "abandoned"
    needs_entry = made.cell.probes == "wrappers"
    return _Expected(
        request,
        # Where the file's end cuts a line in two, nothing can be held against it.
        [None if row == made.partial_line else row for row in rows],
        [
            id(call) in made.returns and (not needs_entry or id(call) in made.entries)
            for call in calls
        ],
        sum(_unsettled(call) for call in calls),
        not _unsettled(calls[-1]),
        outcome,
    )


def _settled_in_sight(made: Captured, given_up: Request) -> bool:
    """Whether the capture shows a success on the same request after this one began."""
    return any(
        request.calls[-1].end_ns >= given_up.calls[0].start_ns
        and id(request.calls[-1]) in made.returns
        for request in made.settling.get(given_up.key, ())
    )


def _unsettled(call: Call) -> bool:
    return call.status & HIGH_HALF in RETRYABLE


def _last_rows(made: Captured) -> dict[int, int]:
    """Last row of each thread among its own calls: where the capture ends for it."""
    rows = made.trace.seamcalls
    own = rows.filter(~pl.col("in_irq").fill_null(False), pl.col("tid").is_not_null())
    last = own.group_by("tid").agg(pl.col("seq").max())
    return dict(zip(last["tid"], last["seq"], strict=True))


def _may_have_begun_before(made: Captured, mine: list[dict[str, Any]]) -> bool:
    """Whether TDs ran before the capture: nothing says that a thread's first call is a first."""
    ran = not all(td.build for td in made.run.scenario.tds)
    return ran and any(row["cut_by"] == "trace_start" for row in mine)


def _was_plain(want: _Expected, last_of_thread: dict[int, int]) -> bool:
    """Whether the capture shows the request from its first call to the one that settles it."""
    whole = None not in want.rows and all(want.is_whole)
    last = want.rows[-1]
    ends = last is not None and last < last_of_thread.get(want.request.thread.tid, 0)
    return whole and (want.settled or (ends and want.outcome != "cut"))


def _verdict(
    want: _Expected,
    mine: list[dict[str, Any]],
    last_of_thread: dict[int, int],
) -> str:
    if all(row is None for row in want.rows):
        return "unseen"
    if not mine:
        return "missing"
    if len(mine) == 1 and _is_exact(want, mine[0], last_of_thread):
        return "exact"
    return "marked" if all(_is_marked(row) for row in mine) else "wrong"


def _is_exact(want: _Expected, row: dict[str, Any], last_of_thread: dict[int, int]) -> bool:
    outcome = want.outcome
    if not want.settled and want.rows[-1] == last_of_thread.get(want.request.thread.tid):
        # Given up, and the thread is never heard of again: the capture cannot tell.
        outcome = "cut"
    found = (row["first_seq"], row["last_seq"], row["n_attempts"], row["n_busy"], row["outcome"])
    return found == (want.rows[0], want.rows[-1], len(want.rows), want.n_busy, outcome)


def _is_marked(row: dict[str, Any]) -> bool:
    return bool(row["outcome"] == "cut" or row["identity"] != "request")


def _covered_by_marked(
    made: Captured, want: _Expected, by_thread: dict[tuple[int, int], list[dict[str, Any]]]
) -> bool:
    """Whether the chains that swallowed the request's calls say that they are uncertain.

    A call whose return was lost can be paired with the return of a later one: then the
    chain that begins at its entry is the one to look at.  Its neighbours touch the same
    instants within a step of the clock and stand for calls of their own, so one marked
    chain there is enough.
    """
    rows = by_thread.get((want.request.thread.tid, LEAF[want.request.leaf]), [])
    first = next(row for row in want.rows if row is not None)
    began = made.lines[first].ts_ns
    step = made.trace.provenance.sources[0].clock_resolution_ns
    over = [
        row
        for row in rows
        if row["first_seq"] <= first <= row["last_seq"]
        or row["start_ns"] - step <= began <= row["end_ns"] + step
    ]
    return any(_is_marked(row) for row in over)
