"""Formatting of numbers: durations, counts, words, shares."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import polars as pl

_STEPS: Final = ((1_000_000_000, "s"), (1_000_000, "ms"), (1_000, "us"), (1, "ns"))


def duration(ns: int | None) -> str:
    """Return a time in ns with three significant digits and a unit, ``-`` for None.

    Example:
        >>> duration(1_234_567), duration(999), duration(None)
        ('1.23 ms', '999 ns', '-')
    """
    if ns is None:
        return "-"
    for step, unit in _STEPS:
        if abs(ns) >= step:
            return (
                f"{ns / step:.3g} {unit}" if abs(ns) < 1000 * step else f"{ns / step:,.0f} {unit}"
            )
    return "0 ns"


def short_duration(ns: int | None) -> str:
    """Return :func:`duration` without the space, for narrow columns."""
    return duration(ns).replace(" ", "")


def clock_text(name: str, resolution_ns: int) -> str:
    """Return a clock and its resolution.

    Args:
        name: As ``Source.clock`` names it.
        resolution_ns: Its resolution in ns.

    Example:
        >>> clock_text("unnamed", 1_000)
        'unknown, 1 us resolution'
    """
    known = "unknown" if name == "unnamed" else name
    return f"{known}, {duration(resolution_ns)} resolution"


def seconds(ns: int | None) -> str:
    """Return a time in ns as seconds with nine decimals, ``-`` for None."""
    return "-" if ns is None else f"{ns // 1_000_000_000}.{ns % 1_000_000_000:09}"


def count(n: int | None) -> str:
    """Return a number with thousands separators, ``-`` for None."""
    return "-" if n is None else f"{n:,}"


def word(value: int | None) -> str:
    """Return a word in hex, ``-`` for None."""
    return "-" if value is None else f"{value:#x}"


def share(part: int, whole: int) -> str:
    """Return ``part`` of ``whole`` in percent; a share below 1 % has one significant digit.

    Example:
        >>> share(1, 3), share(0, 5), share(1, 100_000), share(0, 0)
        ('33 %', '0 %', '0.001 %', '-')
    """
    if whole == 0:
        return "-"
    percent = 100 * part / whole
    if part == 0 or percent >= 1:
        return f"{percent:.0f} %"
    return f"{percent:.1g} %"


def plural(n: int, noun: str, many: str | None = None) -> str:
    """Return ``n`` and ``noun``, in the plural unless ``n`` is 1: ``many``, or with an s.

    Example:
        >>> plural(1, "gap"), plural(1200, "gap"), plural(2, "entry", "entries")
        ('1 gap', '1,200 gaps', '2 entries')
    """
    return f"{n:,} {noun if n == 1 else many or noun + 's'}"


def total(frame: pl.DataFrame, column: str) -> int:
    """Return the sum of an integer column, without nulls."""
    return int(frame[column].sum())
