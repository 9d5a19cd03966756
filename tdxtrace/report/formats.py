"""Formats that a report can be written in."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Final

from tdxtrace.errors import QueryError
from tdxtrace.tables.text import one_line


class ReportFormat(StrEnum):
    """Formats of a report or comparison."""

    html = "html"
    md = "md"
    json = "json"


_BY_SUFFIX: Final = {
    ".html": ReportFormat.html,
    ".htm": ReportFormat.html,
    ".md": ReportFormat.md,
    ".markdown": ReportFormat.md,
    ".json": ReportFormat.json,
}


def format_of(path: Path | None) -> ReportFormat:
    """Return the format that a file's name implies; Markdown for standard output (None).

    Raises:
        QueryError: If the suffix is none of those known.
    """
    if path is None:
        return ReportFormat.md
    found = _BY_SUFFIX.get(path.suffix.lower())
    if found is None:
        raise QueryError(
            f"what is {one_line(path.name)} to be? name it .html, .md or .json, or say --format"
        )
    return found
