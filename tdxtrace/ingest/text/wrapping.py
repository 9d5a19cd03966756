"""Restore event lines that a mailer, a terminal or a quotation changed.

A line is joined with the next one only where that is certain: the next line cannot be the
beginning of a line, and both together are an event with fields that the first alone lacks. Where
it cannot be determined whether a number was cut, both lines are a loss: ``wrapped``.
"""

from __future__ import annotations

import quopri
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from tdxtrace.ingest.batch import UNKNOWN
from tdxtrace.ingest.text import line_formats
from tdxtrace.ingest.text.line_formats import LinePrefix
from tdxtrace.ingest.text.reader import NOT_ROWS, LineReader, MendedLine

# Quotation marks after an indentation; the reader removes those at the start of a line.
_QUOTE: Final = re.compile(r"^[ \t]{0,8}>[> \t]*+")
# Quoted-printable (RFC 2045 6.7): "=" is written =3D, and a "=" at the end of a line joins it
# with the next one.
_PRINTABLE: Final = re.compile(r"=3D(?:0x)?[0-9a-f]")
# A "=" that such text never has: "=" itself is written as a code.
_BARE_SIGN: Final = re.compile(r"=(?![0-9A-F]{2}|$)")
_NUMBER_END: Final = re.compile(r"(?:^|[=\s(:])(?:0x[0-9a-f]*+|[0-9a-f]++)$|=$", re.IGNORECASE)
# Arguments that may follow in an event: "gpa=0x1000 level=0", "rip 0x0 info1 0x1".
_ONE = r"\(?(?:\w++[= ](?:0x)?[0-9a-f]++|(?:0x)?[0-9a-f]++)(?!\w)"
_MORE = rf"(?:[\s,)]++{_ONE})*+[\s,)]*+$"
_FOLLOWS: Final = re.compile(rf"^{_ONE}{_MORE}", re.IGNORECASE)
_FOLLOWS_WITHIN: Final = re.compile(rf"^\w*+{_MORE}", re.IGNORECASE)
_NUMBER_START: Final = re.compile(rf"^(?:0?x)?[0-9a-f]++(?!\w){_MORE}", re.IGNORECASE)
# Maximum length of a line of quoted-printable text (RFC 2045 6.7).
_MAX_PRINTABLE: Final = 76
# One line in this many: text with a smaller share of wrapped lines is read as it is, which is
# faster.
_MIN_SHARE: Final = 100
_MIN_WIDTHS: Final = 2
# Lines, from the first event on, from which the changes are detected: the lines of a mail are
# wrapped alike.
_SAMPLE_LINES: Final = 300


class _Part(NamedTuple):
    """The beginning of a line that the next input line may continue."""

    number: int
    text: str
    n_lines: int
    is_event: bool


_CUT: Final = "cut"
"""Marker instead of a joined text: the lines could be joined in two ways."""


@dataclass(slots=True)
class Mender:
    """Joins wrapped lines of one input and removes quotation marks."""

    reader: LineReader
    has_comm: bool = False
    """Whether most event lines have the name of their thread."""
    has_tid: bool = False
    width: int = 0
    """Column at which every line was cut, even within a word; 0: unknown."""
    is_printable: bool = False
    is_quoted: bool = False
    is_wrapped: bool = False
    _pending: _Part | None = None
    _soft: tuple[int, str, int] | None = None
    """Beginning of a quoted-printable line: its number, its text, its count of input lines."""

    def feed(self, texts: Iterable[tuple[int, bytes]]) -> Iterator[MendedLine]:
        """Yield each line once its end is certain; line numbers count from 1."""
        for number, text in texts:
            line = text.decode("latin-1").rstrip("\r")
            line = self.unquoted(line)
            yield from (
                self._printable(number, line) if self.is_printable else self._line(number, line, 1)
            )

    def unquoted(self, line: str) -> str:
        """Remove the quotation marks from a line."""
        return (_QUOTE if self.is_quoted else line_formats.QUOTE).sub("", line)

    def finish(self) -> Iterator[MendedLine]:
        """Yield the line that is still held back."""
        if self._soft is not None:
            (number, line, n), self._soft = self._soft, None
            yield from self._line(number, line, n)
        yield from self._release()

    def _printable(self, number: int, line: str) -> Iterator[MendedLine]:
        if self._soft is not None:
            (number, before, n), self._soft = self._soft, None
            line, n = before + line, n + 1
        else:
            n = 1
        if line.endswith("="):
            self._soft = number, line[:-1], n
            return
        yield from self._line(
            number, quopri.decodestring(line.encode("latin-1")).decode("latin-1"), n
        )

    def _line(self, number: int, line: str, n: int) -> Iterator[MendedLine]:
        part, is_event = self._pending, self.begins(line)
        if is_event and part is not None and not part.is_event and self._is_cut(part.text, line):
            self._pending = None
            yield MendedLine(part.number, part.text.encode("latin-1"), "wrapped", part.n_lines + n)
            return
        joined = None
        if part is not None and not is_event and not self.is_other(line):
            joined = self.joined(part.text, line, part.is_event)
        if part is None or joined is None:
            yield from self._release()
            self._pending = _Part(number, line, n, is_event)
        elif joined == _CUT:
            self._pending = None
            yield MendedLine(part.number, part.text.encode("latin-1"), "wrapped", part.n_lines + n)
        else:
            self._pending = _Part(part.number, joined, part.n_lines + n, True)

    def _is_cut(self, first: str, second: str) -> bool:
        """Return whether a number may have been cut: its first digits end the line before."""
        whole = first.rstrip() + second
        is_number = first.rstrip()[-1:].isdigit()
        return is_number and self.begins(whole) and not self._is_same_place(whole, second)

    def _is_same_place(self, one: str, other: str) -> bool:
        """Return whether two readings of a line differ at most in the name of the thread."""
        read = [self.prefix(line) for line in (one, other)]
        places = [p and (p.tid, p.tgid, p.cpu, p.ts, p.event, p.args) for p in read]
        return places[0] == places[1]

    def _release(self) -> Iterator[MendedLine]:
        part, self._pending = self._pending, None
        if part is not None:
            # An incomplete line must not be read as a line of another format.
            is_rest = not part.is_event and not self.is_other(part.text) and part.text.strip()
            loss = "unparsed" if is_rest else ""
            yield MendedLine(part.number, part.text.encode("latin-1"), loss, part.n_lines)

    def is_other(self, line: str) -> bool:
        """Return whether a line is complete but no event: header, marker, part of a call chain."""
        found = line_formats.HEADER.match(line) or line_formats.LOST.match(line)
        is_chain = "=" not in line and line[:1].isspace()
        is_chain = is_chain and line_formats.CALLCHAIN.match(line) is not None
        return found is not None or is_chain or line_formats.NO_PAYLOAD.match(line) is not None

    def joined(self, first: str, second: str, is_event: bool) -> str | None:
        """Join two lines.

        Args:
            first: A line; if it is no event, it may be the beginning of one.
            second: A line that cannot be the beginning of an event.
            is_event: Whether ``first`` is an event.

        Returns:
            The joined line; _CUT if there are two ways to join them; None if they do not belong
            together.
        """
        left, right = first.rstrip(), second.strip()
        if self.width and len(first) % self.width == 0 and first:
            whole = first + second
            # Lines that a mailer wrapped at words may all have one length by chance.
            if not is_event or not _extends(self._values(f"{left} {right}"), self._values(whole)):
                return whole if self.begins(whole) else None
        if is_event:
            return self._joined_event(left, right)
        ways = [way for way in (f"{left} {right}", left + right) if self.begins(way)]
        if len(ways) > 1 and not self._is_same_place(*ways):
            return _CUT
        return ways[0] if ways else None

    def _joined_event(self, left: str, right: str) -> str | None:
        """Join an event with further arguments, at a blank or within a word; see ``joined``."""
        soft, hard = f"{left} {right}", left + right
        before, by_blank, within = map(self._values, (left, soft, hard))
        is_number = _NUMBER_END.search(left) is not None and _NUMBER_START.match(right) is not None
        if is_number and within is not None and within not in (before, by_blank):
            return _CUT
        # An event that is complete is joined only with further arguments: a comment that a person
        # wrote below it, or a line that lost its beginning, may look like arguments too.
        can_follow = before is None or _FOLLOWS.match(right) is not None
        can_follow_within = can_follow or _FOLLOWS_WITHIN.match(right) is not None
        extends = can_follow and _extends(by_blank, before)
        extends_within = can_follow_within and _extends(within, before)
        if extends and not (extends_within and len(within or ()) > len(by_blank or ())):
            return soft
        if extends_within:
            return hard
        return soft if self.is_wrapped and by_blank == before and can_follow else None

    def prefix(self, line: str) -> LinePrefix | None:
        """Read the prefix of a line in the format of the text; None if the line has none."""
        made = line_formats.match_prefix(line, self.reader.formats[:1])
        return None if made is None else line_formats.prefix_of(*made)

    def begins(self, line: str) -> bool:
        """Return whether a line begins with a whole prefix: see ``is_whole``."""
        prefix = self.prefix(line)
        return prefix is not None and self.is_whole(prefix)

    def is_whole(self, prefix: LinePrefix) -> bool:
        """Return whether a prefix is followed by an event and has the parts that most others have.

        These parts are the name and the number of the thread.
        """
        if not prefix.event and not prefix.args.strip():
            return False
        is_named = bool(prefix.comm) or not self.has_comm
        return is_named and (prefix.tid != UNKNOWN or not self.has_tid)

    def _values(self, line: str) -> dict[str, int] | None:
        """Return the fields of an event line; None if its event has no rows or it lacks fields."""
        prefix = self.prefix(line)
        if prefix is None or not prefix.event:
            return None
        registry = self.reader.registry
        event = registry.events[registry.event_id(prefix.event, prefix.args)]
        fields = None if event.kind in NOT_ROWS else self.reader.decode_fields(event, prefix.args)
        return None if fields is None else fields.values


def _extends(values: dict[str, int] | None, before: dict[str, int] | None) -> bool:
    """Return whether ``values`` has every field of ``before``, unchanged, and at least one more.

    Any fields are more than None.
    """
    if values is None:
        return False
    return before is None or (before.items() <= values.items() and len(values) > len(before))


@dataclass(slots=True)
class _WrapCounts:
    """Counts from sample lines that show how a text was changed."""

    n_lines: int = 0
    n_joined: int = 0
    widths: list[int] = field(default_factory=list)


def mender_for(sample: Sequence[bytes], reader: LineReader) -> Mender | None:
    """Return a mender for the text; None if its lines are as the tool printed them.

    Args:
        sample: The first lines of the text.
        reader: The reader of its lines.
    """
    lines = _sample_of([line.decode("latin-1").rstrip("\r") for line in sample], reader)
    filled = [line for line in lines if line.strip()]
    is_quoted = sum(line[:1].isspace() and _QUOTE.match(line) is not None for line in filled)
    made = Mender(reader, is_quoted=2 * is_quoted > len(filled))
    made.is_printable = any(_PRINTABLE.search(line) for line in lines) or (
        any(line.endswith("=") for line in lines)
        and 2 * sum(_BARE_SIGN.search(line) is not None for line in lines) < len(lines)
        and max(map(len, lines), default=0) <= _MAX_PRINTABLE
    )
    if made.is_printable:
        lines = (
            quopri.decodestring("\n".join(lines).encode("latin-1")).decode("latin-1").split("\n")
        )
    plain = [made.unquoted(line) for line in lines]
    prefixes = [made.prefix(line) for line in plain]
    known = [prefix for prefix in prefixes if prefix is not None]
    made.has_comm = 2 * sum(bool(prefix.comm) for prefix in known) > len(known)
    made.has_tid = 2 * sum(prefix.tid != UNKNOWN for prefix in known) > len(known)
    counts = _count_joinable(plain, [p is not None and made.is_whole(p) for p in prefixes], made)
    longest = max((len(line) for line in plain), default=0)
    if len(counts.widths) >= _MIN_WIDTHS and set(counts.widths) == {longest}:
        made.width = longest
    made.is_wrapped = counts.n_joined * _MIN_SHARE >= counts.n_lines and counts.n_joined > 0
    return made if made.is_wrapped or made.is_printable or made.is_quoted else None


def _sample_of(lines: list[str], reader: LineReader) -> list[str]:
    """Return the lines up to _SAMPLE_LINES after the first event, ignoring quotation marks."""
    bare = (line.lstrip("> \t") for line in lines)
    first = (n for n, line in enumerate(bare) if line_formats.match_prefix(line, reader.formats))
    return lines[: next(first, len(lines)) + _SAMPLE_LINES]


def _count_joinable(lines: Sequence[str], begins: Sequence[bool], mender: Mender) -> _WrapCounts:
    """Count the lines that can be joined with the line before, and record its length."""
    counts, before, is_event = _WrapCounts(len(lines)), "", False
    for line, is_begin in zip(lines, begins, strict=True):
        is_rest = not is_begin and before.strip() and not mender.is_other(line)
        if is_rest and mender.joined(before, line, is_event) is not None:
            counts.n_joined += 1
            counts.widths.append(len(before))
        before, is_event = line, is_begin
    return counts
