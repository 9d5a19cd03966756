"""The ``busy_answers`` table: ordinal and delay of each retryable status within its request."""

from __future__ import annotations

from typing import Final

import numpy as np
import polars as pl

from tdxtrace.analysis.lookup import find_rows, in_order
from tdxtrace.analysis.loops.bursts import count_moments
from tdxtrace.analysis.retry_chains import number_answers
from tdxtrace.compiler import choose
from tdxtrace.errors import TableError
from tdxtrace.tables.events import SEAMCALLS
from tdxtrace.tables.findings import RETRY_CHAINS
from tdxtrace.tables.limits import BUSY_ANSWERS
from tdxtrace.tdx.status import is_retryable


def busy_answers(seamcalls: pl.DataFrame, retry_chains: pl.DataFrame) -> pl.DataFrame:
    """Number the retryable answers of each request.

    Args:
        seamcalls: The ``seamcalls`` table.
        retry_chains: The ``retry_chains`` table of the same calls, all of it.

    Returns:
        The ``busy_answers`` table, one row per retryable answer, ordered by source and ``seq``.
        Each chain has ``n_busy`` rows.

    Raises:
        TableError: If an argument lacks a column, or the two tables are from different traces.
    """
    seamcalls, chains = SEAMCALLS.conform(seamcalls), RETRY_CHAINS.conform(retry_chains)
    retryable = seamcalls.filter(is_retryable(pl.col("status")))
    retried = chains.filter(pl.col("n_busy") > 0)
    found, n_busy = number_answers(retryable, retried), int(retried["n_busy"].sum())
    if not found.height == n_busy == retryable.height:
        raise TableError(
            f"retry_chains counts {n_busy:,} busy answers, seamcalls has {retryable.height:,}, of "
            f"which {found.height:,} belong to these chains: the tables are from different traces"
        )
    return with_episodes(found, chains)


def with_episodes(answers: pl.DataFrame, retry_chains: pl.DataFrame) -> pl.DataFrame:
    """Return the ``busy_answers`` table of all chains.

    Args:
        answers: Rows of the table without episodes, in any order, as returned by
            :func:`~tdxtrace.analysis.retry_chains.take_answers`.
        retry_chains: The ``retry_chains`` table.
    """
    return add_episodes(in_order(answers, "seq"), episodes_in_order(retry_chains))


def episodes_in_order(retry_chains: pl.DataFrame) -> pl.DataFrame:
    """Return source, first_seq and episode of retried requests, by source and first_seq."""
    of_chain = episodes(retry_chains.select(EPISODE_COLUMNS))
    return in_order(of_chain.select("source", "first_seq", "episode"), "first_seq")


def add_episodes(answers: pl.DataFrame, of_chain: pl.DataFrame) -> pl.DataFrame:
    """Return rows of the ``busy_answers`` table with their episodes.

    Args:
        answers: The rows without episodes.
        of_chain: The requests of the answers, as returned by :func:`episodes_in_order`.
    """
    keys = ("source", "first_seq")
    row = find_rows(answers.select(keys), of_chain.select(keys))
    return BUSY_ANSWERS.conform(answers.with_columns(of_chain["episode"][row]))


_LEAF_KEY: Final = ("source", "leaf")
# Error factor of the number of bursts as estimated from distances, for about ten bursts.
MUCH_LARGER: Final = 1.5
# Bytes that the loop reads for each request; decides whether it is compiled.
_BYTES_PER_REQUEST: Final = 25


EPISODE_COLUMNS: Final = ("source", "leaf", "first_seq", "n_busy", "td_id", "start_ns", "end_ns")
"""Columns of ``retry_chains`` from which episodes are computed."""


def episodes(retry_chains: pl.DataFrame) -> pl.DataFrame:
    """Group the retried requests into episodes (bursts).

    Requests of one leaf are grouped by two criteria.  The first is used, unless the second yields
    much larger bursts, averaged over all requests:

    - The requests were busy at the same moment with the same TD, like requests that wait for one
      lock holder.  Requests that overlap in a sequence, but not all at one moment, form several
      bursts.
    - The requests are closer together than unrelated requests would be.  Distance is the number of
      requests of the leaf from one to the next.  The number of bursts is estimated from the
      distances themselves (the extremal index, by the intervals estimator), and that many bursts
      are formed by cutting at the largest distances; no time or number has to be chosen.

    Args:
        retry_chains: The ``retry_chains`` table, or EPISODE_COLUMNS of it.

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
    # Equal distances are either all cut or all kept, whichever is closer to the number.
    rank = pl.col("distance").rank("average", descending=True).over(_LEAF_KEY)
    spaced = (
        retried.join(index, on=_LEAF_KEY, how="left", maintain_order="left")
        .with_columns(cut=(rank <= pl.col("n_cuts") + 0.5).fill_null(False))
        .select(number=pl.col("cut").cum_sum().over(_LEAF_KEY))
        .to_series()
    )
    keyed = retried.with_columns(spaced=spaced, met=_moments(retried))
    by_moment, by_distance = (
        pl.len().over(*_LEAF_KEY, criterion).sum().over(_LEAF_KEY)
        for criterion in ("met", "spaced")
    )
    episode = pl.when(by_distance > MUCH_LARGER * by_moment).then("spaced").otherwise("met")
    # Number from 0 in each input, independently of the other inputs.
    keyed = keyed.with_columns(episode=episode)
    number = pl.col("episode").rank("dense").over(_LEAF_KEY).cast(pl.UInt32) - 1
    return keyed.with_columns(episode=number).drop("ordinal", "distance", "spaced", "met")


def _moments(retried: pl.DataFrame) -> pl.Series:
    """Return the number of the moment when each request was busy with others of its leaf and TD.

    The number of moments is minimal: each moment is the earliest end of its requests.
    """
    rows = retried.select(*_LEAF_KEY, "td_id", "start_ns", "end_ns").with_row_index("place")
    rows = rows.sort(*_LEAF_KEY, "td_id", "start_ns", nulls_last=True)
    start = rows["start_ns"].to_numpy()
    end = rows["end_ns"].fill_null(rows["start_ns"]).to_numpy()
    key = ("source", "leaf", "td_id")
    changes = [pl.col(name).ne_missing(pl.col(name).shift()) for name in key]
    begins = rows.select(pl.any_horizontal(changes)).to_series().to_numpy()
    moment = np.zeros(rows.height, np.int64)
    choose(rows.height * _BYTES_PER_REQUEST)(count_moments)(start, end, begins, moment)
    return rows.select("place", met=pl.Series(moment)).sort("place")["met"]


def _with_ordinal(chains: pl.DataFrame) -> pl.DataFrame:
    """Return the retried requests, with the ordinal of each among the requests of its leaf."""
    chains = in_order(chains, "first_seq")
    ordinal = pl.int_range(pl.len(), dtype=pl.Int64).over(_LEAF_KEY)
    is_retried = pl.col("n_busy") > 0
    ordinals = chains.select(*_LEAF_KEY, "n_busy", ordinal=ordinal).filter(is_retried)["ordinal"]
    return chains.filter(is_retried).with_columns(ordinals)


def _n_episodes(gaps: pl.Expr) -> pl.Expr:
    """Estimate the number of episodes from the distances between one leaf's retried requests."""
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
