"""Numbers as people read them: durations, counts, words, shares."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import polars as pl

_STEPS: Final = ((1_000_000_000, "s"), (1_000_000, "ms"), (1_000, "us"), (1, "ns"))


def duration(ns: int | None) -> str:
    """Return a time in ns with three digits and its unit, ``-`` if it is not known.

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
    """Return a duration without its blank, for narrow columns."""
    return duration(ns).replace(" ", "")


def seconds(ns: int | None) -> str:
    """Return a point in time in seconds with all its digits, ``-`` if it is not known."""
    return "-" if ns is None else f"{ns // 1_000_000_000}.{ns % 1_000_000_000:09}"


def count(n: int | None) -> str:
    """Return a number with thousands apart, ``-`` if it is not known."""
    return "-" if n is None else f"{n:,}"


def word(value: int | None) -> str:
    """Return a raw word in hex, ``-`` if it was not observed."""
    return "-" if value is None else f"{value:#x}"


def share(part: int, whole: int) -> str:
    """Return ``part`` of ``whole`` in percent, with as many digits as it takes not to lie.

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
    """Return ``n`` and ``noun`` in the right number; ``many`` if it is not made with an s.

    Example:
        >>> plural(1, "gap"), plural(1200, "gap"), plural(2, "entry", "entries")
        ('1 gap', '1,200 gaps', '2 entries')
    """
    return f"{n:,} {noun if n == 1 else many or noun + 's'}"


def total(frame: pl.DataFrame, column: str) -> int:
    """Return the sum of a column of whole numbers; null counts nothing."""
    return int(frame[column].sum())
