"""What a report is made of, before it is HTML, Markdown or JSON: one section per question."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from tdxtrace.report.units import count
from tdxtrace.tables.text import one_line

if TYPE_CHECKING:
    import altair as alt


# A verdict with what would decide it; longer is no table any more.
_WIDEST: Final = 400
# What is longer than a name, an outcome or a list of rows.
_SENTENCE: Final = 48


@dataclass(frozen=True, slots=True)
class Figure:
    """A chart, drawn when it is needed."""

    name: str
    """File name of its picture, and its place in the page."""
    title: str
    caption: str
    """What was left out or summed up, and how to read it."""
    draw: Callable[[], alt.Chart | alt.LayerChart]


@dataclass(frozen=True, slots=True)
class Grid:
    """A table for reading; cells are text, one line each, hostile or not."""

    titles: Sequence[str]
    rows: Sequence[Sequence[str]]
    right: frozenset[int] = frozenset()
    """Columns of numbers."""
    caption: str = ""
    more: str = ""
    """What is not shown, and how to see it."""
    spare: Sequence[int] = ()
    """Columns that are left out where there is no room, the first first."""

    @property
    def is_told(self) -> bool:
        """Whether its rows end in sentences: no table any more where there is little room."""
        return any(len(row[-1]) > _SENTENCE for row in self.rows)


@dataclass(frozen=True, slots=True)
class Section:
    """The answer to one question."""

    name: str
    """Name of the table it is about; the anchor in the page."""
    title: str
    definition: str
    says: Sequence[str]
    """The answer in sentences, the most important first; never empty."""
    figures: Sequence[Figure] = ()
    grids: Sequence[Grid] = ()


def more(n_hidden: int, command: str) -> str:
    """Say how many rows a table leaves out, and which command prints them; empty if none."""
    return f"{count(n_hidden)} more (tdxtrace {command})" if n_hidden > 0 else ""


def grid(
    titles: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    right: Sequence[int] = (),
    caption: str = "",
    more: str = "",
    spare: Sequence[int] = (),
) -> Grid:
    """Return a table whose cells are safe to show, as text, wherever text is shown."""
    safe = [tuple(one_line(cell, _WIDEST) for cell in row) for row in rows]
    return Grid(titles, safe, frozenset(right), caption, more, spare)
