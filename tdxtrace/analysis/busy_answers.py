"""The ``busy_answers`` table: ordinal and delay of each retryable status within its request."""

from __future__ import annotations

from typing import Final

import numpy as np
import polars as pl

from tdxtrace.analysis.threads import call_owner
from tdxtrace.errors import TableError
from tdxtrace.tables.events import SEAMCALLS
from tdxtrace.tables.findings import RETRY_CHAINS
from tdxtrace.tables.limits import BUSY_ANSWERS
from tdxtrace.tdx.status import is_retryable

# Sorted so, the busy answers of a request follow each other: a thread makes one call at a
# time, and all calls of one request of a leaf before those of the next.
_ORDER: Final = ("source", "owner", "leaf", "begins", "seq")


def busy_answers(seamcalls: pl.DataFrame, retry_chains: pl.DataFrame) -> pl.DataFrame:
    """Number the retryable answers of each request.

    Args:
        seamcalls: The ``seamcalls`` table.
        retry_chains: The ``retry_chains`` table of the same calls, all of it.

    Returns:
        The ``busy_answers`` table, one row per retryable answer, ordered by source and ``seq``.
        A chain has as many rows as its ``n_busy`` says.

    Raises:
        TableError: If an argument lacks a column, or the two are not of one trace.
    """
    seamcalls, retried = SEAMCALLS.conform(seamcalls), episodes(RETRY_CHAINS.conform(retry_chains))
    busy = (
        seamcalls.lazy()
        .filter(is_retryable(pl.col("status")))
        .select(
            *("source", "seq", "leaf", "status", "end_ns"),
            owner=call_owner(),
            begins=pl.coalesce("start_ns", "end_ns"),
        )
        .sort(_ORDER)
        .collect()
    )
    if retried["n_busy"].sum() != busy.height:
        raise TableError(
            f"retry_chains tells of {retried['n_busy'].sum():,} busy answers, "
            f"seamcalls of {busy.height:,}: they are not of one trace"
        )
    chains = _sort_by_thread(retried, busy)
    n_busy = chains["n_busy"].to_numpy()
    request = chains[np.repeat(np.arange(chains.height), n_busy)]
    before = np.repeat(np.cumsum(n_busy) - n_busy, n_busy)
    answers = busy.with_columns(
        request["first_seq"],
        request["episode"],
        number=pl.Series(np.arange(busy.height) - before + 1, dtype=pl.UInt32),
        waited_ns=busy["end_ns"] - request["start_ns"],
    )
    return BUSY_ANSWERS.conform(answers.sort("source", "seq"))


def _sort_by_thread(chains: pl.DataFrame, busy: pl.DataFrame) -> pl.DataFrame:
    """Chains in the order of their first calls, thread after thread; the first call was busy."""
    chains = chains.select("source", "first_seq", "leaf", "start_ns", "n_busy", "episode")
    firsts = busy.lazy().select("source", "seq", "owner")
    return (
        chains.lazy()
        .join(firsts, left_on=("source", "first_seq"), right_on=("source", "seq"), how="left")
        .with_columns(begins=pl.col("start_ns"), seq=pl.col("first_seq"))
        .sort(_ORDER)
        .collect()
    )


_LEAF_KEY: Final = ("source", "leaf")


def episodes(retry_chains: pl.DataFrame) -> pl.DataFrame:
    """Group the retried requests into episodes (bursts).

    An episode is a run of retried requests of one leaf that stand closer together than
    unrelated ones would.  Distance is the number of requests of the leaf from one to
    the next.  The number of episodes is estimated from the distances themselves (the
    extremal index, by the intervals estimator), and as many are formed by cutting at the
    largest distances; no time or number has to be chosen.

    Args:
        retry_chains: The ``retry_chains`` table.

    Returns:
        The chains with ``n_busy`` above 0 and the column ``episode`` (UInt32), whose
        number is unique within source and leaf.

    Sources:
        C. A. T. Ferro, J. Segers, Inference for clusters of extreme values, J. R.
        Statist. Soc. B 65 (2003) 545-556: the estimator, and cutting at the C - 1
        largest distances where the index times the number gives C.
    """
    retried = (
        _with_ordinal(retry_chains)
        .sort(*_LEAF_KEY, "first_seq")
        .with_columns(distance=pl.col("ordinal").diff().over(_LEAF_KEY))
    )
    index = retried.group_by(_LEAF_KEY).agg(n_cuts=_n_episodes(pl.col("distance")) - 1)
    # Equal distances are all cut or none is, whichever comes nearer to the number.
    rank = pl.col("distance").rank("average", descending=True).over(_LEAF_KEY)
    return (
        retried.join(index, on=_LEAF_KEY, how="left", maintain_order="left")
        .with_columns(cut=(rank <= pl.col("n_cuts") + 0.5).fill_null(False))
        .with_columns(episode=pl.col("cut").cum_sum().over(_LEAF_KEY).cast(pl.UInt32))
        .drop("ordinal", "distance", "n_cuts", "cut")
    )


def _with_ordinal(chains: pl.DataFrame) -> pl.DataFrame:
    """Retried requests, with the ordinal of each among the requests of its leaf."""
    later = pl.col("first_seq") > pl.col("first_seq").shift()
    later |= pl.col("source") > pl.col("source").shift()
    if not chains.select(later.fill_null(True).all()).item():
        chains = chains.sort("source", "first_seq")
    ordinal = pl.int_range(pl.len(), dtype=pl.Int64).over(_LEAF_KEY)
    is_retried = pl.col("n_busy") > 0
    ordinals = chains.select(*_LEAF_KEY, "n_busy", ordinal=ordinal).filter(is_retried)["ordinal"]
    return chains.filter(is_retried).with_columns(ordinals)


def _n_episodes(gaps: pl.Expr) -> pl.Expr:
    """Number of episodes, from the distances of one leaf's retried requests."""
    distance = gaps.drop_nulls().cast(pl.Float64)
    n = distance.len()
    short = 2 * distance.sum() ** 2 / (n * (distance**2).sum())
    less = distance - 1
    long = 2 * less.sum() ** 2 / (n * (less * (distance - 2)).sum())
    index = (
        pl.when(distance.max() <= 2)
        .then(short)
        .otherwise(long)
        .fill_nan(None)
        .fill_null(1)
        .clip(0, 1)
    )
    return (index * n).floor().cast(pl.Int64) + 1
