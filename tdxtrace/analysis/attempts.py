"""The ``attempts`` table: share of requests done within n attempts, or within a time."""

from __future__ import annotations

from typing import Final

import numpy as np
import polars as pl

from tdxtrace.analysis.survival import GROUP, done_curves
from tdxtrace.tables.causes import BUSY_CAUSES
from tdxtrace.tables.findings import RETRY_CHAINS
from tdxtrace.tables.limits import ATTEMPTS, BUSY_ANSWERS, TIMES_NS, UNITS, VIEWS
from tdxtrace.tdx.operands import resource

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

_TIME_STEPS: Final = np.array(TIMES_NS, np.int64)


def attempts(
    retry_chains: pl.DataFrame,
    busy_answers: pl.DataFrame,
    busy_causes: pl.DataFrame | None = None,
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
        retry_chains: The ``retry_chains`` table; all its sources are taken together.
        busy_answers: The ``busy_answers`` table of the same chains, or of more.
        busy_causes: The ``busy_causes`` table; None: no curves of causes and makers.

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
        _view(requests, "leaf", td_id=pl.lit(None, pl.UInt64)),
        _view(requests.filter(pl.col("td_id").is_not_null()), "td"),
        *(
            _view(_with_busy_counts(requests, kinds), by, td_id=pl.lit(None, pl.UInt64))
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
    """Rows of the curves of one view: GROUP, source, episode, n_busy, waited_ns, done."""
    kind = pl.col("kind") if "kind" in retried.columns else pl.lit(None, pl.String)
    return retried.with_columns(
        by=pl.lit(by, pl.Enum(VIEWS)), kind=kind, done=pl.col("outcome").is_in(_DONE), **changed
    ).select(*GROUP, "source", "episode", "n_busy", "waited_ns", "done")


def _kinds(answers: pl.DataFrame, busy_causes: pl.DataFrame | None) -> dict[str, pl.DataFrame]:
    """Busy answers with their kind, by view."""
    named = resource(pl.col("status"), pl.col("leaf"))
    kinds = {"resource": answers.with_columns(kind=named).filter(pl.col("kind").is_not_null())}
    if busy_causes is None:
        return kinds
    first = BUSY_CAUSES.conform(busy_causes).filter(pl.col("rank") == 1)
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
    of_td = chains.group_by("leaf", "td_id").agg(
        n_requests=pl.len().cast(pl.UInt64), n_done=done.sum().cast(pl.Int64)
    )
    of_leaf = of_td.group_by("leaf").agg(pl.col("n_requests", "n_done").sum())
    none = pl.lit(None, pl.UInt64)
    whole = pl.concat(
        [
            of_leaf.with_columns(td_id=none, by=pl.lit("leaf", pl.Enum(VIEWS))),
            of_td.filter(pl.col("td_id").is_not_null())
            .with_columns(by=pl.lit("td", pl.Enum(VIEWS)))
            .select("leaf", "n_requests", "n_done", "td_id", "by"),
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
