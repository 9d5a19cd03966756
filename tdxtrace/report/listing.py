"""Listing of any table on a terminal: addresses in hex, times in seconds, text escaped."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final

import polars as pl
from rich.console import Group, RenderableType
from rich.text import Text

from tdxtrace.report.columns import TextTable, more_rows
from tdxtrace.report.units import count, seconds, short_duration, word
from tdxtrace.tables.names import with_names
from tdxtrace.tables.text import one_line

_HEX: Final = frozenset(
    "td_id|vp_id|gpa|page|status|final_status|ext_err1|ext_err2|rip|info1|info2|intr_info|"
    "error_code|requests|port|value|holder_td_id|holder_vp_id|rcx|rdx|r8|rax".split("|")
)
# Columns that are times of the trace's clock; all other columns in ns are durations.
_POINTS: Final = (
    *("start_ns", "end_ns", "ts_ns", "last_end_ns", "entered_ns", "fault_ns", "left_ns"),
)
# The most important columns, for narrow terminals; the others follow in the table's order.
_FIRST: Final = (
    *(
        "policy",
        "kind",
        "event",
        "verdict",
        "ts_ns",
        "text",
        "message",
        "leaf",
        "resource",
        "cause",
    ),
    *("seq", "first_seq", "outcome", "n_attempts", "holder_leaf", "holder_tid", "lacks"),
    *("rule", "share_ppm", "gpa", "tid", "took_ns", "start_ns"),
    *("within", "done_ratio", "done_low", "done_high", "n_exceeding", "exceeding_low"),
    *("exceeding_high", "calls", "then", "n_vms_killed", "n_warnings", "waited_ns"),
    *("n_refused", "form", "strength", "status", "exit_reason"),
    *("n_events", "n_lines", "detail", "advice", "sentence", "final_status", "ended", "cpu"),
)
_LAST: Final = frozenset({"probe", "last_seq", "settled_seq", "start_cpu", "begin_lost", "rank"})
_ELSEWHERE: Final = "--format csv, a wider terminal, or a pipe"
# Maximum number of characters of a cell, as in csv.
_MAX_CELL: Final = 32_767


def listing(
    rows: pl.DataFrame, limit: int = 0, clocks: Mapping[int, str] | None = None
) -> RenderableType:
    """Return the first rows of a table as text.

    Columns that do not fit the terminal are left out, as are columns that are null in all rows,
    and ``source`` if there is one input.  ``leaf``, ``status`` and ``exit_reason`` are shown by
    name.

    Args:
        rows: Any table of the catalog.
        limit: Maximum number of rows; 0 for all.
        clocks: Name of the clock by source, as in the provenance: times of a wall clock are shown
            as dates, others as seconds.
    """
    if rows.is_empty():
        return Text("no rows")
    # To describe a status takes many expressions: the streaming engine plans them for 0.3 s.
    shown = with_names(rows.head(limit) if limit else rows).collect(engine="in-memory")
    names = [
        name
        for name in shown.columns
        if shown[name].null_count() < shown.height
        and not (name == "source" and (shown["source"] == 0).all())
    ]
    cells = [_cells(name, shown, clocks or {}) for name in names]
    table = TextTable(
        [_title(name, column) for name, column in zip(names, cells, strict=True)],
        right=[
            place
            for place, name in enumerate(names)
            if shown[name].dtype.is_numeric() and name not in _HEX
        ],
        ranks=list(map(_rank, names)),
        texts=[place for place, name in enumerate(names) if shown[name].dtype == pl.String],
        elsewhere=_ELSEWHERE,
    )
    for row in zip(*cells, strict=True):
        table.add_row(*row)
    if limit and rows.height > limit:
        return Group(table, Text(more_rows(rows.height - limit), style="dim"))
    return table


def _rank(name: str) -> int:
    """Return the rank of a column; the smallest rank is the most important."""
    return _FIRST.index(name) if name in _FIRST else len(_FIRST) + (name in _LAST)


def _cells(name: str, rows: pl.DataFrame, clocks: Mapping[int, str]) -> list[str]:
    """Return the cells of a column as text."""
    if name == "ts_ns" and "source" in rows.columns:
        named = zip(rows[name], (clocks.get(source, "") for source in rows["source"]), strict=True)
        return [_date(at, clock) or _cell(name, at) for at, clock in named]
    return [_cell(name, value) for value in rows[name]]


def _date(ts_ns: int | None, clock: str) -> str | None:
    """Return a wall-clock time as a date, with the year if recorded; None for other clocks."""
    if ts_ns is None or not clock.startswith("wall"):
        return None
    at = datetime.fromtimestamp(ts_ns // 1_000_000_000, UTC)
    micros = ts_ns % 1_000_000_000 // 1000
    day = at.strftime("%m-%d" if clock == "wall, no year" else "%Y-%m-%d")
    zone = "Z" if clock == "wall" else ""
    return f"{day} {at:%H:%M:%S}" + (f".{micros:06}" if micros else "") + zone


def _title(name: str, cells: list[str]) -> str:
    """The title of a column: dates are in no unit."""
    if name == "ts_ns" and any(":" in cell for cell in cells):
        return "ts"
    return name.removesuffix("_ns") + ", s" if name in _POINTS else name.removesuffix("_ns")


def _cell(name: str, value: Any) -> str:  # noqa: ANN401 - whatever a table holds
    if value is None:
        return "-"
    if name in _POINTS and isinstance(value, int):
        return seconds(value)
    if name.endswith("_ns") and isinstance(value, int | float):
        return short_duration(round(value))
    if name in _HEX and isinstance(value, int):
        return word(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    counts = isinstance(value, int) and name.startswith("n_")
    return count(value) if counts else one_line(str(value), _MAX_CELL)
