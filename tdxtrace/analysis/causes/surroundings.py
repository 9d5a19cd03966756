"""Context of one attempt: its causes, its retry chain, and concurrent calls of all threads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import polars as pl

from tdxtrace.analysis.causes.evidence import activity
from tdxtrace.errors import QueryError
from tdxtrace.tables.trace import Findings, Trace

# Largest margin around an attempt, in multiples of its length; longer holders are cut off.
_MARGIN_LENGTHS: Final = 3
_MIN_MARGIN_NS: Final = 2_000


@dataclass(frozen=True, slots=True)
class Surroundings:
    """One attempt and the calls around it."""

    attempt: dict[str, Any]
    """Row of the attempt in ``seamcalls``, with the TD inferred."""
    answers: list[dict[str, Any]]
    """Rows of the attempt in ``busy_causes``, by rank; empty if it was not busy."""
    chain: dict[str, Any] | None
    """Row of ``retry_chains`` that contains the attempt."""
    calls: pl.DataFrame
    """Calls of all threads in the time window: rows of :func:`~.evidence.activity`, by begin."""
    first_ns: int
    last_ns: int
    names: dict[int, str]
    """Name of each thread, as recorded: untrusted text, escape it before display."""


def surroundings(
    trace: Trace, findings: Findings, seq: int, *, source: int = 0, whole_chain: bool = False
) -> Surroundings:
    """Return the context of one SEAMCALL.

    Args:
        trace: The recorded events.
        findings: The findings of the whole trace.
        seq: ``seq`` of the call in ``seamcalls``.
        source: Number of the input.
        whole_chain: Cover the time of the whole retry chain, not only of the attempt.

    Raises:
        QueryError: If there is no such call; the message names the nearest one.
    """
    seamcalls = trace.seamcalls.filter(pl.col("source") == source)
    calls = activity(seamcalls, trace.vm_entries.filter(pl.col("source") == source))
    own = calls.filter(pl.col("seq") == seq, pl.col("seq").is_in(seamcalls["seq"].implode()))
    if own.is_empty():
        raise QueryError(_not_found(seamcalls, seq, source))
    attempt = own.row(0, named=True)
    by_source = pl.col("source") == source
    causes = findings.busy_causes.filter(by_source, pl.col("seq") == seq).sort("rank")
    chain = _chain(findings.retry_chains.filter(by_source), attempt)
    answers = causes.to_dicts()
    first_ns, last_ns = _time_window(calls, attempt, answers, chain if whole_chain else None)
    inside = calls.filter(pl.col("begins") <= last_ns, pl.col("ends") >= first_ns)
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


def _not_found(seamcalls: pl.DataFrame, seq: int, source: int) -> str:
    if seamcalls.is_empty():
        return f"no SEAMCALL at seq {seq}: input {source} has none"
    away = (pl.col("seq").cast(pl.Int64) - seq).abs()
    nearest = seamcalls.select("seq").sort(away, "seq").item(0, 0)
    return f"no SEAMCALL at seq {seq}; nearest: {nearest}; tdxtrace busy-causes lists them"


def _chain(chains: pl.DataFrame, attempt: dict[str, Any]) -> dict[str, Any] | None:
    """Return the retry chain of the same thread and leaf that contains the attempt."""
    seq = attempt["seq"]
    over = chains.filter(
        pl.col("tid").eq_missing(attempt["tid"]),
        pl.col("leaf") == attempt["leaf"],
        pl.col("first_seq") <= seq,
        pl.col("last_seq") >= seq,
    )
    return None if over.is_empty() else over.row(-1, named=True)


def _time_window(
    calls: pl.DataFrame,
    attempt: dict[str, Any],
    answers: list[dict[str, Any]],
    chain: dict[str, Any] | None,
) -> tuple[int, int]:
    """Return first and last ns of the attempt or chain, extended to a holder that is near it."""
    first, last = attempt["begins"], attempt["ends"]
    if chain is not None:
        first, last = min(first, chain["start_ns"]), max(last, chain["end_ns"])
    around = max(_MARGIN_LENGTHS * (last - first), _MIN_MARGIN_NS)
    holder = answers[0]["holder_seq"] if answers else None
    held = calls.filter(pl.col("seq") == holder) if holder is not None else calls.clear()
    since, until = first, last
    for begins, ends in held.select("begins", "ends").iter_rows():
        since, until = max(begins, first - around), min(ends, last + around)
    margin = max((last - first) // 2, _MIN_MARGIN_NS // 4)
    return min(first, since) - margin, max(last, until) + margin
