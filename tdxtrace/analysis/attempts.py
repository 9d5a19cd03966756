"""The ``attempts`` table: share of requests done within n attempts, or within a time.

The shares are Kaplan-Meier curves of the steps that requests need, with censoring and clustering.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import polars as pl

from tdxtrace.intervals import CONFIDENCE, exact_interval, few_clusters_factor
from tdxtrace.tables.causes import BUSY_CAUSES
from tdxtrace.tables.findings import RETRY_CHAINS
from tdxtrace.tables.limits import ATTEMPTS, BUSY_ANSWERS, TIMES_NS, UNITS, VIEWS
from tdxtrace.tdx.operands import resource

# A TD is one of its input: struct tdx_td of two hosts, or of one on two days, may have one address.
GROUP: Final = ("leaf", "by", "source", "td_id", "kind")

# Fewer episodes than this do not show the spread of episode sizes; the design effect is then
# that of the last step that had so many.  Ten is what cluster-robust variances are said to
# need at the least (A. C. Cameron, D. L. Miller, J. Human Resources 50 (2015) 317: few is
# "less than 20" to "less than 50"; the t factor below pays for the difference).
MIN_EPISODES: Final = 10

# Where nothing was busy the number of episodes adds no uncertainty.
_UNLIMITED_EPISODES: Final = 1_000_000
# Outcomes in which the module ended the request: no further attempt was needed.
_DONE: Final = ("succeeded", "failed")

# Causes that a lock of the host could prevent, and the others.  An armed TDH.VP.ENTER is a
# host call, but no such lock is held over it, and the guest arms it (P. Bonzini, 2024-09-10:
# the lock goes around the memory SEAMCALLs, the zero-step answer is another matter).
# Unexplained answers may be of either kind and count for both.
_MAKERS: Final = {
    "host": ("host_conflict", "kernel_bug", "unexplained"),
    "guest": ("guest", "armed_entry", "unexplained"),
}

_NO_TD: Final = {"source": pl.lit(None, pl.UInt16), "td_id": pl.lit(None, pl.UInt64)}
_TIME_STEPS: Final = np.array(TIMES_NS, np.int64)


def attempts(
    retry_chains: pl.DataFrame,
    busy_answers: pl.DataFrame,
    busy_causes: pl.DataFrame | pl.LazyFrame | None = None,
) -> pl.DataFrame:
    """Estimate the share of requests done within n attempts, and within t ns of retrying.

    A request is done at the attempt that was answered with anything but a retryable
    status; an error ends the retrying too.  Time is counted up to the last busy answer,
    which is when a loop would check its clock: a request that was never busy took
    none.  Requests that were cut, given up or settled by another thread are censored:
    they needed more than the busy answers that were seen.

    Curves of a resource, a cause or a maker count only busy answers of that kind, over
    all requests of the leaf: the curve if the other kinds had not occurred.

    Requests of one burst are not independent. An interval is that of an effective number of
    independent requests: their number divided by the design effect, which is the variance
    under resampling of whole episodes over that under resampling of requests (in closed form,
    so nothing is random).

    Args:
        retry_chains: The ``retry_chains`` table; all its sources are taken together, but for the
            curves of TDs: one address in two inputs is two TDs.
        busy_answers: The ``busy_answers`` table of the same chains, or of more.
        busy_causes: The ``busy_causes`` table, or a query of it; None: no curves of causes and
            makers.

    Returns:
        The ``attempts`` table, ordered by its key.

    Raises:
        TableError: If an argument lacks a column or has one of another type.

    Sources:
        E. L. Kaplan, P. Meier, J. Am. Stat. Assoc. 53 (1958) 457: the estimate.
        E. L. Korn, B. I. Graubard, Survey Methodology 24 (1998) 193: exact binomial
        intervals of an effective number of trials.
    """
    chains = RETRY_CHAINS.conform(retry_chains)
    answers = BUSY_ANSWERS.conform(busy_answers)
    requests = _with_busy_counts(chains.filter(pl.col("n_busy") > 0), answers)
    views = [
        _view(requests, "leaf", **_NO_TD),
        _view(requests.filter(pl.col("td_id").is_not_null()), "td"),
        *(
            _view(_with_busy_counts(requests, kinds), by, **_NO_TD)
            for by, kinds in _kinds(answers, busy_causes).items()
        ),
    ]
    retried = pl.concat(views)
    totals = _totals(chains, retried)
    parts = [
        _in_attempts(done_curves(*_with_depth(retried, totals, "attempts"))),
        _in_time(done_curves(*_with_depth(retried, totals, "ns"))),
    ]
    return ATTEMPTS.conform(pl.concat(parts).sort(ATTEMPTS.key))


def _with_busy_counts(requests: pl.DataFrame, answers: pl.DataFrame) -> pl.DataFrame:
    """Requests with the number, greatest delay (ns) and episode of their answers, per kind."""
    by_request = ["source", "first_seq", *(["kind"] if "kind" in answers.columns else [])]
    retried = answers.group_by(by_request).agg(
        n_busy=pl.len().cast(pl.Int64),
        waited_ns=pl.col("waited_ns").max(),
        episode=pl.col("episode").first(),
    )
    of_request = requests.select("source", "leaf", "td_id", "first_seq", "outcome")
    return of_request.join(retried, on=("source", "first_seq"))


def _view(retried: pl.DataFrame, by: str, **changed: pl.Expr) -> pl.DataFrame:
    """Rows of the curves of one view: GROUP, input, episode, n_busy, waited_ns, done."""
    kind = pl.col("kind") if "kind" in retried.columns else pl.lit(None, pl.String)
    return retried.with_columns(
        by=pl.lit(by, pl.Enum(VIEWS)),
        kind=kind,
        done=pl.col("outcome").is_in(_DONE),
        input=pl.col("source"),
        **changed,
    ).select(*GROUP, "input", "episode", "n_busy", "waited_ns", "done")


def _kinds(
    answers: pl.DataFrame, busy_causes: pl.DataFrame | pl.LazyFrame | None
) -> dict[str, pl.DataFrame]:
    """Busy answers with their kind, by view."""
    named = resource(pl.col("status"), pl.col("leaf"))
    kinds = {"resource": answers.with_columns(kind=named).filter(pl.col("kind").is_not_null())}
    if busy_causes is None:
        return kinds
    rows = BUSY_CAUSES.pick(busy_causes, "source", "seq", "rank", "cause")
    first = rows.filter(pl.col("rank") == 1)
    caused = answers.join(
        first.select("source", "seq", cause=pl.col("cause").cast(pl.String)),
        on=("source", "seq"),
        how="left",
    ).with_columns(kind=pl.col("cause").fill_null("unexplained"))
    makers = [
        caused.filter(pl.col("kind").is_in(causes)).with_columns(kind=pl.lit(maker))
        for maker, causes in _MAKERS.items()
    ]
    return kinds | {"cause": caused, "maker": pl.concat(makers)}


def _totals(chains: pl.DataFrame, retried: pl.DataFrame) -> pl.DataFrame:
    """Per curve: all requests, and those that were done without a busy answer of its kind."""
    done = pl.col("outcome").is_in(_DONE)
    of_td = chains.group_by("leaf", "source", "td_id").agg(
        n_requests=pl.len().cast(pl.UInt64), n_done=done.sum().cast(pl.Int64)
    )
    of_leaf = of_td.group_by("leaf").agg(pl.col("n_requests", "n_done").sum())
    whole = pl.concat(
        [
            of_leaf.with_columns(**_NO_TD, by=pl.lit("leaf", pl.Enum(VIEWS))),
            of_td.filter(pl.col("td_id").is_not_null())
            .with_columns(by=pl.lit("td", pl.Enum(VIEWS)))
            .select("leaf", "n_requests", "n_done", "source", "td_id", "by"),
        ]
    ).with_columns(kind=pl.lit(None, pl.String))
    parts = (
        retried.filter(pl.col("kind").is_not_null()).select(GROUP).unique().join(of_leaf, on="leaf")
    )
    seen = retried.group_by(GROUP).agg(n_seen=pl.col("done").sum().cast(pl.Int64))
    return (
        pl.concat(
            [
                whole.select(*GROUP, "n_requests", "n_done"),
                parts.select(*GROUP, "n_requests", "n_done"),
            ]
        )
        .join(seen, on=GROUP, how="left", nulls_equal=True)
        .select(*GROUP, "n_requests", n_done=pl.col("n_done") - pl.col("n_seen").fill_null(0))
    )


def _with_depth(
    retried: pl.DataFrame, totals: pl.DataFrame, unit: str
) -> tuple[pl.DataFrame, pl.DataFrame, int]:
    """Add ``depth``: the last step after which each request is known to need more."""
    if unit == "attempts":
        return retried.with_columns(depth="n_busy"), totals, 0
    waited = retried["waited_ns"].to_numpy()
    depth = np.searchsorted(_TIME_STEPS, waited, "left") - 1
    censored = np.searchsorted(_TIME_STEPS, waited, "right") - 1
    last = np.where(retried["done"].to_numpy(), depth, censored)
    return retried.with_columns(depth=pl.Series(last, dtype=pl.Int64)), totals, -1


def _in_attempts(steps: pl.DataFrame) -> pl.DataFrame:
    return steps.with_columns(unit=pl.lit("attempts", pl.Enum(UNITS)), within="step")


def _in_time(steps: pl.DataFrame) -> pl.DataFrame:
    times = _TIME_STEPS[np.minimum(steps["step"].to_numpy(), len(_TIME_STEPS) - 1)]
    return steps.with_columns(
        unit=pl.lit("ns", pl.Enum(UNITS)), within=pl.Series(times, dtype=pl.Int64)
    )


def done_curves(retried: pl.DataFrame, totals: pl.DataFrame, base: int) -> pl.DataFrame:
    """Return one row per group and step at which requests were done or censored.

    Args:
        retried: One row per request that was not done at once: the columns GROUP, input,
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
    ranked = retried.with_columns(rank=rank.over(*GROUP, "input", "episode").cast(pl.Int64))
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
