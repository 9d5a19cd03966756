"""The ``comparisons`` table: changes in the attempts or time needed, between two traces."""

from __future__ import annotations

from typing import Final

import numpy as np
import polars as pl

from tdxtrace.intervals import exact_interval
from tdxtrace.tables.limits import ATTEMPTS, COMPARISONS

# Steps at which curves are compared: the first retry and the proposed limits (mainline calls
# twice; 5 and 16 in the patch series of 2024); and 0.1 to 10 ms.
COMPARED_AT: Final = {"attempts": (1, 2, 5, 16), "ns": (100_000, 1_000_000, 10_000_000)}
_CONFIDENCE: Final = 0.95
"""Confidence level of the intervals in ``attempts``."""
_CURVE: Final = ("n_requests", "done_ratio", "done_low", "done_high")


def comparisons(before: pl.DataFrame, after: pl.DataFrame) -> pl.DataFrame:
    """Compare for each leaf the shares of requests that needed more attempts or time.

    Each share has an interval that accounts for bursts; the interval of the difference is
    computed from the two.

    Args:
        before: The ``attempts`` table of the first trace.
        after: The ``attempts`` table of the second trace.

    Returns:
        The ``comparisons`` table, ordered by leaf, unit and within.

    Raises:
        TableError: If an argument is not an ``attempts`` table.

    Sources:
        R. G. Newcombe, Statistics in Medicine 17 (1998) 873, method 10, for intervals of any
        kind: G. Y. Zou, A. Donner, Statistics in Medicine 27 (2008) 1693.
    """
    both = _points(before).join(
        _points(after), on=["leaf", "unit", "within"], how="full", coalesce=True, suffix="_after"
    )
    p, q = 1 - pl.col("done_ratio"), 1 - pl.col("done_ratio_after")
    p_low, p_high = 1 - pl.col("done_high"), 1 - pl.col("done_low")
    q_low, q_high = 1 - pl.col("done_high_after"), 1 - pl.col("done_low_after")
    difference = q - p
    rows = both.select(
        "leaf",
        "unit",
        "within",
        n_before="n_requests",
        n_after="n_requests_after",
        more_before=p,
        more_after=q,
        difference=difference,
        difference_low=difference - ((q - q_low) ** 2 + (p_high - p) ** 2).sqrt(),
        difference_high=difference + ((q_high - q) ** 2 + (p - p_low) ** 2).sqrt(),
    ).with_columns(
        pl.when(pl.col("n_after").is_null())
        .then(pl.lit("only_before"))
        .when(pl.col("n_before").is_null())
        .then(pl.lit("only_after"))
        .when(pl.col("difference_low") > 0)
        .then(pl.lit("more"))
        .when(pl.col("difference_high") < 0)
        .then(pl.lit("fewer"))
        .otherwise(pl.lit("not_told"))
        .cast(COMPARISONS.schema["change"])
        .alias("change")
    )
    return COMPARISONS.conform(rows.sort("leaf", "unit", "within"))


def _points(attempts: pl.DataFrame) -> pl.DataFrame:
    """Return the values of each leaf's curve at the compared steps.

    After its last step, a curve with requests last seen busy there says nothing of when they were
    done: the share done may be any larger one.
    """
    curves = ATTEMPTS.conform(attempts).filter(pl.col("by") == "leaf")
    points = pl.DataFrame(
        [(unit, within) for unit, places in COMPARED_AT.items() for within in places],
        schema={"unit": curves.schema["unit"], "within": pl.Int64},
        orient="row",
    )
    wanted = curves.select("leaf", "unit").unique().join(points, on="unit").sort("within")
    found = wanted.join_asof(
        curves.select("leaf", "unit", "within", *_CURVE).sort("within"),
        on="within",
        by=["leaf", "unit"],
        check_sortedness=False,
    )
    at_end = pl.col("within") == pl.col("within").max().over("leaf", "unit")
    ends = curves.filter(at_end).select("leaf", "unit", "n_censored", last="within")
    is_open = (pl.col("within") > pl.col("last")) & (pl.col("n_censored") > 0)
    return (
        found.join(
            _before_first_step(curves), on=["leaf", "unit"], how="left", maintain_order="left"
        )
        .join(ends, on=["leaf", "unit"], how="left", maintain_order="left")
        .with_columns(pl.coalesce(name, f"{name}_first") for name in _CURVE)
        .with_columns(done_high=pl.when(is_open).then(1.0).otherwise("done_high"))
        .select("leaf", "unit", "within", *_CURVE)
        .sort("leaf", "unit", "within")
    )


def _before_first_step(curves: pl.DataFrame) -> pl.DataFrame:
    """Return the values before each curve's first step, where no request is done."""
    firsts = curves.unique(["leaf", "unit"], keep="first", maintain_order=True)
    n = firsts["n_effective"].to_numpy()
    _, high = exact_interval(np.zeros(len(n)), n, _CONFIDENCE)
    return firsts.select(
        "leaf",
        "unit",
        n_requests_first="n_requests",
        done_ratio_first=pl.lit(0.0),
        done_low_first=pl.lit(0.0),
        done_high_first=pl.Series(high, dtype=pl.Float64),
    )
