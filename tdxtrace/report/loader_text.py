"""Sentences about calls of the P-SEAMLDR, which loads and updates the TDX module."""

from __future__ import annotations

from typing import Any

import polars as pl

from tdxtrace.report.units import plural, seconds, short_duration
from tdxtrace.tdx.loader import loader_leaf_name, loader_status_name


def loader_sentences(calls: pl.DataFrame) -> list[str]:
    """Return one sentence per leaf and input: number of calls and CPUs, duration, start.

    Args:
        calls: The ``loader_calls`` table.
    """
    named = calls.with_columns(
        name=loader_leaf_name(pl.col("loader_leaf")),
        took_ns=pl.col("end_ns") - pl.col("start_ns"),
        at_ns=pl.coalesce("start_ns", "end_ns"),
        answer=loader_status_name(pl.col("status")).fill_null("of an unknown status"),
    )
    rows = named.group_by("source", "name", maintain_order=True).agg(
        pl.col("cpu").n_unique(),
        pl.col("took_ns").max(),
        pl.col("at_ns").min(),
        pl.len().alias("n"),
        (pl.col("status") != 0).sum().alias("n_failed"),
        pl.col("answer").filter(pl.col("status") != 0).first(),
    )
    return [_sentence(row) for row in rows.iter_rows(named=True)]


def _sentence(row: dict[str, Any]) -> str:
    took = "" if row["took_ns"] is None else f", each for up to {short_duration(row['took_ns'])}"
    failed = ""
    if row["n_failed"]:
        failed = f"; {row['n_failed']} of {row['n']} answers no success, first {row['answer']}"
    return (
        f"{plural(row['n'], 'call')} of {row['name']} kept {plural(row['cpu'], 'CPU')}{took}, "
        f"from {seconds(row['at_ns'])} s{failed}"
    )
