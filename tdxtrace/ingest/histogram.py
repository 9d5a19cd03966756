"""Reader of histograms: what the script of ``capture plan --dialect histogram`` prints, as JSON.

Each line is one map, or one line of text, in bpftrace's format (bpftrace(8), -f json).  Counts grow
from print to print; an interval is the difference of two.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Final

import polars as pl

from tdxtrace.errors import FormatError, InputError
from tdxtrace.tables.attempt_cells import cell_of
from tdxtrace.tables.histograms import COUNTED_OUTCOMES, REQUEST_COUNTS
from tdxtrace.tables.text import one_line

VERSION: Final = 1
_HEAD: Final = re.compile(r"tdxtrace histogram (\d{1,4}) (\S{1,80}) (\d{1,19})\n?")
_MARK: Final = re.compile(r"(?:at|end) (\d{1,19})\n?")
_BEGINS: Final = '{"type": "printf", "data": "tdxtrace histogram '
# Outcomes by the number in the script: capture/histogram.py.
OUTCOMES: Final = {0: "succeeded", 1: "failed", 2: "resolved_elsewhere", 3: "abandoned"}
# A line of 65,536 keys of 60 characters, twice.
_MAX_LINE_BYTES: Final = 8 << 20
_MAX_COUNT: Final = 2**63
Key = tuple[int, ...]
Counts = dict[Key, int]


@dataclass(slots=True)
class Histogram:
    """Counts of a recorded histogram."""

    kernel: str
    first_ns: int
    last_ns: int
    requests: pl.DataFrame = field(default_factory=REQUEST_COUNTS.empty)
    """The ``request_counts`` table."""
    statuses: Counts = field(default_factory=dict)
    """Calls by process, leaf, bits 63:32 and bits 31:0 of their status."""
    cannot: Counts = field(default_factory=dict)
    """Calls that could not be joined, by leaf and reason."""
    took_ns: dict[int, list[tuple[int, int, int]]] = field(default_factory=dict)
    """By leaf: lower and upper end of a time, ns, and the requests that took so long."""
    n_not_kept: int = 0
    """Requests that did not fit into the map of counts."""
    is_whole: bool = False
    """Whether the script came to its end: else what was open is not known."""


def begins_histogram(text: bytes) -> bool:
    """Return whether a text begins as a histogram does."""
    return text.startswith(_BEGINS.encode())


def is_histogram(path: Path) -> bool:
    """Return whether a file begins as a histogram does."""
    try:
        with path.open("rb") as file:
            return begins_histogram(file.read(len(_BEGINS)))
    except OSError:
        return False


def read_histogram(path: Path) -> Histogram:
    """Read a histogram.

    Args:
        path: What the script printed, with -f json.

    Raises:
        InputError: If the file cannot be read.
        FormatError: If it is no histogram, or a line of it is damaged; the message names the line.
    """
    try:
        with path.open("rb") as file:
            return _read(file, one_line(str(path), 80))
    except OSError as error:
        raise InputError(f"cannot read {one_line(str(path), 80)}: {error.strerror}") from None


def _read(file: BinaryIO, name: str) -> Histogram:
    reader = HistogramReader(name)
    for line in iter(lambda: file.readline(_MAX_LINE_BYTES), b""):
        reader.read_line(line)
    return reader.result()


class HistogramReader:
    """Reader of a histogram line by line."""

    def __init__(self, name: str) -> None:
        """Start; error messages name the input ``name``."""
        self.prints: list[tuple[int, Counts]] = []
        """When counts of requests were printed, and the counts: whole each time."""
        self._name = name
        self._n_lines = 0
        self._found: Histogram | None = None
        self._open_requests: Counts = {}
        self._n_done = 0

    def read_line(self, line: bytes) -> None:
        """Read a line.

        Raises:
            FormatError: If it is damaged, or the first one begins no histogram.
        """
        self._n_lines += 1
        where = f"{self._name}, line {self._n_lines}"
        kind, data = _parse_line(line, where)
        if self._found is not None:
            self._read_data(self._found, kind, data, where)
        elif kind:
            if kind != "printf":
                raise FormatError(f"{where}: not the start of a tdxtrace histogram")
            self._found = _parse_head(str(data), self._name)

    def _read_data(self, found: Histogram, kind: str, data: object, where: str) -> None:
        if kind == "printf" and (mark := _MARK.fullmatch(str(data))):
            found.last_ns = int(mark[1])
            found.is_whole = str(data).startswith("end")
        elif kind in ("map", "hist") and isinstance(data, dict):
            for label, counts in data.items():
                self._read_map(found, label, counts, where)

    def _read_map(self, found: Histogram, label: str, counts: object, where: str) -> None:
        if label == "@requests":
            self.prints.append((found.last_ns, _numbers(counts, 4, where)))
        elif label == "@open":
            self._open_requests = _parse_open(counts, where)
        elif label == "@done":
            self._n_done = sum(_numbers(counts, 2, where).values())
        else:
            _store_map(found, label, counts, where)

    def result(self) -> Histogram:
        """Return the histogram read so far, with its table.

        Raises:
            FormatError: If nothing was read, or counts fall.
        """
        if self._found is None:
            raise FormatError(f"{self._name}: it is empty")
        self._found.requests = _rows(self._found, self.prints, self._open_requests)
        if self.prints:
            self._found.n_not_kept = max(0, self._n_done - sum(self.prints[-1][1].values()))
        return self._found


def _parse_line(line: bytes, where: str) -> tuple[str, object]:
    """Kind and data of a line; a blank line has neither."""
    if not line.strip():
        return "", None
    try:
        made = json.loads(line)
        return str(made["type"]), made["data"]
    except (ValueError, RecursionError, KeyError, TypeError):
        raise FormatError(
            f"{where}: damaged, or not output of bpftrace -f json; keep only the lines before it"
        ) from None


def _parse_head(text: str, name: str) -> Histogram:
    head = _HEAD.fullmatch(text)
    if head is None:
        raise FormatError(
            f"{name}: not a tdxtrace histogram; print its script with tdxtrace capture plan"
        )
    if int(head[1]) != VERSION:
        raise FormatError(f"{name}: histogram of version {head[1]}, this tdxtrace reads {VERSION}")
    at = int(head[3])
    return Histogram(one_line(head[2], 80), at, at)


def _store_map(found: Histogram, label: str, counts: object, where: str) -> None:
    """Keep a map that is printed whole each time: its last print counts."""
    if label == "@status":
        found.statuses = _statuses(counts, where)
    elif label == "@cannot":
        found.cannot = _numbers(counts, 2, where)
    elif label == "@took_ns" and isinstance(counts, dict):
        found.took_ns = {
            int(leaf): [_times(c, where) for c in cells] for leaf, cells in counts.items()
        }


def _times(cell: dict[str, object], where: str) -> tuple[int, int, int]:
    """Lower end, upper end and count of one cell of a histogram of times."""
    low, high, n = (_number(cell.get(name), where) for name in ("min", "max", "count"))
    return low, high, n


def _number(value: object, where: str) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MAX_COUNT:
        return value
    raise FormatError(f"{where}: {one_line(str(value), 40)} is not a count")


def _numbers(counts: object, n_parts: int, where: str) -> Counts:
    """A map from so many numbers to a count."""
    if not isinstance(counts, dict):
        raise FormatError(f"{where}: not a map")
    return {_key(key, n_parts, where): _number(value, where) for key, value in counts.items()}


def _statuses(counts: object, where: str) -> Counts:
    statuses = _numbers(counts, 4, where)
    for _, leaf, high, low in statuses:
        if leaf >= 1 << 16 or max(high, low) >= 1 << 32:
            raise FormatError(f"{where}: a leaf has 16 bits, each half of a status 32")
    return statuses


def _key(text: str, n_parts: int, where: str) -> Key:
    parts = text.split(",")
    if len(parts) != n_parts or not all(re.fullmatch(r"\d{1,19}", part) for part in parts):
        raise FormatError(f"{where}: {one_line(text, 40)} is not a key of {n_parts} numbers")
    return tuple(int(part) for part in parts)


def _parse_open(counts: object, where: str) -> Counts:
    """Requests that were open at the end, by leaf and attempts."""
    if not isinstance(counts, dict):
        raise FormatError(f"{where}: not a map")
    found: Counter[Key] = Counter()
    for key, value in counts.items():
        leaf = _key(key, 5, where)[1]
        if not isinstance(value, list) or len(value) != 5:
            raise FormatError(f"{where}: an open request has five numbers")
        found[_number(value[4], where), leaf, cell_of(_number(value[0], where))] += 1
    return dict(found)


def _rows(
    found: Histogram, prints: list[tuple[int, Counts]], open_requests: Counts
) -> pl.DataFrame:
    """The ``request_counts`` table: differences of prints, and what was open at the end."""
    rows: list[tuple[int, int, int, int, int, str, int, int]] = []
    before: Counts = {}
    begin = found.first_ns
    for number, (end, counts) in enumerate(prints, 1):
        for (tgid, leaf, outcome, n), total in sorted(counts.items()):
            if more := total - before.get((tgid, leaf, outcome, n), 0):
                name = OUTCOMES.get(outcome)
                if name is None or more < 0:
                    raise FormatError(
                        "counts of the histogram decrease, or have an unknown outcome"
                    )
                rows.append((number, begin, end, tgid, leaf, name, n, more))
        before, begin = counts, end
    last = max(1, len(prints))
    start = prints[-2][0] if len(prints) > 1 else found.first_ns
    for (tgid, leaf, n), count in sorted(open_requests.items()):
        rows.append((last, start, found.last_ns, tgid, leaf, COUNTED_OUTCOMES[-1], n, count))
    return REQUEST_COUNTS.conform(
        pl.DataFrame(rows, schema=REQUEST_COUNTS.schema, orient="row").sort(REQUEST_COUNTS.key)
    )
