"""Texts that were pasted or stored in another form: HTML, colours, blanks, logs of containers.

What the beginning of a text shows is undone in all of it, before its lines are read.  Nothing else
of the text changes, so nothing is lost: the lines are those that the tool printed.
"""

from __future__ import annotations

import itertools
import json
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
# What a program printed, in the objects of a log of containers: Docker's json-file and fluent-bit
# ("log"), logstash and Elastic Common Schema ("message"), logcli of Loki ("line").
_PRINTED: Final = ("log", "message", "line")
# An object, or the string that jq makes of one, on a line.
_IN_JSON: Final = re.compile(rb'^(?:\{[ \t]*"|")', re.MULTILINE)
_MOST_TRIED: Final = 16

_Chunks = Iterable[bytes]
_Undo = Callable[[bytes], bytes]
"""From whole lines to what was printed."""


def mend_text(head: bytes) -> Callable[[_Chunks], Iterator[bytes]] | None:
    """Return what undoes the form that a text begins in; None if it is as it was printed.

    Args:
        head: The beginning of the text.

    Returns:
        A function from the chunks of the text to the chunks of what was printed.
    """
    if b"\0" in head:
        return None
    undo: list[_Undo] = []
    unwrap = _from_json(head)
    if unwrap is not None:
        undo, head = [unwrap], unwrap(head)
    if _ENDS_COLOUR.search(head) is not None:
        undo.append(partial(_COLOURS.sub, b""))
    replaced = [(old, new) for old, new in _CHARACTERS if old in head]
    # Every name of a character may follow where one was used.
    if any(old.startswith(b"&") for old, _ in replaced):
        replaced = list(_CHARACTERS)
    if b"\r" in head and b"\n" not in head:
        replaced.append((b"\r", b"\n"))
    if replaced:
        undo.append(partial(_replace, replaced=replaced))
    return partial(_undone, undo=undo) if undo else None


def _undone(chunks: _Chunks, undo: list[_Undo]) -> Iterator[bytes]:
    rest = b""
    for chunk in chunks:
        text = rest + chunk
        end = max(text.rfind(b"\n"), text.rfind(b"\r")) + 1
        if not end and len(text) > _MOST_KEPT_BYTES:
            end = len(text)
        rest = text[end:]
        if end:
            yield _each(text[:end], undo)
    if rest:
        yield _each(rest, undo)


def _each(text: bytes, undo: list[_Undo]) -> bytes:
    for step in undo:
        text = step(text)
    return text


def _replace(text: bytes, replaced: list[tuple[bytes, bytes]]) -> bytes:
    for old, new in replaced:
        text = text.replace(old, new)
    return text


def _from_json(head: bytes) -> _Undo | None:
    """Return what takes lines out of the objects of a log; None if they are in none."""
    begun = itertools.islice(_IN_JSON.finditer(head), _MOST_TRIED)
    tried = (_printed(head[found.start() :].partition(b"\n")[0]) for found in begun)
    printed = [text for text in tried if text is not None]
    # Docker keeps the ends of lines: where one is missing, the next object goes on with it.
    has_ends = any(text.endswith(b"\n") for text in printed)
    return partial(_unwrap, end=b"" if has_ends else b"\n") if printed else None


def _unwrap(text: bytes, end: bytes) -> bytes:
    lines = text.splitlines(keepends=True)
    made = ((_printed(line), line) for line in lines)
    return b"".join(line if printed is None else printed + end for printed, line in made)


def _printed(line: bytes) -> bytes | None:
    """What was printed, of a line that is an object of a log or a string; else None."""
    if not line.startswith((b"{", b'"')):
        return None
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if isinstance(value, dict):
        value = next((value[name] for name in _PRINTED if name in value), None)
    return value.encode("utf-8", "replace") if isinstance(value, str) else None
