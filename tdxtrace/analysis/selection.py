"""Selection of rows by TD, leaf and time."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import polars as pl

from tdxtrace.errors import QueryError
from tdxtrace.tables.store import BEGINS, ENDS
from tdxtrace.tables.times import parse_moment
from tdxtrace.tables.trace import Trace, collected, starts_ns
from tdxtrace.tdx import leaves

Rows = TypeVar("Rows", pl.DataFrame, pl.LazyFrame)
# Event tables with the column td_id, and event tables whose tgid identifies a VM: the threads of
# vCPUs enter and fault for their VM.
_NAMES_TDS: Final = ("seamcalls",)
_NAMES_VMS: Final = ("seamcalls", "vm_entries", "page_faults")


@dataclass(frozen=True, slots=True)
class Selection:
    """Filter by TD, leaf and time; the default keeps everything."""

    vms: tuple[str, ...] = ()
    """TD addresses (``0x…``) or process numbers."""
    leaves: tuple[str, ...] = ()
    """Leaf names or numbers."""
    since: str | None = None
    """A time on the trace's clock (``4189.25``), or ``+`` and an offset from start (``+10ms``)."""
    until: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that are set."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value}

    def filter(self, rows: Rows, trace: Trace) -> Rows:
        """Return the selected rows of a table of ``trace``, or of a query of such a table.

        A row is selected by time if any part of it lies within the range.  A filter on a column
        that the table does not have (a page fault has no leaf) keeps all rows.

        Raises:
            QueryError: If a TD, leaf or time is not understood, or not in the trace.
        """
        is_selected = self._is_selected(rows.collect_schema().names(), trace)
        return rows.filter(is_selected) if is_selected else rows

    def scan(self, name: str, trace: Trace) -> pl.LazyFrame:
        """Return the selected rows of an event table, as a polars query.

        For a trace in a store, the query reads only the segments in the time range, and only the
        columns it uses.

        Raises:
            QueryError: As :meth:`filter` does.
        """
        since_ns, until_ns = self.times(trace)
        rows = trace.scan(name, since_ns, until_ns)
        is_selected = self._is_selected(rows.collect_schema().names(), trace)
        return rows.filter(is_selected) if is_selected else rows

    def _is_selected(self, columns: Collection[str], trace: Trace) -> list[pl.Expr]:
        """Return the conditions for rows of a table with these columns; all must hold."""
        is_selected = []
        if self.leaves and "leaf" in columns:
            is_selected.append(pl.col("leaf").is_in([_parse_leaf(name) for name in self.leaves]))
        if self.vms and {"td_id", "tgid"} & set(columns):
            is_selected.append(self._is_of_vms(columns, trace))
        if (self.since or self.until) and any(name in columns for name in BEGINS):
            is_selected.append(self._is_in_time(columns, trace))
        return is_selected

    def of_host(self, rows: pl.DataFrame, trace: Trace) -> pl.DataFrame:
        """Return the rows of a table about the host that are in the time range, for any TD or leaf.

        Raises:
            QueryError: If a time is not understood.
        """
        return dataclasses.replace(self, vms=(), leaves=()).filter(rows, trace)

    def filter_trace(self, trace: Trace) -> Trace:
        """Return ``trace`` with the selected rows of its event tables.

        Raises:
            QueryError: As :meth:`filter` does.
        """
        return dataclasses.replace(
            trace,
            seamcalls=collected(self.scan("seamcalls", trace)),
            vm_entries=collected(self.scan("vm_entries", trace)),
            page_faults=collected(self.scan("page_faults", trace)),
            host_events=collected(self.scan("host_events", trace)),
            loader_calls=self.of_host(trace.loader_calls, trace),
        )

    def _is_of_vms(self, columns: Collection[str], trace: Trace) -> pl.Expr:
        is_selected = pl.lit(False)
        for text in self.vms:
            column, number = _resolve_vm(text, trace)
            matches = pl.lit(False)
            unknown = pl.lit(True)
            if column in columns:
                matches, unknown = pl.col(column) == number, pl.col(column).is_null()
            if "tid" in columns:
                threads = _threads_of(column, number, trace)
                here = pl.struct("source", "tid").is_in(threads.to_struct().implode())
                matches |= unknown & here
            is_selected |= matches.fill_null(False)
        return is_selected

    def _is_in_time(self, columns: Collection[str], trace: Trace) -> pl.Expr:
        begins = pl.coalesce(c for c in BEGINS if c in columns)
        ends = pl.coalesce(c for c in ENDS if c in columns)
        since_ns, until_ns = self.times(trace)
        is_selected = pl.lit(True)
        if since_ns is not None:
            is_selected &= (ends >= since_ns).fill_null(True)
        if until_ns is not None:
            is_selected &= (begins <= until_ns).fill_null(True)
        return is_selected

    def times(self, trace: Trace) -> tuple[int | None, int | None]:
        """Return the first and last ns of the selected time; None for an open end.

        Raises:
            QueryError: If a time is not understood.
        """
        first = min(starts_ns(trace.provenance.sources), default=0)
        since_ns = parse_moment(self.since, first) if self.since else None
        return since_ns, parse_moment(self.until, first) if self.until else None


def _parse_leaf(name: str) -> int:
    try:
        return leaves.parse_leaf(name)[0]
    except ValueError as error:
        raise QueryError(str(error)) from None


def _resolve_vm(text: str, trace: Trace) -> tuple[str, int]:
    """Return the column and number that identify a VM: a TD's address or its process."""
    tds = _values("td_id", trace, _NAMES_TDS)
    processes = _values("tgid", trace, _NAMES_VMS)
    try:
        number = int(text, 0) if text.isdecimal() or text.startswith("0x") else int(text, 16)
    except ValueError:
        raise QueryError(f"not a VM: {text!r}; name a TD such as 0x… or a process number") from None
    if number in processes and not text.startswith("0x"):
        return "tgid", number
    if number in tds:
        return "td_id", number
    known = [f"{td:#x}" for td in sorted(tds)] + [str(tgid) for tgid in sorted(processes)]
    nearest = difflib.get_close_matches(text, known, n=1, cutoff=0) or ["none"]
    raise QueryError(f"no VM {text} in the trace; nearest: {nearest[0]} (of {len(known)})")


def _threads_of(column: str, number: int, trace: Trace) -> pl.DataFrame:
    """Return the threads (source and tid) with rows for the VM."""
    return pl.concat(
        collected(
            trace.scan(table)
            .filter(pl.col(column) == number, pl.col("tid").is_not_null())
            .select("source", "tid")
            .unique()
        )
        for table in (_NAMES_TDS if column == "td_id" else _NAMES_VMS)
    ).unique()


def _values(column: str, trace: Trace, tables: Iterable[str]) -> set[int]:
    """Return the distinct values of a column in event tables."""
    found = (
        collected(trace.scan(table).select(pl.col(column).drop_nulls().unique()))
        for table in tables
    )
    return {value for values in found for value in values.to_series()}
