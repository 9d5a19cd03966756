"""The ``latencies`` table: duration of busy answers and successes, and pauses between attempts."""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
import polars as pl

from tdxtrace.analysis.lookup import in_order, join_rows
from tdxtrace.analysis.threads import VP_ENTER
from tdxtrace.intervals import Floats
from tdxtrace.tables.events import SEAMCALLS
from tdxtrace.tables.findings import RETRY_CHAINS
from tdxtrace.tables.limits import BUSY_ANSWERS, LATENCIES
from tdxtrace.tdx import word

_CONFIDENCE: Final = 0.95
_REQUEST: Final = ("source", "first_seq")
_GAPS: Final = ("p50_gap_ns", "p99_gap_ns", "max_gap_ns")


def latencies(
    seamcalls: pl.DataFrame, retry_chains: pl.DataFrame, busy_answers: pl.DataFrame
) -> pl.DataFrame:
    """Compare durations of busy and successful calls of a leaf, and pauses between attempts.

    The ratio is computed from medians, since one interrupt inside a call would shift a mean. Its
    interval combines the exact intervals of the two medians. The inverse, success over busy, is
    the number of attempts that cost as much as the work itself (P. Bonzini, September 2024).

    A pause extends from the return of a busy answer to the start of the request's next
    attempt: the caller's own work, a kick, a preemption or the guest in between.

    Args:
        seamcalls: The ``seamcalls`` table; all its sources are combined.
        retry_chains: The ``retry_chains`` table of these calls.
        busy_answers: The ``busy_answers`` table of these chains.

    Returns:
        The ``latencies`` table, one row per leaf that was busy, ordered by leaf.
        ``withheld`` is the reason why a ratio is missing or limited.

    Raises:
        TableError: If an argument lacks a column or has one of another type.

    Sources:
        G. Zou, A. Donner, Statistics in Medicine 27 (2008) 1693: the interval of a
        difference (here: of logarithms) from those of its parts.
    """
    answers = BUSY_ANSWERS.conform(busy_answers)
    names = ("source", "seq", "leaf", "status", "start_ns", "end_ns")
    calls = in_order(SEAMCALLS.conform(seamcalls).select(names), "seq")
    calls = calls.filter(pl.col("leaf").is_in(answers["leaf"].unique().implode()))
    calls = calls.with_columns(took=(pl.col("end_ns") - pl.col("start_ns")).cast(pl.Float64))
    succeeded = calls.filter(pl.col("status") < word.ERROR_BIT).select("leaf", "took")
    busy = join_rows(answers.select(*_REQUEST, "seq"), "seq", calls.drop("status"), "seq")
    gaps = _gaps(calls, busy, RETRY_CHAINS.conform(retry_chains))
    rows = [
        _row(
            leaf,
            _durations(busy, leaf, "took"),
            _durations(succeeded, leaf, "took"),
            _durations(gaps, leaf, "gap"),
        )
        for leaf in answers["leaf"].unique().sort()
    ]
    return LATENCIES.conform(pl.DataFrame(rows, schema=LATENCIES.schema))


def _durations(frame: pl.DataFrame, leaf: int, column: str) -> Floats:
    return np.sort(frame.filter(pl.col("leaf") == leaf)[column].drop_nulls().to_numpy())


def _gaps(calls: pl.DataFrame, busy: pl.DataFrame, chains: pl.DataFrame) -> pl.DataFrame:
    """Return the pauses (ns) before the next attempt of the same request, with their leaf."""
    last = chains.filter(pl.col("n_busy") > 0, pl.col("n_attempts") > pl.col("n_busy"))
    ending = last.select("source", "first_seq", seq="last_seq")
    ending = join_rows(ending, "seq", calls.drop("status"), "seq")
    tries = pl.concat([busy, ending]).sort(*_REQUEST, "seq")
    same = pl.all_horizontal(pl.col(c) == pl.col(c).shift() for c in _REQUEST)
    gap = pl.col("start_ns") - pl.col("end_ns").shift()
    return tries.select("leaf", gap=pl.when(same).then(gap)).drop_nulls()


def _row(leaf: int, busy: Floats, succeeded: Floats, gaps: Floats) -> dict[str, Any]:
    row: dict[str, Any] = {"leaf": leaf, "n_busy": len(busy), "n_succeeded": len(succeeded)}
    if len(gaps):
        places = [math.ceil(share * len(gaps)) - 1 for share in (0.5, 0.99, 1.0)]
        row |= dict(zip(_GAPS, map(int, gaps[places]), strict=True))
    row |= {"n_gaps": len(gaps), "busy_ns": _median(busy), "succeeded_ns": _median(succeeded)}
    if leaf == VP_ENTER:
        row["succeeded_ns"] = None
        return row | {"withheld": "a successful TDH.VP.ENTER returns when the guest exits"}
    return row | _ratio(busy, succeeded)


def _median(durations: Floats) -> float | None:
    return float(np.median(durations)) if len(durations) else None


def _ratio(busy: Floats, succeeded: Floats) -> dict[str, Any]:
    """Return the ratio of the medians and its interval, or the reason why it is withheld."""
    for name, durations in (("busy answers", busy), ("successes", succeeded)):
        if not len(durations):
            return {"withheld": f"no {name} whose beginning and end were seen"}
        if not np.median(durations):
            return {"withheld": f"half of the {name} took no time by this clock"}
    ratio = math.log(np.median(busy)) - math.log(np.median(succeeded))
    (busy_low, busy_high), (succeeded_low, succeeded_high) = (
        _median_interval(busy),
        _median_interval(succeeded),
    )
    below = math.hypot(
        math.log(np.median(busy)) - busy_low, succeeded_high - math.log(np.median(succeeded))
    )
    above = math.hypot(
        busy_high - math.log(np.median(busy)), math.log(np.median(succeeded)) - succeeded_low
    )
    found = {"busy_ratio": math.exp(ratio)}
    if math.isfinite(below):
        found["busy_ratio_low"] = math.exp(ratio - below)
    if math.isfinite(above):
        found["busy_ratio_high"] = math.exp(ratio + above)
    few = math.isinf(below) or math.isinf(above)
    return found | {"withheld": "too few calls for both ends of the interval" if few else None}


def _median_interval(durations: Floats) -> tuple[float, float]:
    """Return the logarithms of the order statistics that bound the median; infinite if too few."""
    n = len(durations)
    k = _binomial_quantile((1 - _CONFIDENCE) / 2, n)
    if k == 0 or durations[k - 1] <= 0:
        return -math.inf, math.inf if k == 0 else math.log(durations[n - k])
    return math.log(durations[k - 1]), math.log(durations[n - k])


def _binomial_quantile(tail: float, n: int) -> int:
    """Return the largest k with P(fewer than k of ``n`` below the median) < ``tail``."""
    # scipy.stats has this function too, but takes three times as long to import.
    from scipy import special

    k: int = math.ceil(special.bdtrik(tail, n, 0.5))
    # The incomplete beta function is more accurate than the inverse of the distribution.
    while k > 0 and special.betainc(n - k + 1, k, 0.5) >= tail:
        k -= 1
    while special.betainc(n - k, k + 1, 0.5) < tail:
        k += 1
    return k
