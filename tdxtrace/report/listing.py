"""Listing of any table on a terminal: words in hex, times in seconds, text escaped."""

from __future__ import annotations

from typing import Any, Final

import polars as pl
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tdxtrace.report.units import count, plural, seconds, short_duration, word
from tdxtrace.tables.text import one_line
from tdxtrace.tdx.exit_reasons import exit_reason_name
from tdxtrace.tdx.leaves import leaf_name
from tdxtrace.tdx.status import describe_status

_HEX: Final = frozenset(
    "td_id|vp_id|gpa|page|status|final_status|ext_err1|ext_err2|rip|info1|info2|intr_info|"
    "error_code|requests|holder_td_id|holder_vp_id".split("|")
)
_POINTS: Final = ("start_ns", "end_ns", "ts_ns", "last_end_ns", "entered_ns")
# Columns by priority, for terminals too narrow for all; the others follow in the table's order.
_FIRST: Final = (
    *("policy", "kind", "event", "leaf", "resource", "cause"),
    *("holder_leaf", "holder_tid", "lacks", "rule", "share_ppm"),
    *("gpa", "tid", "seq", "first_seq", "start_ns", "ts_ns", "took_ns"),
    *("within", "done_ratio", "done_low", "done_high", "n_exceeding", "exceeding_low"),
    *("exceeding_high", "calls", "then", "n_vms_killed", "n_warnings", "waited_ns"),
    *("n_attempts", "n_refused", "outcome", "form", "strength", "status", "exit_reason"),
    *("n_events", "n_lines", "detail", "advice", "final_status", "ended", "cpu"),
)
_LEFT_OUT: Final = frozenset({"probe", "last_seq", "settled_seq", "start_cpu"})
_BLANK: Final = 1


def listing(rows: pl.DataFrame, limit: int = 0, width: int = 80) -> RenderableType:
    """Return the first rows of a table, formatted for a terminal.

    Columns that are null in all rows, ``source`` if there is one input, and columns that do
    not fit are left out; ``leaf``, ``status`` and ``exit_reason`` are shown by name.

    Args:
        rows: Any table of the catalog.
        limit: Maximum number of rows; 0 for all.
        width: Columns of the terminal.
    """
    if rows.is_empty():
        return Text("no rows")
    shown = _named(rows.head(limit) if limit else rows)
    cells = {
        name: [_cell(name, value) for value in shown[name]]
        for name in shown.columns
        if name not in _LEFT_OUT
        and shown[name].null_count() < shown.height
        and not (name == "source" and (shown["source"] == 0).all())
    }
    columns, left_out = _fitting_columns(cells, width)
    table = Table(box=None, pad_edge=False, padding=(0, _BLANK, 0, 0), header_style="bold")
    for name in columns:
        right = shown[name].dtype.is_numeric() and name not in _HEX
        table.add_column(Text(_title(name)), justify="right" if right else "left", overflow="fold")
    for row in zip(*(cells[name] for name in columns), strict=True):
        table.add_row(*map(Text, row))
    notes = []
    if limit and rows.height > limit:
        notes.append(f"{plural(rows.height - limit, 'more row')} (--limit 0)")
    if left_out:
        notes.append(f"{plural(left_out, 'more column')} (--format csv, or a wider terminal)")
    return Group(table, *([Text("… " + ", ".join(notes), style="dim")] if notes else []))


def _fitting_columns(cells: dict[str, list[str]], width: int) -> tuple[list[str], int]:
    """Return the columns that fit, by priority, in table order; and the number left out."""
    ranked = sorted(cells, key=lambda name: _FIRST.index(name) if name in _FIRST else len(_FIRST))
    chosen: list[str] = []
    used = 0
    for name in ranked:
        needs = max(len(_title(name)), *map(len, cells[name])) + _BLANK
        if chosen and used + needs > width + _BLANK:
            continue
        chosen.append(name)
        used += needs
    return [name for name in cells if name in chosen], len(cells) - len(chosen)


def _named(rows: pl.DataFrame) -> pl.DataFrame:
    """Replace numbers by names in columns with the declared type (an SQL result may differ)."""
    has_leaf = rows.schema.get("leaf") == pl.UInt16
    expressions = [
        describe_status(pl.col(status), pl.col("leaf")).alias(status)
        for status in ("status", "final_status")
        if rows.schema.get(status) == pl.UInt64 and has_leaf
    ]
    for leaf in ("leaf", "holder_leaf"):
        if rows.schema.get(leaf) == pl.UInt16:
            text = pl.col(leaf).cast(pl.String)
            expressions.append(pl.coalesce(leaf_name(pl.col(leaf)), text).alias(leaf))
    if rows.schema.get("exit_reason") == pl.UInt32:
        expressions.append(exit_reason_name(pl.col("exit_reason")).alias("exit_reason"))
    return rows.with_columns(expressions)


def _title(name: str) -> str:
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
    return count(value) if counts else one_line(str(value), 60)
