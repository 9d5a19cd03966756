"""Texts that were pasted or printed in another form: as HTML, in colours, with other blanks.

What the beginning of a text shows is undone in all of it, before its lines are read.  Nothing else
of the text changes, so nothing is lost: the lines are those that the tool printed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Final

# What stands for another character: HTML of mail archives and of issues, no-break and narrow
# blanks of what was copied from a page, an arrow of a font with ligatures.  "&amp;" comes last.
_CHARACTERS: Final = (
    (b"&lt;", b"<"),
    (b"&gt;", b">"),
    (b"&nbsp;", b" "),
    (b"&#160;", b" "),
    (b"&quot;", b'"'),
    (b"&#34;", b'"'),
    (b"&#39;", b"'"),
    (b"&#x27;", b"'"),
    (b"&amp;", b"&"),
    ("\u00a0".encode(), b" "),
    ("\u202f".encode(), b" "),
    ("\u2190".encode(), b"<-"),
)
# Colours and "erase to the end of the line" of a terminal (ECMA-48, SGR and EL): also in the middle
# of a word, as grep --color=always prints them.
_COLOURS: Final = re.compile(rb"\x1b\[[\d;]{0,16}[mK]")
# A tool that colours ends each colour; a lone escape is part of somebody's name.
_ENDS_COLOUR: Final = re.compile(rb"\x1b\[0?m")
# Of a text without the end of a line: bytes that may be the beginning of what is replaced.
_MOST_KEPT_BYTES: Final = 1 << 16

_Chunks = Iterable[bytes]


def mend_text(head: bytes) -> Callable[[_Chunks], Iterator[bytes]] | None:
    """Return what undoes the form that a text begins in; None if it is as it was printed.

    Args:
        head: The beginning of the text.

    Returns:
        A function from the chunks of the text to the chunks of what was printed.
    """
    if b"\0" in head:
        return None
    replaced = [(old, new) for old, new in _CHARACTERS if old in head]
    # Every name of a character may follow where one was used.
    if any(old.startswith(b"&") for old, _ in replaced):
        replaced = list(_CHARACTERS)
    if b"\r" in head and b"\n" not in head:
        replaced.append((b"\r", b"\n"))
    has_colours = _ENDS_COLOUR.search(head) is not None
    if not replaced and not has_colours:
        return None
    return partial(_replaced, replaced=replaced, has_colours=has_colours)


def _replaced(
    chunks: _Chunks, replaced: list[tuple[bytes, bytes]], *, has_colours: bool
) -> Iterator[bytes]:
    rest = b""
    for chunk in chunks:
        text = rest + chunk
        end = max(text.rfind(b"\n"), text.rfind(b"\r")) + 1
        if not end and len(text) > _MOST_KEPT_BYTES:
            end = len(text)
        rest = text[end:]
        if end:
            yield _replace(text[:end], replaced, has_colours)
    if rest:
        yield _replace(rest, replaced, has_colours)


def _replace(text: bytes, replaced: list[tuple[bytes, bytes]], has_colours: bool) -> bytes:
    if has_colours:
        text = _COLOURS.sub(b"", text)
    for old, new in replaced:
        text = text.replace(old, new)
    return text
