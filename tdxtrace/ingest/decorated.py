"""Remove what a program put around every line of a trace: numbers, dates, hosts, marks, quotes.

``grep -n``, ``nl``, ``ts``, ``pdsh``, the journal, the logs of containers, a kernel that dumps its
buffer on a console: each puts text of its own before a line.  Tracing tools print the name of a
thread into a field of fixed width, so all that stands before the field is such text.  Its shape is
learned from the first event lines: words may differ, blanks and punctuation may not.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from tdxtrace.ingest.source import MAX_LINE_BYTES
from tdxtrace.ingest.text import line_formats

# Lines from which a decoration is learned. This and the numbers below are choices.
_MOST_TRIED: Final = 100
# Columns in which the name ends at most, share of the event lines that must have a decoration, and
# the most shapes it may have: grep -C prints two ("file:12:", "file-13-").
_MOST_BEFORE: Final = 400
_LEAST_SHARE: Final = 0.9
_MOST_SHAPES: Final = 3
_TOKEN: Final = re.compile(r"[A-Za-z0-9_]+|[ \t]+|.", re.ASCII | re.DOTALL)
# Prefixes that the readers of lines know: quotation marks of a mail; the name of an instance of
# trace-cmd, to which lines belong; the time of day of perf script.
_KNOWN: Final = re.compile(
    r"^(?:[> \t]*+|[^\s:]{1,255}+: ++|\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{1,9}+ *+)$", re.ASCII
)
# Marks at the ends of lines: cat -A of text with and without carriage returns, Markdown, cells of
# tables, HTML.
_ENDS: Final = tuple(
    re.compile(pattern.encode(), re.MULTILINE)
    for pattern in (
        r"(?:\^M)?\$\r?$",
        r"\^M\r?$",
        r"\*\*\r?$",
        r"`\r?$",
        r"[ \t]\|\r?$",
        r"(?<!,),++\r?$",
        r"\\par\r?$",
    )
)


def undecorated(head: bytes) -> Callable[[bytes], bytes] | None:
    """Return a function that removes the decoration from whole lines; None if there is none.

    Args:
        head: The beginning of a text.
    """
    lines = [line for line in head.splitlines()[:_MOST_TRIED] if line.strip()]
    befores = [(line, text_before_name(line.decode("latin-1"))) for line in lines]
    events = [line for line, before in befores if before is not None]
    if not events:
        return None
    removed = []
    shapes = _shapes([before for _, before in befores if before is not None])
    if shapes:
        start = re.compile("|".join(shapes).encode("latin-1"), re.MULTILINE)
        removed.append(start)
    end = next((end for end in _ENDS if _is_usual(sum(map(_has(end), events)), events)), None)
    if end is not None:
        removed.append(end)
    return partial(_without, removed=removed) if removed else None


def _has(end: re.Pattern[bytes]) -> Callable[[bytes], bool]:
    return lambda line: end.search(line) is not None


def _is_usual(n: int, events: Sequence[object]) -> bool:
    return n >= _LEAST_SHARE * len(events)


def _without(text: bytes, removed: Sequence[re.Pattern[bytes]]) -> bytes:
    for pattern in removed:
        text = pattern.sub(b"", text)
    return text


def text_before_name(line: str) -> str | None:
    """Return the text before the field of the thread's name; None if the line is no event."""
    made = line_formats.match_prefix(line[:MAX_LINE_BYTES], line_formats.LINE_FORMATS)
    if made is None:
        return None
    groups = made[1].groupdict()
    for group, width in line_formats.NAME_WIDTHS.items():
        if groups.get(group) is not None:
            end = made[1].end(group)
            # A name that is longer than its field is no name behind a decoration.
            is_behind = width < end < _MOST_BEFORE and not line[end - width - 1].isalnum()
            is_field = is_behind and line_formats.name_field(line[:end], width)
            return line[: end - width] if is_field else ""
    return ""


def _shapes(befores: Sequence[str]) -> list[str]:
    """Return patterns of the decorations of lines; empty if most lines have none."""
    votes = Counter(_shape(text) for text in befores if _KNOWN.match(text) is None)
    usual = votes.most_common(_MOST_SHAPES)
    return [shape for shape, _ in usual] if _is_usual(sum(n for _, n in usual), befores) else []


def _shape(text: str) -> str:
    """Return a pattern of texts with other words; blanks at the end may be missing in a line."""
    body = text.rstrip(" \t")
    parts = ["^[ \t]*+"]
    for token in _TOKEN.findall(body.lstrip(" \t")):
        if token.isspace():
            parts.append("[ \t]++")
        else:
            parts.append(
                "[A-Za-z0-9_]++" if token[0].isalnum() or token[0] == "_" else re.escape(token)
            )
    tail = re.escape(text[len(body) :])
    return "".join(parts) + (f"(?:{tail}|(?=\r?$))" if tail else "")
