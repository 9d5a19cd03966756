"""Printed forms of table values, which tests look for in the output of commands."""

from __future__ import annotations

import re

from tdxtrace.report.units import duration


def as_shown(name: str, value: object) -> str | None:
    """What must stand for a value of csv, as a pattern; None: it is shown by a name or as a date.

    Args:
        name: The column.
        value: Its value.
    """
    if value is None or isinstance(value, float) or name in ("source", "ts_ns", *_NAMED):
        return None
    if name.endswith("_ns") and isinstance(value, int):
        point = f"{value // 10**9}.{value % 10**9:09}"
        return f"{point}|{re.escape(duration(value).replace(' ', ''))}"
    if isinstance(value, str):
        return re.escape(" ".join(value.split()))
    return f"{value}|{value:,}|{value:#x}" if isinstance(value, int) else None


_NAMED = ("leaf", "holder_leaf", "status", "final_status", "exit_reason", "loader_leaf")


def left_out(text: str) -> set[str]:
    """Names of the columns that a table of this text leaves out for want of width."""
    _, _, notice = " ".join(text.split()).partition("not shown: ")
    return {word.strip() for word in notice.partition(" (")[0].split(",")} - {""}
