"""Which TD a thread worked for, where a row does not say."""

from __future__ import annotations

import polars as pl


def with_td(rows: pl.DataFrame, known: pl.DataFrame) -> pl.DataFrame:
    """Fill ``td_id`` where it is null: the only TD of the thread, its process, or the input.

    Args:
        rows: Rows with source, tid, tgid and td_id.
        known: Rows of the same trace that name TDs: the same columns.

    Returns:
        The rows in their order; null stays where more than one TD, or none, comes into question.
    """
    if not rows["td_id"].null_count():
        return rows
    named = known.select("source", "tid", "tgid", "td_id").filter(pl.col("td_id").is_not_null())
    named = named.unique()
    for keys in (["source", "tid"], ["source", "tgid"], ["source"]):
        only = (
            named.drop_nulls(keys)
            .group_by(keys)
            .agg(td=pl.col("td_id").min(), n=pl.col("td_id").n_unique())
            .filter(pl.col("n") == 1)
            .drop("n")
        )
        rows = rows.join(only, on=keys, how="left", maintain_order="left")
        rows = rows.with_columns(td_id=pl.coalesce("td_id", "td")).drop("td")
    return rows
