"""Which busy requests came in one burst: what happened together tells less than its number."""

from __future__ import annotations

from typing import Final

import polars as pl

_OF_LEAF: Final = ("source", "leaf")


def episodes(retry_chains: pl.DataFrame) -> pl.DataFrame:
    """Put the requests that met busy into episodes.

    An episode is a run of retried requests of one leaf that stand closer together than
    unrelated ones would.  Distance is the number of requests of the leaf from one to
    the next.  How many episodes there are is estimated from the distances themselves
    (the extremal index, by the intervals estimator), and as many are made by cutting
    at the largest distances; so there is no time or number to choose.

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
        _placed(retry_chains)
        .sort(*_OF_LEAF, "first_seq")
        .with_columns(apart=pl.col("place").diff().over(_OF_LEAF))
    )
    index = retried.group_by(_OF_LEAF).agg(n_cuts=_n_episodes(pl.col("apart")) - 1)
    # Equal distances are all cut or none is, whichever comes nearer to the number.
    rank = pl.col("apart").rank("average", descending=True).over(_OF_LEAF)
    return (
        retried.join(index, on=_OF_LEAF, how="left", maintain_order="left")
        .with_columns(cut=(rank <= pl.col("n_cuts") + 0.5).fill_null(False))
        .with_columns(episode=pl.col("cut").cum_sum().over(_OF_LEAF).cast(pl.UInt32))
        .drop("place", "apart", "n_cuts", "cut")
    )


def _placed(chains: pl.DataFrame) -> pl.DataFrame:
    """The retried requests, with the place of each among the requests of its leaf."""
    later = pl.col("first_seq") > pl.col("first_seq").shift()
    later |= pl.col("source") > pl.col("source").shift()
    if not chains.select(later.fill_null(True).all()).item():
        chains = chains.sort("source", "first_seq")
    place = pl.int_range(pl.len(), dtype=pl.Int64).over(_OF_LEAF)
    met = pl.col("n_busy") > 0
    places = chains.select(*_OF_LEAF, "n_busy", place=place).filter(met)["place"]
    return chains.filter(met).with_columns(places)


def _n_episodes(apart: pl.Expr) -> pl.Expr:
    """How many episodes there are, from the distances of one leaf's retried requests."""
    distance = apart.drop_nulls().cast(pl.Float64)
    n = distance.len()
    near = 2 * distance.sum() ** 2 / (n * (distance**2).sum())
    less = distance - 1
    far = 2 * less.sum() ** 2 / (n * (less * (distance - 2)).sum())
    index = (
        pl.when(distance.max() <= 2)
        .then(near)
        .otherwise(far)
        .fill_nan(None)
        .fill_null(1)
        .clip(0, 1)
    )
    return (index * n).floor().cast(pl.Int64) + 1
