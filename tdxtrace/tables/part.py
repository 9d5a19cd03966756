"""Write a time range of a trace into its own store, as if only that range had been recorded."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import polars as pl

from tdxtrace.errors import InputError
from tdxtrace.tables.events import EVENT_TABLES, LOSSES, THREADS
from tdxtrace.tables.schema import Table
from tdxtrace.tables.store import BEGINS, ENDS, GROUP_ROWS, StoreWriter
from tdxtrace.tables.trace import Provenance, Source, Trace, collected


def write_part(
    trace: Trace, folder: Path, since_ns: int | None, until_ns: int | None, *, force: bool = False
) -> None:
    """Write the rows of a trace within a time range into a new store.

    Rows that overlap the range are kept.  If the range begins after the trace does, a row
    ``started_midway`` is added to ``losses``: the first request of each thread is cut there.  Rows
    that are left out are counted in ``losses``.

    Args:
        trace: The trace, in memory or in a store.
        folder: The store to make.
        since_ns: Beginning of the range; None: of the trace.
        until_ns: End of the range; None: of the trace.
        force: Whether to replace an existing store.

    Raises:
        InputError: If no row is within the range, or the folder cannot be written.
    """
    writer = StoreWriter(folder, force)
    n_kept = 0
    left_out = []
    try:
        for table in EVENT_TABLES:
            if table is LOSSES:
                continue
            is_within = _within(_time(table, BEGINS), _time(table, ENDS), since_ns, until_ns)
            left_out.append(_count_rows(trace.scan(table.name).filter(~is_within), table))
            rows = collected(trace.scan(table.name, since_ns, until_ns).filter(is_within))
            n_kept += rows.height if table is not THREADS else 0
            for segment in rows.iter_slices(GROUP_ROWS):
                writer.add(table.name, segment)
        if not n_kept:
            raise InputError("the trace has no event in this time range; change --since or --until")
        writer.add("losses", _losses_of_part(trace, pl.concat(left_out), since_ns, until_ns))
        writer.finish(_provenance_of_part(trace.provenance, since_ns, until_ns), {})
    finally:
        writer.discard()


def _time(table: Table, names: tuple[str, ...]) -> pl.Expr:
    """Expression of the first column of ``names`` that is not null; null if the table has none."""
    known = [name for name in names if name in table.schema]
    return pl.coalesce(known) if known else pl.lit(None, pl.Int64)


def _count_rows(rows: pl.LazyFrame, table: Table) -> pl.DataFrame:
    """Count rows, and the input lines that they were made from, by source."""
    lines = pl.col("n_lines") if "n_lines" in table.schema else pl.lit(1)
    counts = rows.group_by("source").agg(
        n_events=pl.len().cast(pl.UInt64), n_lines=lines.cast(pl.UInt64).sum()
    )
    return collected(counts)


def _within(begins: pl.Expr, ends: pl.Expr, since_ns: int | None, until_ns: int | None) -> pl.Expr:
    """Expression that is true for rows that overlap a time range; a null time counts as within."""
    is_within = pl.lit(True)
    if since_ns is not None:
        is_within &= (ends >= since_ns).fill_null(True)
    if until_ns is not None:
        is_within &= (begins <= until_ns).fill_null(True)
    return is_within


def _losses_of_part(
    trace: Trace, left_out: pl.DataFrame, since_ns: int | None, until_ns: int | None
) -> pl.DataFrame:
    """Return losses that overlap the range, the rows left out, and where requests are cut."""
    overlaps = _within(pl.col("start_ns"), pl.col("end_ns"), since_ns, until_ns)
    rows = [trace.losses.filter(overlaps)]
    empty = LOSSES.empty()
    counts_by_source = left_out.group_by("source", maintain_order=True).agg(
        pl.col("n_events", "n_lines").sum()
    )
    rows.append(
        counts_by_source.with_columns(
            kind=pl.lit("noise", empty.schema["kind"]),
            severity=pl.lit("info", empty.schema["severity"]),
            detail=pl.lit("events outside the time range"),
            advice=pl.lit("none needed; the whole trace contains them"),
        )
    )
    cut_sources = [
        number
        for number, source in enumerate(trace.provenance.sources)
        if since_ns is not None and source.first_ns is not None and source.first_ns < since_ns
    ]
    rows.append(
        pl.DataFrame({"source": pl.Series(cut_sources, dtype=pl.UInt16)}).with_columns(
            kind=pl.lit("started_midway", empty.schema["kind"]),
            severity=pl.lit("data_loss", empty.schema["severity"]),
            end_ns=pl.lit(since_ns, pl.Int64),
            n_events=pl.lit(0, pl.UInt64),
            n_lines=pl.lit(0, pl.UInt64),
            detail=pl.lit("part of a trace"),
            advice=pl.lit("the first request of each thread is cut; take an earlier --since"),
        )
    )
    return LOSSES.conform(pl.concat([empty, *rows], how="diagonal"))


def _provenance_of_part(
    whole: Provenance, since_ns: int | None, until_ns: int | None
) -> Provenance:
    def of(source: Source) -> Source:
        first_ns, last_ns = source.first_ns, source.last_ns
        if first_ns is not None and since_ns is not None:
            first_ns = max(first_ns, since_ns)
        if last_ns is not None and until_ns is not None:
            last_ns = min(last_ns, until_ns)
        return dataclasses.replace(source, first_ns=first_ns, last_ns=last_ns)

    note = "a time range of a trace, as if only it had been recorded"
    return dataclasses.replace(
        whole, sources=tuple(map(of, whole.sources)), notes=(*whole.notes, note)
    )
