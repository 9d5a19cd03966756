"""Parsing of times and durations in options."""

from __future__ import annotations

import re
from typing import Final

from tdxtrace.errors import QueryError
from tdxtrace.tables.text import one_line

_TIME: Final = re.compile(
    r"(?P<sign>\+?)(?P<whole>\d{1,12})(?:\.(?P<part>\d{1,9}))?\s?(?P<unit>ns|us|ms|s|min|m|h|)"
)
_NS: Final = {
    **{"ns": 1, "us": 10**3, "ms": 10**6, "s": 10**9, "": 10**9},
    **{"m": 60 * 10**9, "min": 60 * 10**9, "h": 3600 * 10**9},
}
# Range of a signed 64-bit column.
_MAX_NS: Final = 1 << 63


def parse_duration(text: str) -> int:
    """Parse a duration: ``2s``, ``1.5ms``, ``10us``, ``5min``; without a unit, seconds.

    Returns:
        The duration in ns, above 0.

    Raises:
        QueryError: If it is not a duration, is 0, or does not fit into 63 bits.

    Example:
        >>> parse_duration("1.5ms"), parse_duration("2")
        (1500000, 2000000000)
    """
    ns, is_relative = _parsed(text)
    if is_relative or not 0 < ns < _MAX_NS:
        raise QueryError(f"not a time: {one_line(text, 40)!r}; write e.g. 10s, 1.5ms or 5min")
    return ns


def parse_moment(text: str, start_ns: int) -> int:
    """Parse a time on the trace's clock, or ``+`` and a duration after ``start_ns``.

    Returns:
        The time in ns on the trace's clock.

    Raises:
        QueryError: If it is neither.

    Example:
        >>> parse_moment("+10ms", 4_189_000_000_000), parse_moment("4189.25", 0)
        (4189010000000, 4189250000000)
    """
    ns, is_relative = _parsed(text)
    return ns + (start_ns if is_relative else 0)


def _parsed(text: str) -> tuple[int, bool]:
    """Return the time in ns, computed without floats, and whether it begins with ``+``."""
    found = _TIME.fullmatch(text.strip())
    if found is None:
        raise QueryError(
            f"not a time: {one_line(text, 40)!r}; write seconds such as 4189.25, or 1.5ms, or "
            "+0.5s from the start"
        )
    scale = _NS[found["unit"]]
    part = int((found["part"] or "").ljust(9, "0")) * scale // 10**9
    return int(found["whole"]) * scale + part, bool(found["sign"])
