"""Where chance comes from: draws that are the same on every Python and platform.

Only ``random.Random.random()`` is promised not to change between Python versions, and
of arithmetic only ``+ - * /`` and ``math.frexp`` are exact on every platform, so every
distribution is built from these; no library logarithm or exponential is used.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Final

_LN2: Final = 0.6931471805599453
_MEDIAN: Final = 0.5
_P99: Final = 0.99


@dataclass(frozen=True, slots=True)
class Span:
    """A time that varies: half of the draws below ``median``, one in a hundred above ``p99``.

    All four are integer nanoseconds.  Between them the quantile is linear, from the
    median to ``p99`` quadratic: a mode near the median and a tail to the right, which
    is what latencies look like; no public source gives a shape for any of them.
    """

    low: int
    median: int
    p99: int
    high: int

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.median <= self.p99 <= self.high:
            raise ValueError(
                f"not a span: {self.low}, {self.median}, {self.p99}, {self.high}; "
                "times are not negative and grow from low over median and p99 to high"
            )

    def scaled(self, factor: float) -> Span:
        """The same shape, ``factor`` times as long."""
        return Span(*(int(ns * factor) for ns in (self.low, self.median, self.p99, self.high)))


def fixed(ns: int) -> Span:
    """A time that does not vary."""
    return Span(ns, ns, ns, ns)


class Draws:
    """One stream of chance: each actor has its own, seeded by the run's seed and its number."""

    __slots__ = ("random",)

    def __init__(self, seed: int, actor: int) -> None:
        # 2^32 actors per seed; Random takes integers of any size.
        self.random = random.Random((seed << 32) + actor).random

    def span(self, span: Span) -> int:
        """Draw a time of ``span``, in ns."""
        low, median = span.low, span.median
        if low == span.high:
            return low
        u = self.random()
        if u < _MEDIAN:
            return low + int((median - low) * (u + u))
        if u < _P99:
            x = (u - _MEDIAN) / (_P99 - _MEDIAN)
            return median + int((span.p99 - median) * (x * x))
        return span.p99 + int((span.high - span.p99) * ((u - _P99) / (1 - _P99)))

    def below(self, n: int) -> int:
        """Draw an integer from 0 to ``n`` - 1."""
        return int(self.random() * n)

    def chance(self, probability: float) -> bool:
        """Draw whether something of this probability happens."""
        return probability > 0 and self.random() < probability

    def exponential(self, mean: int) -> int:
        """Draw the time to the next of events that come at random, ``mean`` ns apart."""
        return int(mean * -_ln(1.0 - self.random()))


def _ln(x: float) -> float:
    """Natural logarithm of ``x`` in (0, 1], by arithmetic that is exact everywhere.

    x = m * 2^e with m in [1/2, 1); ln m = 2 atanh(s) with s = (m-1)/(m+1), |s| <= 1/3,
    so that eleven terms of the series leave less than 1e-11.
    """
    mantissa, exponent = math.frexp(x)
    s = (mantissa - 1.0) / (mantissa + 1.0)
    square, power, total = s * s, s, 0.0
    for odd in range(1, 22, 2):
        total += power / odd
        power *= square
    return 2.0 * total + exponent * _LN2
