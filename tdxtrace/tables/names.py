"""Replace numbers of leaves, statuses and exit reasons by their names."""

from __future__ import annotations

from typing import Final

import polars as pl

from tdxtrace.tdx.exit_reasons import exit_reason_name
from tdxtrace.tdx.leaves import leaf_name
from tdxtrace.tdx.loader import loader_leaf_name, loader_status_name
from tdxtrace.tdx.status import describe_status

_LEAVES: Final = ("leaf", "holder_leaf", "effect_leaf")
_STATUSES: Final = ("status", "final_status")


def with_names(rows: pl.DataFrame | pl.LazyFrame) -> pl.LazyFrame:
    """Return rows with names instead of numbers of leaves, statuses and exit reasons.

    Args:
        rows: Any table, or a query of one.  Columns that do not have the declared type, as in the
            result of an SQL statement, stay as they are.

    Returns:
        A query of the rows with ``leaf``, ``status``, ``exit_reason`` and the like as text; a leaf
        without a name is its number, as text.
    """
    found = rows.lazy()
    schema = found.collect_schema()
    has_leaf = schema.get("leaf") == pl.UInt16
    expressions = [
        describe_status(pl.col(status), pl.col("leaf")).alias(status)
        for status in _STATUSES
        if schema.get(status) == pl.UInt64 and has_leaf
    ]
    for leaf in _LEAVES:
        if schema.get(leaf) == pl.UInt16:
            text = pl.col(leaf).cast(pl.String)
            expressions.append(pl.coalesce(leaf_name(pl.col(leaf)), text).alias(leaf))
    if schema.get("loader_leaf") == pl.UInt16:
        expressions.append(loader_leaf_name(pl.col("loader_leaf")).alias("loader_leaf"))
        if schema.get("status") == pl.UInt64:
            name, raw = loader_status_name(pl.col("status")), pl.col("status").cast(pl.String)
            expressions.append(pl.coalesce(name, raw).alias("status"))
    if schema.get("exit_reason") == pl.UInt32:
        expressions.append(exit_reason_name(pl.col("exit_reason")).alias("exit_reason"))
    return found.with_columns(expressions)
