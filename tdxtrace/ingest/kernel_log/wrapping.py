"""Restore lines of a kernel log that a mailer or a terminal wrapped.

A line without a prefix, after a line with one, continues that line, unless both are messages. It is
joined with the lines before it if together they have more fields than the first alone. Where it
cannot be determined whether a number was cut, the lines are a loss: ``wrapped``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Final, NamedTuple

from tdxtrace.ingest.kernel_log import messages, prefixes
from tdxtrace.ingest.kernel_log.messages import MessageFields
from tdxtrace.ingest.kernel_log.prefixes import LogLine
from tdxtrace.tdx import releases
from tdxtrace.tdx.word import ERROR_BIT

# A message has some 150 characters, a narrow terminal 40 columns.
_MAX_LINES: Final = 6


class WholeLine(NamedTuple):
    """A line of a log, restored to what was printed."""

    number: int
    """Number of its first line in the input."""
    n_lines: int
    line: LogLine
    n_bytes: int
    raw: str
    """The first line with its prefix."""
    is_cut: bool = False
    """Whether a number may have been cut."""


@dataclass(slots=True)
class LogMender:
    """Joins wrapped lines of one log."""

    _pending: list[WholeLine] = field(default_factory=list)
    """A line with a prefix, and the lines without one that follow it."""

    def feed(self, number: int, line: LogLine, raw: str, n_bytes: int) -> Iterator[WholeLine]:
        """Yield each line once its end is certain; ``raw`` is the line with its prefix."""
        begins = bool(self._pending) and _are_separate(self._pending[0].line.text, line.text)
        if line.has_prefix or begins or len(self._pending) == _MAX_LINES:
            yield from self.finish()
        made = WholeLine(number, 1, line, n_bytes, raw)
        if line.has_prefix or begins or self._pending:
            self._pending.append(made)
        else:
            yield made

    def finish(self) -> Iterator[WholeLine]:
        """Yield the lines that are still held back."""
        pending, self._pending = self._pending, []
        if len(pending) < 2:
            yield from pending
            return
        first, texts = pending[0], [made.line.text for made in pending]
        n, text = _unfold(pending)
        if n == 1:
            n, text = join(texts)
        if n == 1 and _parse_fields(text) is None:
            # The line may have been cut within its prefix.
            whole = prefixes.split_prefix(first.raw.rstrip() + texts[1])
            n_more, joined = join([whole.text, *texts[2:]])
            if not joined or _parse_fields(joined) is not None:
                n, text, first = n_more + 1, joined, first._replace(line=whole)
        yield first._replace(
            n_lines=n,
            line=first.line._replace(text=text or first.line.text),
            n_bytes=sum(made.n_bytes for made in pending[:n]),
            is_cut=not text,
        )
        yield from pending[n:]


def _are_separate(first: str, text: str) -> bool:
    """Return whether both lines are messages of their own: of two kinds, or each with a status."""
    one, other = _parse_fields(first), _parse_fields(text)
    if one is None or other is None or "message" not in one or "message" not in other:
        return False
    return one["message"] != other["message"] or ("status" in one and "status" in other)


def _unfold(pending: Sequence[WholeLine]) -> tuple[int, str]:
    """Join lines that a mailer folded as quoted-printable (RFC 2045 6.7).

    A line that continues ends with "=", and "=" itself is written "=3D", so there is only one way
    to join.

    Returns:
        Number of lines and their text; 1 and the first text if they were not folded.
    """
    first = text = pending[0].line.text
    n = 1
    while text.endswith("=") and n < len(pending):
        text = text[:-1] + pending[n].raw.rstrip("\r")
        n += 1
    text = text.replace("=3D", "=")
    is_folded = n > 1 and _rank(_parse_fields(text)) > _rank(_parse_fields(first))
    return (n, text) if is_folded else (1, first)


def join(texts: Sequence[str]) -> tuple[int, str]:
    """Return the number of lines of a message and its text; "" if a number in it may be cut.

    Args:
        texts: The text after a prefix, followed by lines without a prefix.
    """
    best, rank = (1, texts[0]), _rank(_parse_fields(texts[0]))
    readings = [_parse_fields(texts[0])]
    for n in range(2, len(texts) + 1):
        for blanks in product((" ", ""), repeat=n - 1):
            text = texts[0].rstrip() + "".join(
                blank + other.strip() for blank, other in zip(blanks, texts[1:n], strict=True)
            )
            fields = _parse_fields(text)
            if fields is None or _rank(fields) < rank:
                continue
            if _rank(fields) > rank:
                best, rank, readings = (n, text), _rank(fields), []
            readings.append(fields)
    if any(fields != readings[0] for fields in readings if fields is not None):
        return max(best[0], 2), ""
    return best if rank > (False, 0) else _join_about_tdx(texts)


def _rank(fields: MessageFields | None) -> tuple[bool, int]:
    """Return a sort key of a reading: whether its status can be complete, then its field count.

    A status without the error bit may be one that was cut.
    """
    if fields is None:
        return False, 0
    return fields.get("status", ERROR_BIT) >= ERROR_BIT, len(fields)


def _join_about_tdx(texts: Sequence[str]) -> tuple[int, str]:
    """Join lines that only together are about TDX, in a message without fields.

    Returns:
        Number of lines and their text; 1 and the first text if they are not joined.
    """
    if not any(map(messages.is_about_tdx, texts)):
        for blank in (" ", ""):
            whole = blank.join(text.strip() for text in texts)
            if messages.is_about_tdx(whole):
                return len(texts), whole
    return 1, texts[0]


def _parse_fields(text: str) -> MessageFields | None:
    """Return the fields of a message, with its name, or of registers; None for other text."""
    found = messages.parse_message(text)
    if found is not None:
        # The numbers that identify a build are in successive words, and a wrapped line may lack
        # the last ones.
        build = releases.BUILD_LINE.search(text)
        named = {name: word for name, word in build.groupdict().items() if word} if build else {}
        return {"message": found[0], **(named or found[1])}
    rax = messages.RAX.match(text)
    if rax is not None:
        return {"rax": rax["word"]}
    if messages.REGISTERS.match(text) is None:
        return None
    words = (("rcx", messages.RCX.search(text)), ("rdx", messages.RDX.search(text)))
    return {"registers": True} | {name: word["word"] for name, word in words if word is not None}
