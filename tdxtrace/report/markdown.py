"""The report as Markdown that reads well as plain text: in a mail, in a cover letter."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from typing import Final

from tdxtrace import __version__
from tdxtrace.report.sections import Grid, Section

# Columns of a line of prose: what mails of the kernel's lists have,
# Documentation/process/submitting-patches.rst.
WIDTH: Final = 75
_MOST_ROWS: Final = 12
# A table may stand out a little; more would be broken by whatever shows it.
_WIDEST: Final = 96
# What begins a link, an emphasis, a tag or a cell in CommonMark or GitHub's tables.
_SPECIAL: Final = re.compile(r"([\\`*\[\]|~]|(?<!\w)_|_(?!\w))")
# What makes a line a heading, a list or a quotation where it stands first.
_FIRST: Final = re.compile(r"^([#+>=-]|\d+[.)])")


def markdown(title: str, sections: Sequence[Section]) -> str:
    """Return the report as text; charts are in the HTML."""
    lines = [f"# {text(title)}", ""]
    for section in sections:
        lines += [f"## {text(section.title)}", ""]
        if section.definition:
            lines += [*_wrapped(section.definition), ""]
        for line in section.says:
            lines += _wrapped(line, "- " if len(section.says) > 1 else "")
        lines.append("")
        for grid in section.grids:
            lines += [*_table(grid), ""]
    lines.append(f"Made by tdxtrace {__version__}.")
    return "\n".join(lines) + "\n"


def text(shown: str) -> str:
    r"""Return text that Markdown shows as it is.

    Example:
        >>> print(text("<b> | ](http://x) a_b"))
        &lt;b&gt; \| \](http://x) a_b
    """
    safe = shown.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _SPECIAL.sub(r"\\\1", safe)


def _wrapped(line: str, bullet: str = "") -> list[str]:
    return _filled(_FIRST.sub(r"\\\1", text(line)), bullet)


def _filled(safe: str, bullet: str) -> list[str]:
    return textwrap.wrap(
        safe,
        WIDTH,
        initial_indent=bullet,
        subsequent_indent=" " * len(bullet),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _table(grid: Grid) -> Iterator[str]:
    """A table of GitHub's Markdown, its columns aligned for readers of plain text."""
    if grid.caption:
        yield from _wrapped(grid.caption)
        yield ""
    rows = [[text(cell) for cell in row] for row in (grid.titles, *grid.rows[:_MOST_ROWS])]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    shown = _that_fit(widths, grid.spare)
    if _needs(widths, shown) <= _WIDEST:
        yield from _aligned(grid, rows, widths, shown)
    else:
        yield from _listed(rows)
    hidden = len(grid.rows) - _MOST_ROWS
    notes = [f"{hidden} more in the HTML report"] if hidden > 0 else []
    notes += [grid.more] if grid.more else []
    if notes:
        yield ""
        yield from _wrapped("; ".join(notes) + ".")


def _aligned(
    grid: Grid, rows: Sequence[Sequence[str]], widths: Sequence[int], shown: Sequence[int]
) -> Iterator[str]:
    rules = ["-" * (w - 1) + (":" if n in grid.right else "-") for n, w in enumerate(widths)]
    for row in (rows[0], rules, *rows[1:]):
        cells = [
            row[n].rjust(widths[n]) if n in grid.right else row[n].ljust(widths[n]) for n in shown
        ]
        yield f"| {' | '.join(cells)} |"


def _listed(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Sentences do not fit a table of plain text: an item for each row, its last cell last."""
    for row in rows[1:]:
        facts = [f"{title} {cell}" for title, cell in zip(rows[0][1:-1], row[1:-1], strict=True)]
        yield from _filled(f"{row[0]} ({', '.join(facts)}): {row[-1]}", "- ")


def _needs(widths: Sequence[int], shown: Sequence[int]) -> int:
    return sum(widths[n] + 3 for n in shown) + 1


def _that_fit(widths: Sequence[int], spare: Sequence[int]) -> list[int]:
    """Columns of a table so wide as a line may be, or that cannot be spared."""
    shown = list(range(len(widths)))
    for column in spare:
        if _needs(widths, shown) <= WIDTH:
            break
        shown.remove(column)
    return shown
