"""The attempts curve: what share of requests is done within n attempts, or so much time."""

from __future__ import annotations

from typing import Final

import numpy as np
import polars as pl

from tdxtrace.analysis.survival import GROUP, curves
from tdxtrace.tables.causes import BUSY_CAUSES
from tdxtrace.tables.findings import RETRY_CHAINS
from tdxtrace.tables.limits import ATTEMPTS, BUSY_ANSWERS, TIMES_NS, UNITS, VIEWS
from tdxtrace.tdx.operands import resource

# Answers of the module that end a request: no more of them would have been needed.
_DONE: Final = ("succeeded", "failed")

# Who a loop could keep out by a lock of the host.  An armed TDH.VP.ENTER is the host's
# call but no such lock is held over it, and what arms it is the guest (P. Bonzini,
# 2024-09-10: the lock goes around the memory SEAMCALLs, the zero-step answer is another
# matter).  What nobody can explain may be either's: it counts for both.
_MAKERS: Final = {
    "host": ("host_conflict", "kernel_bug", "unexplained"),
    "guest": ("guest", "armed_entry", "unexplained"),
}

_TIMES: Final = np.array(TIMES_NS, np.int64)


def attempts(
    retry_chains: pl.DataFrame,
    busy_answers: pl.DataFrame,
    busy_causes: pl.DataFrame | None = None,
) -> pl.DataFrame:
    """Say what share of requests is done within n attempts, and within t ns of retrying.

    A request is done at the attempt that was answered with anything but a retryable
    status; an error ends the retrying too.  Time is counted up to the last busy answer,
    which is when a loop would look at its clock: a request that was never busy took
    none.  Requests that were cut, given up or settled by another thread are censored:
    they needed more than the busy answers that were seen.

    Curves of a resource, a cause or a maker count only busy answers of that kind, over
    all requests of the leaf: what would have been met had the others not been there.

    Requests of one burst are not independent. An interval is that of as many independent
    requests as tell as much: their number divided by the design effect, which is the
    variance found by resampling whole episodes over that found by resampling requests.
    (Resampled infinitely often, which has a closed form: there is no chance in it.)

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
    requests = _met(chains.filter(pl.col("n_busy") > 0), answers)
    views = [
        _view(requests, "leaf", td_id=pl.lit(None, pl.UInt64)),
        _view(requests.filter(pl.col("td_id").is_not_null()), "td"),
        *(
            _view(_met(requests, kinds), by, td_id=pl.lit(None, pl.UInt64))
            for by, kinds in _kinds(answers, busy_causes).items()
        ),
    ]
    met = pl.concat(views)
    totals = _totals(chains, met)
    parts = [
        _in_attempts(curves(*_steps(met, totals, "attempts"))),
        _in_time(curves(*_steps(met, totals, "ns"))),
    ]
    return ATTEMPTS.conform(pl.concat(parts).sort(ATTEMPTS.key))


def _met(requests: pl.DataFrame, answers: pl.DataFrame) -> pl.DataFrame:
    """The requests with how many of these answers each met (of each kind), and how late."""
    by_request = ["source", "first_seq", *(["kind"] if "kind" in answers.columns else [])]
    met = answers.group_by(by_request).agg(
        n_met=pl.len().cast(pl.Int64),
        waited_ns=pl.col("waited_ns").max(),
        episode=pl.col("episode").first(),
    )
    of_request = requests.select("source", "leaf", "td_id", "first_seq", "outcome")
    return of_request.join(met, on=("source", "first_seq"))


def _view(met: pl.DataFrame, by: str, **changed: pl.Expr) -> pl.DataFrame:
    """Rows of one kind of curve."""
    kind = pl.col("kind") if "kind" in met.columns else pl.lit(None, pl.String)
    return met.with_columns(
        by=pl.lit(by, pl.Enum(VIEWS)), kind=kind, done=pl.col("outcome").is_in(_DONE), **changed
    ).select(*GROUP, "source", "episode", "n_met", "waited_ns", "done")


def _kinds(answers: pl.DataFrame, busy_causes: pl.DataFrame | None) -> dict[str, pl.DataFrame]:
    """The busy answers with their kind, for each way to sort them."""
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


def _totals(chains: pl.DataFrame, met: pl.DataFrame) -> pl.DataFrame:
    """For every curve: requests in all, and those that were done without meeting its kind."""
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
    parts = met.filter(pl.col("kind").is_not_null()).select(GROUP).unique().join(of_leaf, on="leaf")
    seen = met.group_by(GROUP).agg(n_seen=pl.col("done").sum().cast(pl.Int64))
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


def _steps(
    met: pl.DataFrame, totals: pl.DataFrame, unit: str
) -> tuple[pl.DataFrame, pl.DataFrame, int]:
    """The same with the last step up to which each request is known to need more."""
    if unit == "attempts":
        return met.with_columns(depth="n_met"), totals, 0
    waited = met["waited_ns"].to_numpy()
    depth = np.searchsorted(_TIMES, waited, "left") - 1
    censored = np.searchsorted(_TIMES, waited, "right") - 1
    last = np.where(met["done"].to_numpy(), depth, censored)
    return met.with_columns(depth=pl.Series(last, dtype=pl.Int64)), totals, -1


def _in_attempts(steps: pl.DataFrame) -> pl.DataFrame:
    return steps.with_columns(unit=pl.lit("attempts", pl.Enum(UNITS)), within="step")


def _in_time(steps: pl.DataFrame) -> pl.DataFrame:
    times = _TIMES[np.minimum(steps["step"].to_numpy(), len(_TIMES) - 1)]
    return steps.with_columns(
        unit=pl.lit("ns", pl.Enum(UNITS)), within=pl.Series(times, dtype=pl.Int64)
    )
