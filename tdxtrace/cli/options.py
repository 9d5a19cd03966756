"""Options that several commands share, and output formats."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Final

import typer

from tdxtrace.cli import completion
from tdxtrace.tables.text import one_line


class OutputFormat(StrEnum):
    """Formats in which a table is printed."""

    table = "table"
    csv = "csv"
    json = "json"
    parquet = "parquet"


class Color(StrEnum):
    """When output is coloured."""

    auto = "auto"
    always = "always"
    never = "never"


class About(StrEnum):
    """Tables about causes that ``busy-causes`` prints."""

    attempts = "attempts"
    shares = "shares"
    rules = "rules"
    locks = "locks"
    entries = "entries"


ABOUT_TABLES: Final[Mapping[str, str]] = {
    About.attempts: "busy_causes",
    About.shares: "cause_shares",
    About.rules: "broken_rules",
    About.locks: "lock_values",
    About.entries: "entry_waits",
}
"""The finding table of each value of :class:`About`."""
Traces = Annotated[
    list[str],
    typer.Argument(
        metavar="TRACE...",
        help="trace.dat, perf.data or ring-buffer pages; text of ftrace, trace-cmd report, perf "
        "script, function_graph or dmesg; compressed or not; a folder of convert; - for stdin.",
        show_default=False,
    ),
]
Vms = Annotated[
    list[str],
    typer.Option("--vm", metavar="VM", help="Only this TD (0x...) or process; repeatable."),
]
Leaves = Annotated[
    list[str],
    typer.Option(
        "--leaf",
        metavar="LEAF",
        autocompletion=completion.leaves,
        help="Only this leaf, e.g. TDH.MEM.PAGE.AUG.",
    ),
]
Since = Annotated[
    str | None,
    typer.Option("--since", metavar="TIME", help="From 4189.25s, or +10ms: from the start on."),
]
Until = Annotated[
    str | None,
    typer.Option("--until", metavar="TIME", help="Up to 4189.25s, or +10ms from the start."),
]
InputFormat = Annotated[
    str | None,
    typer.Option(
        "--input-format",
        metavar="NAME",
        autocompletion=completion.formats,
        help="Format of the input; default: detect it.",
    ),
]
Mappings = Annotated[
    list[str],
    typer.Option(
        "--map",
        metavar="EVENT=FUNCTION",
        help="Function of a probe with another name; append :entry or :return if needed.",
    ),
]
LevelBase = Annotated[
    int | None,
    typer.Option(
        "--level-base",
        metavar="N",
        min=0,
        max=1,
        help="Number of a 4K level: 0 to Linux 7.1, 1 from 7.2.",
    ),
]
Formats = Annotated[
    Path | None,
    typer.Option(
        "--formats", metavar="DIR", help="The kernel's events folder, for raw ring-buffer pages."
    ),
]
Dmesg = Annotated[
    list[Path],
    typer.Option(
        "--dmesg",
        metavar="FILE",
        help="The kernel's log of that time; repeatable.",
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(
        "--memory", metavar="SIZE", help="Maximum memory, e.g. 8G; default: all free memory."
    ),
]
MaxUnpacked = Annotated[
    str | None,
    typer.Option(
        "--max-unpacked",
        metavar="SIZE",
        help="Maximum unpacked size of an input; default: 200 times its size plus 256M.",
    ),
]
Cache = Annotated[
    bool, typer.Option("--cache", help="Keep converted traces in the user's cache folder.")
]
Format = Annotated[
    OutputFormat,
    typer.Option(
        "--format", metavar="FORM", show_default=False, help="table, or csv, json, parquet."
    ),
]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="FILE", help="Output file, not stdout.")
]
Limit = Annotated[
    int | None,
    typer.Option(
        "--limit",
        "-n",
        metavar="N",
        min=0,
        show_default=False,
        help="Maximum rows of a table; 0: all.",
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Overwrite the output.")]
Python = Annotated[bool, typer.Option("--python", help="Print equivalent Python code.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no summary.")]
Verbose = Annotated[
    bool,
    typer.Option("--verbose", "-v", help="Print what was read, and the time of each step."),
]
Coloring = Annotated[
    Color,
    typer.Option(
        "--color",
        metavar="WHEN",
        show_default=False,
        help="auto: on a terminal, by NO_COLOR and FORCE_COLOR; always; never.",
    ),
]
NoColor = Annotated[bool, typer.Option("--no-color", help="As --color never.", hidden=True)]


def chosen_color(color: Color, no_color: bool) -> Color:
    """Combine both options: --no-color overrides --color."""
    return Color.never if no_color else color


FailOn = Annotated[
    list[str],
    typer.Option(
        "--fail-on",
        metavar="RULE",
        help="Exit with status 3 if RULE matches: 'max-attempts>16'.",
    ),
]


def parse_count(text: str | int) -> int:
    """Parse an integer, with or without commas between thousands, as tables print it."""
    digits = str(text).replace(",", "")
    if not digits.isdecimal():
        raise typer.BadParameter(f"not a number: {one_line(str(text), 40)!r}")
    return int(digits)


class ReportFormat(StrEnum):
    """Formats of a report or comparison."""

    html = "html"
    md = "md"
    json = "json"


def format_of(path: Path | None) -> ReportFormat:
    """Return the format of a file by its suffix; Markdown for standard output (None).

    Raises:
        QueryError: If the suffix is unknown.
    """
    if path is None:
        return ReportFormat.md
    from tdxtrace.report.render import form_of

    return ReportFormat(form_of(path))
