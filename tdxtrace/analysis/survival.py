"""Kaplan-Meier curves of the steps that requests need, with censoring and clustering."""

from __future__ import annotations

from typing import Final

import polars as pl

from tdxtrace.intervals import CONFIDENCE, exact_interval, few_clusters_factor

GROUP: Final = ("leaf", "by", "td_id", "kind")

# Fewer episodes than this do not show the spread of episode sizes; the design effect is then
# that of the last step that had so many.  Ten is what cluster-robust variances are said to
# need at the least (A. C. Cameron, D. L. Miller, J. Human Resources 50 (2015) 317: few is
# "less than 20" to "less than 50"; the t factor below pays for the difference).
MIN_EPISODES: Final = 10

# Where nothing was busy the number of episodes adds no uncertainty.
_UNLIMITED_EPISODES: Final = 1_000_000


def done_curves(retried: pl.DataFrame, totals: pl.DataFrame, base: int) -> pl.DataFrame:
    """Return one row per group and step at which requests were done or censored.

    Args:
        retried: One row per request that was not done at once: the columns GROUP, source,
            episode, done, and depth, the last step after which it still needed more.
        totals: One row per group: n_requests, and n_done, those that were done at once.
        base: The depth of these.

    Returns:
        The columns GROUP, step and those of the ``attempts`` table from n_requests on,
        ordered by group and step.
    """
    steps = _count_by_step(retried, totals, base).with_columns(
        _hazard=pl.col("n_done") / pl.col("n_at_risk"),
        _risk=pl.col("n_done") / (pl.col("n_at_risk") * (pl.col("n_at_risk") - pl.col("n_done"))),
    )
    steps = steps.with_columns(
        more=(1 - pl.col("_hazard")).cum_prod().over(GROUP).clip(0, 1),
        _greenwood=pl.col("_risk").cum_sum().over(GROUP),
    )
    steps = _with_effective_n(steps)
    low, high = exact_interval(
        steps["more"].to_numpy(), steps["n_effective"].to_numpy(), CONFIDENCE
    )
    unsigned = ("n_at_risk", "n_done", "n_censored", "n_episodes")
    return steps.join(
        totals.select(*GROUP, "n_requests"), on=GROUP, nulls_equal=True, maintain_order="left"
    ).select(
        *GROUP,
        "step",
        "n_requests",
        pl.col(unsigned).cast(pl.UInt64),
        done_ratio=1 - pl.col("more"),
        done_low=pl.Series(1 - high),
        done_high=pl.Series(1 - low),
        design_effect="design_effect",
        n_effective="n_effective",
    )


def _count_by_step(retried: pl.DataFrame, totals: pl.DataFrame, base: int) -> pl.DataFrame:
    """Requests done and censored at each step, and those still retrying after it."""
    rank = pl.col("depth").rank("ordinal", descending=True)
    ranked = retried.with_columns(rank=rank.over(*GROUP, "source", "episode").cast(pl.Int64))
    step = pl.col("depth") + pl.col("done").cast(pl.Int64)
    # The squares of 1, 2, 3 ... differ by 1, 3, 5 ...: what the request of each rank adds
    # to the square of its episode's size.
    leaving_now = ranked.group_by(*GROUP, step=step).agg(
        n_done=pl.col("done").sum().cast(pl.Int64),
        n_censored=(~pl.col("done")).sum().cast(pl.Int64),
    )
    more = ranked.group_by(*GROUP, step="depth").agg(
        n_more=pl.len().cast(pl.Int64),
        squares=(2 * pl.col("rank") - 1).sum(),
        n_episodes=(pl.col("rank") == 1).sum().cast(pl.Int64),
    )
    at_once = totals.select(*GROUP, "n_done", step=pl.lit(base + 1, pl.Int64))
    by_step = (
        pl.concat([leaving_now, more, at_once], how="diagonal")
        .group_by(*GROUP, "step")
        .agg(pl.col("n_done", "n_censored", "n_more", "squares", "n_episodes").sum())
    )
    still_retrying = [
        pl.col(name).cum_sum(reverse=True).over(GROUP).alias(name)
        for name in ("n_more", "squares", "n_episodes")
    ]
    leaving = (pl.col("n_done") + pl.col("n_censored")).cum_sum(reverse=True)
    return (
        by_step.filter(pl.col("step") > base)
        .sort(*GROUP, "step")
        .with_columns(*still_retrying, n_at_risk=leaving.over(GROUP))
        .filter(pl.col("n_done") + pl.col("n_censored") > 0)
    )


def _with_effective_n(steps: pl.DataFrame) -> pl.DataFrame:
    """Add the design effect, and the effective number of independent requests."""
    known = (pl.col("n_episodes") >= MIN_EPISODES) | pl.int_range(pl.len()).eq(0).over(GROUP)
    steps = steps.with_columns(
        raw=pl.when(known & (pl.col("n_more") > 0))
        .then(pl.col("squares") / pl.col("n_more"))
        .forward_fill()
        .over(GROUP),
        n_known=pl.when(known & (pl.col("n_more") > 0))
        .then("n_episodes")
        .forward_fill()
        .over(GROUP),
    )
    n_known = steps["n_known"].fill_null(_UNLIMITED_EPISODES).to_numpy().astype(float)
    widened = few_clusters_factor(n_known, CONFIDENCE)
    # Equivalent number of uncensored requests: S (1 - S) over Greenwood's variance.
    n_uncensored = (1 - pl.col("more")) / (pl.col("more") * pl.col("_greenwood"))
    n_uncensored = pl.when(pl.col("more") > 0).then(
        pl.when(pl.col("_greenwood") > 0).then(n_uncensored).otherwise(pl.col("n_at_risk"))
    )
    first = pl.col("n_at_risk").first().over(GROUP)
    return steps.with_columns(
        design_effect=pl.col("raw").fill_null(1.0).clip(1.0) * pl.Series(widened)
    ).with_columns(
        n_effective=pl.coalesce(n_uncensored, n_uncensored.forward_fill().over(GROUP), first).cast(
            pl.Float64
        )
        / pl.col("design_effect")
    )
