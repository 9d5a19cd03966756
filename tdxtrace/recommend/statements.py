"""The ``limit_statements`` table: upper bounds of the share of requests above common limits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import polars as pl

from tdxtrace.intervals import Floats
from tdxtrace.recommend.extrapolate import Curve, curve_of, rarest_target
from tdxtrace.recommend.limits import CHAIN_COLUMNS, is_mostly_unanswered, leaves_of, limits
from tdxtrace.recommend.target import Target
from tdxtrace.tables.findings import RETRY_CHAINS
from tdxtrace.tables.limits import ATTEMPTS, LIMIT_STATEMENTS, LIMITS, UNITS
from tdxtrace.tables.text import round_up_two_digits

# Numbers of attempts discussed on the kernel's list: no retry, mainline's two calls, 5, 16
# (P. Bonzini and the series of September 2024) and the 1024 of P. Bonzini's doubling limit; and
# times from that of one page fault up to a delay that a guest notices.
COMMON_LIMITS: Final = {
    "attempts": (1, 2, 5, 16, 64, 1024),
    "ns": (10_000, 100_000, 1_000_000, 10_000_000),
}


def limit_statements(
    attempts: pl.DataFrame, retry_chains: pl.DataFrame | pl.LazyFrame, confidence: float = 0.95
) -> pl.DataFrame:
    """Return, per leaf, upper bounds of the share of requests that need more than COMMON_LIMITS.

    A bound is the upper end of a one-sided interval, or the largest such end of any larger limit,
    so that bounds never fall below the bound of a larger limit and agree with ``limits``. The
    ``smallest`` row has the bound at the last step seen, rounded up, with the smallest limit that
    keeps it: counting supports no target below. Leaves whose requests mostly lack an answer are
    left out.

    Args:
        attempts: The ``attempts`` table; only its curves of leaves are used.
        retry_chains: The ``retry_chains`` table that it was made from, or a query of it.
        confidence: One-sided, of each statement alone.

    Returns:
        The ``limit_statements`` table, the leaf with most retried requests first.

    Raises:
        QueryError: If the confidence is out of range.
        TableError: If an argument lacks a column or has one of another type.

    Example:
        >>> import tdxtrace
        >>> found = tdxtrace.analyze(tdxtrace.read_trace("sample_traces/contended.txt"))
        >>> rows = limit_statements(found.attempts, found.retry_chains)
        >>> row = rows.filter(leaf=6, unit="attempts", kind="asked", within=16)
        >>> print(f"at most {row['more_high'].item():.0%} need more than 16 attempts")
        at most 17% need more than 16 attempts
    """
    chains = RETRY_CHAINS.pick(retry_chains, *CHAIN_COLUMNS)
    return statements_of(attempts, leaves_of(chains), confidence)


def statements_of(
    attempts: pl.DataFrame, leaves: pl.DataFrame, confidence: float = 0.95
) -> pl.DataFrame:
    """Return :func:`limit_statements` from curves and the :func:`leaves_of` their recordings."""
    wanted = Target(confidence=confidence)
    steps = ATTEMPTS.conform(attempts).filter(pl.col("by") == "leaf").sort("within")
    rows: list[dict[str, Any]] = []
    for leaf in leaves.iter_rows(named=True):
        for unit in UNITS:
            of_leaf = steps.filter(pl.col("leaf") == leaf["leaf"], pl.col("unit") == unit)
            if is_mostly_unanswered(of_leaf, leaf):
                continue
            given = leaf | {"target": wanted.ratio, "confidence": confidence}
            rows += _statements(
                curve_of(of_leaf, unit, given),
                given | {"unit": unit, "drifts": bool(of_leaf["drifts"].any())},
            )
    return LIMIT_STATEMENTS.conform(pl.DataFrame(rows, schema=LIMIT_STATEMENTS.schema))


def round_up(share: float) -> float:
    """Round a share up to two significant digits, at most 1.

    Example:
        >>> round_up(0.02431), round_up(0.5), round_up(0.999)
        (0.025, 0.5, 1.0)
    """
    return min(round_up_two_digits(share), 1.0) if share > 0 else 0.0


def _statements(curve: Curve, given: dict[str, Any]) -> Iterator[dict[str, Any]]:
    high = _running_max_from_end(curve.upper(curve.confidence))
    row = given | {"max_seen": int(curve.within[-1])}
    for number in COMMON_LIMITS[curve.unit]:
        at = int(np.searchsorted(curve.within, number, "right")) - 1
        # Below the first step no request is done.
        ratio, high_share = (1.0, 1.0) if at < 0 else (float(curve.exceedance[at]), float(high[at]))
        yield row | _statement("asked", number, ratio, high_share)
    smallest = round_up(float(high[-1]))
    at = int(np.argmax(high <= smallest))
    ratio = float(curve.exceedance[at])
    yield row | _statement("smallest", int(curve.within[at]), ratio, smallest)


def _statement(kind: str, within: int, ratio: float, high_share: float) -> dict[str, Any]:
    more = max(ratio, 0.0)
    return {"kind": kind, "within": within, "more_ratio": more, "more_high": max(high_share, more)}


def _running_max_from_end(high: Floats) -> Floats:
    """Return the running maximum from the end: for each value, the largest from there on."""
    return np.maximum.accumulate(high[::-1])[::-1]


def modelled_limits(
    attempts: pl.DataFrame,
    retry_chains: pl.DataFrame | pl.LazyFrame,
    losses: pl.DataFrame,
    seconds: float | None = None,
    confidence: float = 0.95,
    pace_ns: float | None = None,
) -> pl.DataFrame:
    """Return each leaf's limits for the rarest target for which a model is allowed.

    Args:
        attempts: The ``attempts`` table; only its curves of leaves are used.
        retry_chains: The ``retry_chains`` table that it was made from, or a query of it.
        losses: The ``losses`` table.
        seconds: As for :func:`tdxtrace.recommend.limits.limits`.
        confidence: Of the upper end of the model's quantile, if the tail continues as seen.
        pace_ns: As for :func:`tdxtrace.recommend.limits.limits`.

    Returns:
        Rows of the ``limits`` table with ``made_by`` anyone, for leaves with such a limit.
    """
    steps = ATTEMPTS.conform(attempts).filter(pl.col("by") == "leaf").sort("within")
    chains = RETRY_CHAINS.pick(retry_chains, *CHAIN_COLUMNS)
    parts = [LIMITS.empty()]
    for leaf in leaves_of(chains).filter(pl.col("n_retried") > 0).iter_rows(named=True):
        own = steps.filter(pl.col("leaf") == leaf["leaf"])
        in_attempts = own.filter(pl.col("unit") == UNITS[0])
        if is_mostly_unanswered(in_attempts, leaf):
            continue
        given = leaf | {"target": 0.5, "confidence": confidence}
        curve = curve_of(in_attempts, UNITS[0], given)
        target = Target(round_up(rarest_target(curve)), confidence)
        of_leaf = chains.filter(pl.col("leaf") == leaf["leaf"])
        parts.append(limits(own, of_leaf, losses, seconds, target, pace_ns))
    return pl.concat(parts).filter(
        pl.col("made_by") == "anyone", (pl.col("basis") == "extrapolated").any().over("leaf")
    )
