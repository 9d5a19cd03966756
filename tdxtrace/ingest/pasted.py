"""Restore texts that were pasted or stored in another form: HTML, colours, blanks, container logs.

The changes found at the beginning of a text are undone in the whole text, before its lines are
read.  Nothing else in the text changes, so nothing is lost: the result is the lines that the tool
printed.
"""

from __future__ import annotations

import html
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Final

from tdxtrace.ingest.decorated import text_before_name, undecorated

# Substitutes and the original characters: no-break and other blanks of text copied from a page or a
# chat, marks without a width, quotation marks and dashes that an editor made, an arrow from a font
# with ligatures, an ellipsis, separators of lines.
_CHARACTERS: Final = {
    old.encode(): new
    for olds, new in (
        (
            "\u00a0\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u202f\u205f\u3000",
            b" ",
        ),
        ("\u00ad\u200b\u200c\u200d\u200e\u200f\u2060\ufeff", b""),
        ("\u2010\u2011\u2012\u2013\u2212", b"-"),
        ("\u2018\u2019", b"'"),
        ("\u201c\u201d\u201e", b'"'),
        ("\u2190", b"<-"),
        ("\u2026", b"..."),
        ("\u2028\u2029", b"\n"),
    )
    for old in olds
}
# A no-break blank of Latin-1, which is no part of a character of UTF-8.
_LATIN_BLANK: Final = re.compile(rb"(?<![\x80-\xff])\xa0(?![\x80-\xbf])")
# HTML entities in mail archives and issues, escaped once or more often.
_ENTITY: Final = re.compile(
    rb"&(?:amp;)*+(?:lt|gt|nbsp|quot|larr|apos|#\d{1,5}|#x[0-9a-fA-F]{1,4});"
)
# Times that entities may be escaped. A choice.
_MOST_ESCAPED: Final = 3
# Tags around text in the source of a page; those that end a line.
_TAG: Final = re.compile(
    rb"</?(?:pre|code|span|div|p|br|a|b|i|td|tr|table|tbody|html|body|font|blockquote)\b[^<>\n]{0,400}>",
    re.IGNORECASE,
)
_LAST_TAG: Final = re.compile(rb"(?:<br ?/?>|</(?:p|div|tr)>)(?!\s*(?:[\r\n]|\Z))", re.IGNORECASE)
_IS_PAGE: Final = re.compile(rb"<br ?/?>|</(?:pre|code|span|div|p|td)>", re.IGNORECASE)
# Escape sequences of a terminal (ECMA-48: CSI, and OSC of xterm), also as cat -v prints them: also
# in the middle of a word, as grep --color=always prints them.  And what it printed and went over.
_ESCAPES: Final = re.compile(
    rb"(?:\x1b|\^\[)(?:\[[0-?]{0,32}[ -/]{0,4}[@-~]|\][^\x07\x1b\n]{0,400}+(?:\x07|\x1b\\)|[=>])"
    rb"|[^\n]\x08"
)
# A tool that prints colours also ends each colour, and a program of a terminal switches its modes;
# a lone escape is part of a name.
_ENDS_COLOUR: Final = re.compile(
    rb"(?:\x1b|\^\[)\[(?:[034]?|39|49|0;0)m|\x1b\[\?\d{1,4}[hl]|_\x08|(\w)\x08\1"
)
# Markdown in which punctuation is escaped.
_ESCAPED: Final = re.compile(rb"\\([][_*<>#|~`{}().!+-])")
# Most bytes without a line end that are held back because a replaced sequence may begin in them.
_MOST_KEPT_BYTES: Final = 1 << 16
# Keys that hold the printed text in the objects of a container log: Docker's json-file and
# fluent-bit ("log"), logstash and Elastic Common Schema ("message"), logcli of Loki ("line").
# Other keys are learned from objects that hold an event: MESSAGE of the journal, textPayload, …
_PRINTED: Final = (("log",), ("message",), ("line",))
# A line that holds an object, or a string of JSON, as jq extracts one or a list has one a line.
_IN_JSON: Final = re.compile(
    rb'^(?:\x1e|data: ?)?(?:[\[{]+[ \t]*"|[ \t]*"|[^"\n]{0,200}=")', re.MULTILINE
)
_OBJECT: Final = re.compile(rb"^(?:\x1e|data: ?)?(?P<object>\{.*\}|\[.*\])\s*$", re.DOTALL)
_STRING: Final = re.compile(
    rb'^(?:[^"\n]{0,200}(?P<sign>=)|[ \t]*+(?:"(?P<key>[^"\\\n]{1,99})"[ \t]*+:[ \t]*+)?)'
    rb'(?P<string>"(?:[^"\\]|\\.)*+")[ \t]*+,?\s*+$',
    re.DOTALL,
)
# Objects that are tried, and lines of a string; depth to which an object is searched. Choices.
_MOST_TRIED: Final = 200
_MOST_DEEP: Final = 4

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
    for find in (_from_json, _escapes, _markup, _characters, undecorated):
        step = find(head)
        if step is not None:
            undo.append(step)
            head = step(head)
    return partial(_undone, undo=undo) if undo else None


def _escapes(head: bytes) -> _Undo | None:
    has_any = any(sign in head for sign in (b"\x1b", b"^[", b"\b"))
    is_coloured = has_any and _ENDS_COLOUR.search(head) is not None
    return partial(_ESCAPES.sub, b"") if is_coloured else None


def _markup(head: bytes) -> _Undo | None:
    """Undo HTML, of a page or of text in one, and the escapes of Markdown."""
    if _IS_PAGE.search(head) is not None:
        return _from_page
    if _ENTITY.search(head) is not None:
        return _unescaped
    return partial(_ESCAPED.sub, rb"\1") if rb"\_" in head else None


def _from_page(text: bytes) -> bytes:
    return _unescaped(_TAG.sub(b"", _LAST_TAG.sub(b"\n", text)))


def _unescaped(text: bytes) -> bytes:
    """Replace entities, also those that were escaped more than once, and what they stand for."""
    made = text.decode("utf-8", "surrogateescape")
    for _ in range(_MOST_ESCAPED):
        made = html.unescape(made)
    return _replace(made.encode("utf-8", "surrogateescape"), list(_CHARACTERS.items()))


def _characters(head: bytes) -> _Undo | None:
    others = {} if head.isascii() else _CHARACTERS
    replaced = [(old, new) for old, new in others.items() if old in head]
    if b"\r" in head and b"\n" not in head:
        replaced.append((b"\r", b"\n"))
    if others and _LATIN_BLANK.search(head) is not None:
        return lambda text: _LATIN_BLANK.sub(b" ", _replace(text, replaced))
    return partial(_replace, replaced=replaced) if replaced else None


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


_Key = tuple[str | int, ...]
"""Path to a value in an object."""


def _from_json(head: bytes) -> _Undo | None:
    """Return a function that extracts lines from the objects of a log; None if there are none."""
    begun = itertools.islice(_IN_JSON.finditer(head), _MOST_TRIED)
    lines = [head[found.start() :].partition(b"\n")[0] for found in begun]
    keys = _keys_of_events(lines)
    printed = [text for text in (_printed(line, keys) for line in lines) if text is not None]
    # Docker keeps line ends: where one is missing, the next object continues the line.
    has_ends = any(text.endswith(b"\n") for text in printed)
    return partial(_unwrap, keys=keys, end=b"" if has_ends else b"\n") if printed else None


def _keys_of_events(lines: Sequence[bytes]) -> Sequence[_Key]:
    """Return where objects hold an event, likeliest first; _PRINTED if none does.

    The journal's own readers take other objects with MESSAGE.
    """
    votes = Counter(
        path
        for line in lines
        for path, text in _strings(_value(line))
        if any(text_before_name(line) is not None for line in text.split("\n")[:_MOST_TRIED])
    )
    return [path for path, _ in votes.most_common()] or _PRINTED


def _strings(value: object, path: _Key = ()) -> Iterator[tuple[_Key, str]]:
    """Yield the strings in an object, with their paths; bytes that are numbers are one."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict) and len(path) < _MOST_DEEP:
        for key, inner in value.items():
            yield from _strings(inner, (*path, key))
    elif isinstance(value, list):
        text = _of_list(value)
        if text is not None:
            yield path, text


def _of_list(value: object) -> str | None:
    """Return the text of a list: of lines, or of bytes, as journald exports what is not UTF-8."""
    if not isinstance(value, list) or not value:
        return None
    if all(isinstance(line, str) for line in value):
        return "\n".join(value)
    is_bytes = all(isinstance(byte, int) and 0 <= byte < 256 for byte in value)
    return bytes(value).decode("utf-8", "replace") if is_bytes else None


def _unwrap(text: bytes, keys: Sequence[_Key], end: bytes) -> bytes:
    lines = text.splitlines(keepends=True)
    made = ((_printed(line, keys), line) for line in lines)
    return b"".join(line if printed is None else printed + end for printed, line in made)


def _value(line: bytes) -> object:
    """Return the object or the string that a line holds; None for other lines.

    A string behind a key, or behind a sign of equality as logfmt prints it, is an object of one.
    """
    whole, single = _OBJECT.match(line), _STRING.match(line)
    try:
        if whole is not None:
            return json.loads(whole["object"])
        if single is None:
            return None
        key = single["key"] or single["sign"]
        value = json.loads(single["string"])
    except (ValueError, RecursionError):
        return None
    return value if key is None else {key.decode("utf-8", "replace"): value}


def _printed(line: bytes, keys: Sequence[_Key]) -> bytes | None:
    """Return the printed text in a line that is a log object or a string; None for other lines."""
    value = _value(line)
    texts = (_at(value, key) for key in keys)
    first = (text for text in texts if text is not None)
    text = value if isinstance(value, str) else next(first, None)
    return None if text is None else text.encode("utf-8", "replace")


def _at(value: object, path: _Key) -> str | None:
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, str) else _of_list(value)
