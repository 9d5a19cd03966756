"""Selection of rows by TD, leaf and time."""

from __future__ import annotations

import dataclasses
import difflib
import re
from dataclasses import dataclass
from typing import Any, Final

import polars as pl

from tdxtrace.errors import QueryError
from tdxtrace.tables.trace import Trace, starts_ns
from tdxtrace.tdx import leaves

_SECONDS: Final = re.compile(r"^(?P<sign>[+]?)(?P<whole>\d+)(?:\.(?P<part>\d{1,9}))?s?$")
_BEGINS: Final = ("start_ns", "ts_ns", "end_ns")
_ENDS: Final = ("end_ns", "ts_ns", "start_ns")


@dataclass(frozen=True, slots=True)
class Selection:
    """Filter by TD, leaf and time; the default keeps everything."""

    vms: tuple[str, ...] = ()
    """TD addresses (``0x…``) or process numbers."""
    leaves: tuple[str, ...] = ()
    """Leaf names or numbers."""
    since: str | None = None
    """Seconds on the trace's clock, or ``+SECONDS`` from its start."""
    until: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that are set."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value}

    def filter(self, rows: pl.DataFrame, trace: Trace) -> pl.DataFrame:
        """Return the selected rows of a table of ``trace``.

        A row is within the time if any part of it is.  A filter on a column that
        the table does not have (a page fault has no leaf) keeps its rows.

        Raises:
            QueryError: If a TD, leaf or time is not understood, or not in the trace.
        """
        kept = rows
        if self.leaves and "leaf" in rows.columns:
            kept = kept.filter(pl.col("leaf").is_in([_parse_leaf(name) for name in self.leaves]))
        if self.vms and {"td_id", "tgid"} & set(rows.columns):
            kept = kept.filter(self._is_of_vms(rows, trace))
        has_time = any(name in rows.columns for name in _BEGINS)
        timed = has_time and (self.since or self.until)
        return kept.filter(self._is_in_time(rows, trace)) if timed else kept

    def filter_trace(self, trace: Trace) -> Trace:
        """Return ``trace`` with the selected rows of its event tables.

        Raises:
            QueryError: As :meth:`filter` does.
        """
        return dataclasses.replace(
            trace,
            seamcalls=self.filter(trace.seamcalls, trace),
            vm_entries=self.filter(trace.vm_entries, trace),
            page_faults=self.filter(trace.page_faults, trace),
            host_events=self.filter(trace.host_events, trace),
        )

    def _is_of_vms(self, rows: pl.DataFrame, trace: Trace) -> pl.Expr:
        kept = pl.lit(False)
        for text in self.vms:
            column, number = _resolve_vm(text, trace)
            matches = pl.lit(False)
            unknown = pl.lit(True)
            if column in rows.columns:
                matches, unknown = pl.col(column) == number, pl.col(column).is_null()
            if "tid" in rows.columns:
                threads = _threads_of(column, number, trace)
                here = pl.struct("source", "tid").is_in(threads.to_struct().implode())
                matches |= unknown & here
            kept |= matches.fill_null(False)
        return kept

    def _is_in_time(self, rows: pl.DataFrame, trace: Trace) -> pl.Expr:
        begins = pl.coalesce(c for c in _BEGINS if c in rows.columns)
        ends = pl.coalesce(c for c in _ENDS if c in rows.columns)
        first = min(starts_ns(trace.provenance.sources), default=0)
        kept = pl.lit(True)
        if self.since:
            kept &= (ends >= nanoseconds(self.since, first)).fill_null(True)
        if self.until:
            kept &= (begins <= nanoseconds(self.until, first)).fill_null(True)
        return kept


def nanoseconds(text: str, start_ns: int) -> int:
    """Parse a time: seconds, or ``+seconds`` from ``start_ns``.

    Returns:
        The time in ns.

    Raises:
        QueryError: If it is neither.

    Example:
        >>> nanoseconds("+0.5", 4_189_000_000_000)
        4189500000000
    """
    found = _SECONDS.match(text.strip())
    if found is None:
        raise QueryError(f"not a time: {text!r}; write seconds such as 4189.25, or +0.5 from start")
    value = int(found["whole"]) * 1_000_000_000 + int((found["part"] or "").ljust(9, "0"))
    return value + (start_ns if found["sign"] else 0)


def _parse_leaf(name: str) -> int:
    try:
        return leaves.parse_leaf(name)[0]
    except ValueError as error:
        raise QueryError(str(error)) from None


def _resolve_vm(text: str, trace: Trace) -> tuple[str, int]:
    """Column and number that identify a VM: a TD's address or its process."""
    tds = trace.seamcalls["td_id"].drop_nulls().unique()
    tables = (trace.seamcalls, trace.vm_entries, trace.page_faults)
    processes = {tgid for table in tables for tgid in table["tgid"].drop_nulls().unique()}
    try:
        number = int(text, 0)
    except ValueError:
        raise QueryError(f"not a VM: {text!r}; name a TD such as 0x… or a process number") from None
    if number in processes and not text.startswith("0x"):
        return "tgid", number
    if number in tds:
        return "td_id", number
    known = [f"{td:#x}" for td in tds] + [str(tgid) for tgid in sorted(processes)]
    near = difflib.get_close_matches(text, known, n=1, cutoff=0) or ["none"]
    raise QueryError(f"no VM {text} in the trace; nearest: {near[0]} (of {len(known)})")


def _threads_of(column: str, number: int, trace: Trace) -> pl.DataFrame:
    """Threads (source and tid) that were seen to work for the VM."""
    tables = (trace.seamcalls, trace.vm_entries, trace.page_faults)
    return pl.concat(
        table.filter(pl.col(column) == number, pl.col("tid").is_not_null()).select("source", "tid")
        for table in tables
        if column in table.columns
    ).unique()
