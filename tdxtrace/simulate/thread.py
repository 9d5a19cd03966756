"""A thread of the host: its identity, its CPU, its clock and its random stream."""

from __future__ import annotations

import math
import random
from typing import Final

from tdxtrace.simulate.durations import Duration

_LN2: Final = 0.6931471805599453
_MEDIAN: Final = 0.5
_P99: Final = 0.99


class RandomStream:
    """Random numbers that are the same on every Python and platform.

    Python guarantees only ``random.Random.random()`` not to change between versions, and only
    ``+ - * /`` and ``math.frexp`` are exact on every platform, so every distribution is built from
    these; no library logarithm or exponential is used.

    Args:
        seed: Seed of the run.
        number: Number of the stream, below 2^32: one for each thread.
    """

    __slots__ = ("uniform",)

    def __init__(self, seed: int, number: int) -> None:
        self.uniform = random.Random((seed << 32) + number).random

    def duration(self, duration: Duration) -> int:
        """Draw a time from ``duration``, in ns."""
        low, median = duration.low, duration.median
        if low == duration.high:
            return low
        u = self.uniform()
        if u < _MEDIAN:
            return low + int((median - low) * (u + u))
        if u < _P99:
            x = (u - _MEDIAN) / (_P99 - _MEDIAN)
            return median + int((duration.p99 - median) * (x * x))
        return duration.p99 + int((duration.high - duration.p99) * ((u - _P99) / (1 - _P99)))

    def below(self, n: int) -> int:
        """Draw an integer from 0 to ``n`` - 1."""
        return int(self.uniform() * n)

    def chance(self, probability: float) -> bool:
        """Draw True with a probability."""
        return probability > 0 and self.uniform() < probability

    def exponential(self, mean: int) -> int:
        """Draw from an exponential distribution, such as the time to the next interrupt."""
        return int(mean * -_ln(1.0 - self.uniform()))


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


class Thread:
    """One task of the host, with its CPU and its own clock.

    ``now`` (ns) runs ahead of the simulation's clock between two interactions with other
    threads: the time that a thread spends without interaction is accumulated and waited for
    once (``Machine.sync_clock``).
    """

    __slots__ = (
        "comm",
        "cpu",
        "irqs_enabled",
        "n_calls",
        "n_entries",
        "now",
        "random",
        "retry_reason",
        "tgid",
        "tid",
    )

    def __init__(self, tid: int, tgid: int, comm: str, random: RandomStream) -> None:
        self.random = random
        self.tid = tid
        self.tgid = tgid
        self.comm = comm
        self.cpu = 0
        self.now = 0
        # Number of SEAMCALLs made, and of TDH.VP.ENTER among them.
        self.n_calls = 0
        self.n_entries = 0
        # Whether an interrupt handler may run on its CPU now; true while it waits.
        self.irqs_enabled = False
        # Why the last private fault it served has to be retried: frozen, invalidating or busy.
        self.retry_reason = ""
