"""What happened around one attempt: its answer, its chain, and what other threads did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import polars as pl

from tdxtrace.analysis.causes.activity import activity
from tdxtrace.errors import QueryError
from tdxtrace.tables.trace import Findings, Trace

# How much of the time around an attempt is shown, in lengths of it; a holder may reach
# further out, but then its ends are not what the picture is about.
_BEFORE: Final = 3
_LEAST_NS: Final = 2_000


@dataclass(frozen=True, slots=True)
class Surroundings:
    """One attempt and its time."""

    attempt: dict[str, Any]
    """Its row in ``seamcalls``, with the TD completed."""
    answers: list[dict[str, Any]]
    """Its rows in ``busy_causes``, by rank; none if it was not busy."""
    chain: dict[str, Any] | None
    """The row in ``retry_chains`` that it belongs to."""
    calls: pl.DataFrame
    """What any thread did in that time: rows of :func:`~.activity.activity`, by begin."""
    first_ns: int
    last_ns: int
    names: dict[int, str]
    """Name of each thread, as recorded: hostile text, escape it before showing."""


def surroundings(
    trace: Trace, findings: Findings, seq: int, *, source: int = 0, whole_chain: bool = False
) -> Surroundings:
    """Find what happened around one SEAMCALL.

    Args:
        trace: What was recorded.
        findings: What was found in all of it.
        seq: Place of the call: ``seq`` of its row in ``seamcalls``.
        source: Which input.
        whole_chain: Show the time of its whole chain, not of the attempt alone.

    Raises:
        QueryError: If there is no such call; names the nearest.
    """
    calls = trace.seamcalls.filter(pl.col("source") == source)
    done = activity(calls, trace.vm_entries.filter(pl.col("source") == source))
    mine = done.filter(pl.col("seq") == seq, pl.col("seq").is_in(calls["seq"].implode()))
    if mine.is_empty():
        raise QueryError(_no_such(calls, seq, source))
    attempt = mine.row(0, named=True)
    by_source = pl.col("source") == source
    causes = findings.busy_causes.filter(by_source, pl.col("seq") == seq).sort("rank")
    chain = _chain(findings.retry_chains.filter(by_source), attempt)
    answers = causes.to_dicts()
    first_ns, last_ns = _window(done, attempt, answers, chain if whole_chain else None)
    inside = done.filter(pl.col("begins") <= last_ns, pl.col("ends") >= first_ns)
    threads = trace.threads.filter(by_source).unique("tid", keep="first", maintain_order=True)
    return Surroundings(
        attempt,
        answers,
        chain,
        inside.sort("begins", "seq"),
        first_ns,
        last_ns,
        dict(threads.select("tid", "comm").iter_rows()),
    )


def _no_such(calls: pl.DataFrame, seq: int, source: int) -> str:
    if calls.is_empty():
        return f"no SEAMCALL at seq {seq}: input {source} has none"
    away = (pl.col("seq").cast(pl.Int64) - seq).abs()
    nearest = calls.select("seq").sort(away, "seq").item(0, 0)
    return f"no SEAMCALL at seq {seq}; nearest: {nearest}; tdxtrace busy-causes lists them"


def _chain(chains: pl.DataFrame, attempt: dict[str, Any]) -> dict[str, Any] | None:
    """The chain of the same thread and leaf that reaches over the attempt."""
    seq = attempt["seq"]
    over = chains.filter(
        pl.col("tid").eq_missing(attempt["tid"]),
        pl.col("leaf") == attempt["leaf"],
        pl.col("first_seq") <= seq,
        pl.col("last_seq") >= seq,
    )
    return None if over.is_empty() else over.row(-1, named=True)


def _window(
    done: pl.DataFrame,
    attempt: dict[str, Any],
    answers: list[dict[str, Any]],
    chain: dict[str, Any] | None,
) -> tuple[int, int]:
    """From when to when: the attempt or chain, and of its holder what lies near."""
    first, last = attempt["begins"], attempt["ends"]
    if chain is not None:
        first, last = min(first, chain["start_ns"]), max(last, chain["end_ns"])
    around = max(_BEFORE * (last - first), _LEAST_NS)
    holder = answers[0]["holder_seq"] if answers else None
    held = done.filter(pl.col("seq") == holder) if holder is not None else done.clear()
    since, until = first, last
    for begins, ends in held.select("begins", "ends").iter_rows():
        since, until = max(begins, first - around), min(ends, last + around)
    margin = max((last - first) // 2, _LEAST_NS // 4)
    return min(first, since) - margin, max(last, until) + margin
