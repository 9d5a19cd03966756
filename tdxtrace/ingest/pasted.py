"""Restore texts that were pasted or stored in another form: HTML, colours, blanks, container logs.

The changes found at the beginning of a text are undone in the whole text, before its lines are
read.  Nothing else in the text changes, so nothing is lost: the result is the lines that the tool
printed.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Final

# Substitutes and the original characters: HTML entities in mail archives and issues, no-break and
# narrow blanks in text copied from a page, an arrow from a font with ligatures.  "&amp;" comes
# last.
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
# A tool that prints colours also ends each colour; a lone escape is part of a name.
_ENDS_COLOUR: Final = re.compile(rb"\x1b\[0?m")
# Most bytes without a line end that are held back because a replaced sequence may begin in them.
_MOST_KEPT_BYTES: Final = 1 << 16
# Keys that hold the printed text in the objects of a container log: Docker's json-file and
# fluent-bit ("log"), logstash and Elastic Common Schema ("message"), logcli of Loki ("line").
_PRINTED: Final = ("log", "message", "line")
# A line that holds an object, or the string that jq extracts from one.
_IN_JSON: Final = re.compile(rb'^(?:\{[ \t]*"|")', re.MULTILINE)
_MOST_TRIED: Final = 16

_Chunks = Iterable[bytes]
_Undo = Callable[[bytes], bytes]
"""Maps whole lines to the text that the tool printed."""


def mend_text(head: bytes) -> Callable[[_Chunks], Iterator[bytes]] | None:
    """Return a function that restores a text; None if the text is as the tool printed it.

    Args:
        head: The beginning of the text.

    Returns:
        A function that maps the chunks of the text to chunks of the text that the tool printed.
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
    # Where one HTML entity is used, any other may follow.
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
    """Return a function that extracts lines from the objects of a log; None if there are none."""
    begun = itertools.islice(_IN_JSON.finditer(head), _MOST_TRIED)
    tried = (_printed(head[found.start() :].partition(b"\n")[0]) for found in begun)
    printed = [text for text in tried if text is not None]
    # Docker keeps line ends: where one is missing, the next object continues the line.
    has_ends = any(text.endswith(b"\n") for text in printed)
    return partial(_unwrap, end=b"" if has_ends else b"\n") if printed else None


def _unwrap(text: bytes, end: bytes) -> bytes:
    lines = text.splitlines(keepends=True)
    made = ((_printed(line), line) for line in lines)
    return b"".join(line if printed is None else printed + end for printed, line in made)


def _printed(line: bytes) -> bytes | None:
    """Return the printed text in a line that is a log object or a string; None for other lines."""
    if not line.startswith((b"{", b'"')):
        return None
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if isinstance(value, dict):
        value = next((value[name] for name in _PRINTED if name in value), None)
    return value.encode("utf-8", "replace") if isinstance(value, str) else None
