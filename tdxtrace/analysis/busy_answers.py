"""Which answers told a request to try again, the how-manieth of it, and how long after it began."""

from __future__ import annotations

from typing import Final

import numpy as np
import polars as pl

from tdxtrace.analysis.episodes import episodes
from tdxtrace.analysis.threads import owner
from tdxtrace.errors import TableError
from tdxtrace.tables.events import SEAMCALLS
from tdxtrace.tables.findings import RETRY_CHAINS
from tdxtrace.tables.limits import BUSY_ANSWERS
from tdxtrace.tdx.status import is_retryable

# In this order the busy answers of a request follow each other: a thread makes one call
# after the other, and a request has all its calls of one leaf before the next has any.
_ORDER: Final = ("source", "owner", "leaf", "begins", "seq")


def busy_answers(seamcalls: pl.DataFrame, retry_chains: pl.DataFrame) -> pl.DataFrame:
    """Give every attempt that was answered busy its place in its request.

    Args:
        seamcalls: The ``seamcalls`` table.
        retry_chains: The ``retry_chains`` table of the same calls, all of it.

    Returns:
        The ``busy_answers`` table, ordered by source and ``seq``.  A chain has as many
        rows as its ``n_busy`` says.

    Raises:
        TableError: If an argument lacks a column, or the two are not of one trace.
    """
    seamcalls, retried = SEAMCALLS.conform(seamcalls), episodes(RETRY_CHAINS.conform(retry_chains))
    busy = (
        seamcalls.lazy()
        .filter(is_retryable(pl.col("status")))
        .select(
            *("source", "seq", "leaf", "status", "end_ns"),
            owner=owner(),
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
    chains = _in_order(retried, busy)
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


def _in_order(chains: pl.DataFrame, busy: pl.DataFrame) -> pl.DataFrame:
    """The chains in the order of their calls, thread after thread; the first was busy."""
    chains = chains.select("source", "first_seq", "leaf", "start_ns", "n_busy", "episode")
    firsts = busy.lazy().select("source", "seq", "owner")
    return (
        chains.lazy()
        .join(firsts, left_on=("source", "first_seq"), right_on=("source", "seq"), how="left")
        .with_columns(begins=pl.col("start_ns"), seq=pl.col("first_seq"))
        .sort(_ORDER)
        .collect()
    )
