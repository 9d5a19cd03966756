"""Text tables and sentences that adapt to the width of the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.segment import Segment
from rich.style import Style
from rich.text import Text

from tdxtrace.report.units import plural

_BOLD: Final = Style(bold=True)
_COMMAND: Final = Style(color="cyan")
_GAP: Final = 1
# Minimum width of a folded column of sentences: chosen by the project.
_MIN_TEXT_WIDTH: Final = 30


class TextTable:
    """A table of text whose cells are never truncated.

    If not all columns fit the terminal, the least important ones are left out and named in a line
    below the table.  One column of sentences may be folded instead; it is then the last column.

    Args:
        titles: Title of each column.
        right: Indices of right-aligned columns.
        ranks: Rank of each column; the column with the smallest rank is kept longest.  Default:
            from left to right.
        texts: Indices of columns of sentences, which may be folded.
        elsewhere: How to see the columns that are left out, for the line below the table.
    """

    def __init__(
        self,
        titles: Sequence[str],
        *,
        right: Sequence[int] = (),
        ranks: Sequence[int] | None = None,
        texts: Sequence[int] = (),
        elsewhere: str = "a wider terminal, or a pipe",
    ) -> None:
        self._titles = list(titles)
        self._right = frozenset(right)
        self._ranks = list(range(len(titles))) if ranks is None else list(ranks)
        self._texts = frozenset(texts)
        self._elsewhere = elsewhere
        self._rows: list[list[str]] = []

    def add_row(self, *cells: str | Text) -> None:
        """Append a row with one cell per title."""
        self._rows.append([str(cell) for cell in cells])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the titles, the rows, and the names of the columns that are left out."""
        width = options.max_width
        widths = [self._width(place) for place in range(len(self._titles))]
        places, wrapped_column = _fitting(widths, self._ranks, self._texts, width)
        room = width - sum(widths[place] + _GAP for place in places if place != wrapped_column)
        # Segments are faster than Text: a pipe may receive a million rows.
        for n, row in enumerate([self._titles, *self._rows]):
            for line in self._lines(row, places, widths, wrapped_column, room):
                yield Segment(line, _BOLD if n == 0 else None)
                yield Segment.line()
        left_out = [title for place, title in enumerate(self._titles) if place not in places]
        if left_out:
            named = ", ".join(title.removesuffix(", s") for title in left_out)
            yield Text(f"not shown: {named} ({self._elsewhere})", style="dim")

    def _width(self, place: int) -> int:
        return max(cell_len(row[place]) for row in [self._titles, *self._rows])

    def _lines(
        self,
        row: Sequence[str],
        places: Sequence[int],
        widths: Sequence[int],
        wrapped_column: int | None,
        room: int,
    ) -> Iterator[str]:
        """Yield the lines of a row: one, or one per line of its folded cell."""
        cells = [
            _padded(row[place], widths[place], place in self._right)
            for place in places
            if place != wrapped_column
        ]
        first = " ".join(cells)
        if wrapped_column is None:
            yield first.rstrip()
            return
        indent = " " * (cell_len(first) + _GAP) if cells else ""
        for n, part in enumerate(_wrapped(row[wrapped_column], room)):
            yield ((first + " " if cells else "") if n == 0 else indent) + part


def _fitting(
    widths: Sequence[int], ranks: Sequence[int], texts: frozenset[int], width: int
) -> tuple[list[int], int | None]:
    """Return the indices of the columns that fit, in order, and the index of the folded one."""
    chosen: list[int] = []
    wrapped_column = None
    used = 0
    for place in sorted(range(len(widths)), key=lambda place: (ranks[place], place)):
        if chosen and used + widths[place] > width:
            if place not in texts or width - used < _MIN_TEXT_WIDTH:
                continue
            wrapped_column = place
        elif not chosen and widths[place] > width and place in texts:
            wrapped_column = place
        chosen.append(place)
        if wrapped_column is not None:
            break
        used += widths[place] + _GAP
    rest = sorted(place for place in chosen if place != wrapped_column)
    return [*rest, *([] if wrapped_column is None else [wrapped_column])], wrapped_column


def _padded(cell: str, width: int, is_right: bool) -> str:
    blanks = " " * (width - cell_len(cell))
    return blanks + cell if is_right else cell + blanks


def _wrapped(text: str, width: int) -> Iterator[str]:
    """Break a sentence between words into lines of at most ``width``; longer words are split."""
    line = ""
    for word in text.split(" "):
        if line and cell_len(line) + 1 + cell_len(word) > width:
            yield line
            line = ""
        line = f"{line} {word}" if line else word
        while cell_len(line) > width:
            piece = line[:width]
            while cell_len(piece) > width:
                piece = piece[:-1]
            yield piece
            line = line[len(piece) :]
    yield line


class Sentence:
    """A sentence that is folded between words to the width of the terminal, never truncated.

    Args:
        text: The sentence.
        indent: Number of blanks before each line.
        style: Style of rich.
        then: Command appended to the last line if it fits, else on a line of its own.  It is not
            folded, so that it can be copied.
    """

    def __init__(self, text: str, indent: int = 0, style: str = "", then: str = "") -> None:
        self._text = text
        self._indent = indent
        self._style = style
        self._then = then

    def lines(self, width: int) -> Iterator[tuple[str, str]]:
        """Yield each line as its text and the command that follows it, which may be empty."""
        blanks = " " * self._indent
        room = max(width - self._indent, 1)
        *before, last = _wrapped(self._text, room)
        yield from ((blanks + line, "") for line in before)
        if not self._then or cell_len(last) + 1 + cell_len(self._then) <= room:
            yield blanks + last, f" {self._then}" if self._then else ""
        else:
            yield blanks + last, ""
            yield blanks, f"  {self._then}"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the segments of each line."""
        style = console.get_style(self._style) if self._style else None
        for text, command in self.lines(options.max_width):
            yield Segment(text, style)
            if command:
                yield Segment(command, _COMMAND)
            yield Segment.line()


def more_rows(n: int) -> str:
    """Return the line that states the number of rows left out."""
    return f"{plural(n, 'more row')} (-n 0: all)"
