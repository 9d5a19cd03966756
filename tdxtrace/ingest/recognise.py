"""Which format is it: told by what the first lines look like, never by the name."""

from __future__ import annotations

import re
from collections import Counter
from typing import Final

from tdxtrace.errors import FormatError, QueryError
from tdxtrace.ingest.source import matched_part
from tdxtrace.tables.clocks import LOG_FORMATS
from tdxtrace.tables.text import one_line
from tdxtrace.tables.trace import BINARY_FORMATS

FORMATS: Final = (
    "ftrace",
    "ftrace-latency",
    "ftrace-verbose",
    "function-graph",
    "perf-script",
    *BINARY_FORMATS,
    *LOG_FORMATS,
)
_BINARY: Final = (
    (b"\x17\x08\x44tracing", "trace.dat"),
    (b"PERFILE2", "perf.data"),
    (b"2ELIFREP", "perf.data"),
)

# Magic numbers of what people pass by mistake, and what to do instead.
_MAGIC: Final = (
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"\x89PNG", "a PNG picture"),
    (b"%PDF", "a PDF document"),
    (b"PK\x03\x04", "a zip archive; unpack it first"),
    (b"BZh", "bzip2; recompress it with zstd, xz or gzip"),
    (b"PAR1", "a Parquet file"),
    (b"\x7fELF", "a program (ELF)"),
)
_SAMPLE_LINES: Final = 2000
_MAGIC_BYTES: Final = 64


def recording(head: bytes) -> str | None:
    """Return the format of a binary recording that begins with ``head``; None if it is none."""
    return next((name for magic, name in _BINARY if head.startswith(magic)), None)


def recognise(head: bytes, shown: str) -> str:
    """Return the format of a text that begins with ``head``.

    Raises:
        FormatError: If no line of it looks like any format; says what it looks like.
    """
    for magic, what in _MAGIC:
        if head.startswith(magic):
            raise FormatError(f"{shown} is {what.replace('FILE', shown)}")
    format_name = voted(head)
    if format_name is not None:
        return format_name
    from tdxtrace.ingest.text import shapes  # noqa: PLC0415 - see _vote

    texts = [text for line in _sample(head) if (text := line.decode("utf-8", "replace")).strip()]
    if any(shapes.HEADER.match(text) or shapes.lost_of(text) for text in texts):
        return "ftrace"
    if any(shapes.NO_CONTEXT.match(text) or shapes.NO_PAYLOAD.match(text) for text in texts):
        return "ftrace"
    raise FormatError(f"{shown} is no trace: {_describe(head)}")


def voted(head: bytes) -> str | None:
    """Return the format that most of the event lines in ``head`` have; None if there is none.

    A text is a log of the kernel only if it has no event line: people put both into one file,
    and an event tells more than a message.
    """
    votes = Counter(name for line in _sample(head) if (name := _vote(line)))
    events = Counter({name: n for name, n in votes.items() if name not in LOG_FORMATS})
    return next((name for name, _ in (events or votes).most_common(1)), None)


def log_format(head: bytes, shown: str) -> str:
    """Return the format of a text that the user says is a log of the kernel.

    Raises:
        FormatError: If it is something else.
    """
    name = voted(head) or LOG_FORMATS[0]
    if name not in LOG_FORMATS or b"\0" in head[:_MAGIC_BYTES]:
        raise FormatError(f"{shown} is no log of the kernel, it looks like {name}; see dmesg(1)")
    return name


def checked(name: str) -> str:
    """Return ``name`` if it is one of FORMATS.

    Raises:
        QueryError: If it is not; names them all.
    """
    if name not in FORMATS:
        raise QueryError(f"unknown format {name!r}; there are: {', '.join(FORMATS)}")
    return name


def _sample(head: bytes) -> list[bytes]:
    head = head.removeprefix(b"\xef\xbb\xbf")
    end = 0
    for _ in range(_SAMPLE_LINES):
        end = head.find(b"\n", end) + 1
        if not end:
            end = len(head)
            break
    return [matched_part(line) for line in head[:end].splitlines()[:_SAMPLE_LINES]]


def _vote(line: bytes) -> str | None:
    # What only text needs is imported only for text: recordings start sooner.
    from tdxtrace.ingest.kernel_log.prefixes import looks_logged  # noqa: PLC0415
    from tdxtrace.ingest.kernel_log.reader import looks_like  # noqa: PLC0415
    from tdxtrace.ingest.text import graph, shapes  # noqa: PLC0415

    text = shapes.QUOTE.sub("", line.decode("utf-8", "replace").rstrip("\r"))
    if text.startswith("#"):
        return None
    if looks_logged(text):
        return LOG_FORMATS[0]
    for name, split in (
        ("ftrace", shapes.split_ftrace),
        ("ftrace-latency", shapes.split_latency),
        ("ftrace-verbose", shapes.split_verbose),
        ("perf-script", shapes.split_perf),
    ):
        if split(text) is not None:
            return name
    return "function-graph" if graph.LINE.match(text) else looks_like(text)


def _describe(head: bytes) -> str:
    if b"\0" in head:
        return "it is binary and of no kind that is known"
    first = next((line for line in head.splitlines() if line.strip()), b"")
    text = one_line(first.decode("utf-8", "replace"), 60)
    if re.match(r"^\w+\(.*\) += ", text):
        return "it looks like strace output; record with trace-cmd, perf or tracefs"
    return (
        f"its first line is {text!r}; expected ftrace, trace-cmd report, perf script or dmesg text"
    )
