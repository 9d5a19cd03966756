"""How sure a sum over bursts is: whole episodes resampled, with a fixed seed."""

from __future__ import annotations

from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# Any number; fixed, so that two runs say the same.
_SEED: Final = 20240910
# Enough for the ends of a 95 % interval: 25 resamples lie beyond each.
_RESAMPLES: Final = 1000
# Beyond so many episodes the resampled sum is as good as normal and need not be drawn: its
# variance is the sum of the squares.
_MOST: Final = 1000


def interval_of_sum(by_episode: Floats, confidence: float) -> tuple[float, float]:
    """Return the interval of a total, resampling the episodes it is the sum of.

    Each episode is taken a Poisson number of times, as if the same host had run once more
    for as long (a bootstrap in which the number of episodes is chance too).

    Args:
        by_episode: What each episode adds, in the order of time.
        confidence: Of the two-sided interval.

    Returns:
        Both ends; 0 and 0 where there was no episode.

    Sources:
        B. Efron, R. J. Tibshirani, An Introduction to the Bootstrap (1993), chapter 13:
        percentile intervals.  Clusters as the unit: A. C. Davison, D. V. Hinkley,
        Bootstrap Methods and their Application (1997), section 3.8.
    """
    if not len(by_episode):
        return 0.0, 0.0
    total = float(by_episode.sum())
    tails = ((1 - confidence) / 2, (1 + confidence) / 2)
    if len(by_episode) > _MOST:
        from scipy import stats

        below, above = stats.norm.ppf(tails) * np.sqrt((by_episode**2).sum())
        return max(total + float(below), 0.0), total + float(above)
    sums = _times(len(by_episode)) @ by_episode
    low, high = np.quantile(sums, tails)
    return min(float(low), total), max(float(high), total)


@lru_cache(maxsize=8)
def _times(n: int) -> NDArray[np.int64]:
    """How often each of ``n`` episodes is taken, resample by resample; the same each time."""
    chance = np.random.Generator(np.random.PCG64(_SEED))
    return chance.poisson(1.0, (_RESAMPLES, n))
