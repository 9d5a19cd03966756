"""Which requests that their caller gave up were settled by another call."""

from __future__ import annotations

from typing import Final

import polars as pl

from tdxtrace.tables.findings import OUTCOMES
from tdxtrace.tdx import word

_REQUEST: Final = ("source", "td_id", "leaf", "gpa", "level")


def elsewhere(chains: pl.DataFrame) -> pl.DataFrame:
    """Return ``chains`` with the TD filled in and what was settled elsewhere told apart.

    A request that its caller left busy is ``resolved_elsewhere`` if a call outside
    the chain succeeded on the same (td, leaf, gpa, level) after the chain began:
    the page is in the wanted state and the lock's host priority is cleared.  Only
    requests that a page or a TD identifies can be: a vCPU has no second caller.

    Args:
        chains: The ``retry_chains`` table without ``resolved_elsewhere``.

    Returns:
        The same rows in the same order.
    """
    chains = _with_td(chains)
    given_up = chains.filter(
        pl.col("outcome") == "abandoned",
        pl.col("td_id").is_not_null() | pl.col("gpa").is_not_null(),
    )
    if given_up.is_empty():
        return chains
    # Also one whose beginning was lost: its last call is what settles.
    succeeded = (pl.col("outcome") == "succeeded") | (pl.col("final_status") < word.ERROR_BIT)
    done = chains.filter(succeeded).join(
        given_up.select(_REQUEST).unique(), on=_REQUEST, how="semi", nulls_equal=True
    )
    found = _first_after(given_up, done)
    by = _beside(chains, found, ("source", "first_seq"))
    resolved = pl.lit("resolved_elsewhere", pl.Enum(OUTCOMES))
    return chains.with_columns(
        settled_seq=by, outcome=pl.when(by.is_not_null()).then(resolved).otherwise("outcome")
    )


def _beside(chains: pl.DataFrame, found: pl.DataFrame, keys: tuple[str, ...]) -> pl.Series:
    """What was found for each chain by these columns; to join all columns takes much longer."""
    named = chains.select(keys).join(found, on=keys, how="left", maintain_order="left")
    return named.to_series(len(keys))


def _first_after(given_up: pl.DataFrame, done: pl.DataFrame) -> pl.DataFrame:
    """For each chain given up: the first success on its request after it began."""
    left = given_up.select("first_seq", *_REQUEST, when="start_ns").sort("when")
    right = done.select(*_REQUEST, by_seq="last_seq", when="end_ns").sort("when")
    # join_asof takes no null in its keys.
    left, right = (
        f.with_columns(pl.col("td_id", "gpa", "level").fill_null(0)) for f in (left, right)
    )
    joined = left.join_asof(
        right, on="when", by=list(_REQUEST), strategy="forward", check_sortedness=False
    )
    return joined.filter(pl.col("by_seq").is_not_null()).select("source", "first_seq", "by_seq")


def _with_td(chains: pl.DataFrame) -> pl.DataFrame:
    """Fill ``td_id`` where the thread, or else its process, was seen to use one TD only."""
    known = chains.filter(pl.col("td_id").is_not_null())
    if known.height == chains.height or known.is_empty():
        return chains
    for owner in ("tid", "tgid"):
        only = (
            known.filter(pl.col(owner).is_not_null())
            .group_by("source", owner)
            .agg(td=pl.col("td_id").min(), n=pl.col("td_id").n_unique())
            .filter(pl.col("n") == 1)
            .drop("n")
        )
        td = _beside(chains, only, ("source", owner))
        chains = chains.with_columns(td_id=pl.coalesce("td_id", td))
    return chains
