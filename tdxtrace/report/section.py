"""Parts of a report, independent of its format: sections, figures, tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from tdxtrace.report.units import count
from tdxtrace.tables.text import one_line

if TYPE_CHECKING:
    import altair as alt


# Maximum characters of a cell: a verdict with its advice.
_MAX_CELL: Final = 1200
# Length above which a cell is a sentence, not a name, an outcome or a list of rows.
_SENTENCE: Final = 48


@dataclass(frozen=True, slots=True)
class Figure:
    """A chart, drawn when it is needed."""

    name: str
    """File name of its image, and its anchor in the page."""
    title: str
    caption: str
    """What is left out, and how to read the chart."""
    draw: Callable[[], alt.Chart | alt.LayerChart]


@dataclass(frozen=True, slots=True)
class Grid:
    """A table to display; cells are single lines of text, possibly untrusted."""

    titles: Sequence[str]
    rows: Sequence[Sequence[str]]
    right: frozenset[int] = frozenset()
    """Indices of right-aligned columns."""
    caption: str = ""
    more: str = ""
    """What is left out, and how to see it."""
    droppable: Sequence[int] = ()
    """Indices of columns to drop where the width is not enough, in this order."""
    summary: str = ""
    """What the table is, if a page shows it only when it is opened."""

    @property
    def ends_in_sentences(self) -> bool:
        """Whether rows end in sentences: such a table is shown as a list on a narrow page."""
        return any(len(row[-1]) > _SENTENCE for row in self.rows)


@dataclass(frozen=True, slots=True)
class Problem:
    """A group of findings that is BUG or HOSTILE; single lines of text, possibly untrusted."""

    verdict: str
    where: str
    """Kind of finding, leaf and TD."""
    what: str
    """The verdict in one sentence."""
    evidence: str
    """Table and first rows of the findings."""
    rule: str
    """Name of the rule that decided, and its source."""
    look: str
    """Command that shows one of the findings with its neighbours."""
    advice: str
    """What to do about it."""


@dataclass(frozen=True, slots=True)
class Section:
    """A section of a report."""

    name: str
    """Name of the table that it presents; its anchor in the page."""
    title: str
    definition: str
    says: Sequence[str]
    """Sentences, the most important first; never empty."""
    figures: Sequence[Figure] = ()
    grids: Sequence[Grid] = ()
    problems: Sequence[Problem] = ()
    is_detail: bool = False
    """Whether a page shows it only when it is opened."""
    is_always_shown: bool = False
    """Whether its sentences matter without charts, tables and problems."""

    @property
    def has_content(self) -> bool:
        """Whether there is more to show than a sentence that nothing was found."""
        shown = self.figures or self.grids or self.problems
        return bool(self.is_always_shown or shown or len(self.says) > 1)


def left_out(parts: Sequence[Section]) -> str:
    """Return one sentence that names the sections without content, by reason; empty if none."""
    by_reason: dict[str, list[str]] = {}
    for section in parts:
        if not section.has_content:
            by_reason.setdefault(section.says[0].rstrip("."), []).append(section.title)
    reasons = "; ".join(f"{', '.join(titles)} ({why})" for why, titles in by_reason.items())
    return f"Not shown: {reasons}." if reasons else ""


def more(n_hidden: int, command: str) -> str:
    """Return the note on rows left out and the command that prints them; empty if none."""
    return f"{count(n_hidden)} more (tdxtrace {command})" if n_hidden > 0 else ""


def grid(
    titles: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    right: Sequence[int] = (),
    caption: str = "",
    more: str = "",
    droppable: Sequence[int] = (),
) -> Grid:
    """Return a Grid with its cells made printable by :func:`one_line`."""
    safe = [tuple(one_line(cell, _MAX_CELL) for cell in row) for row in rows]
    return Grid(titles, safe, frozenset(right), caption, more, droppable)
