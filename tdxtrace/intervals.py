"""Confidence intervals of shares and sums, and the effect of clustering on them."""

from __future__ import annotations

from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# Confidence of the intervals of curves and policies.
CONFIDENCE: Final = 0.95


def exact_interval(share: Floats, n: Floats, confidence: float) -> tuple[Floats, Floats]:
    """Return the exact binomial intervals of observed shares.

    Args:
        share: Observed shares, 0 to 1.
        n: Number of trials of each share; effective numbers may be fractional.
        confidence: Of the two-sided interval; each end alone has (1 + confidence) / 2.

    Returns:
        Lower and upper ends. For a share of 0 at 0.95 one-sided, the upper end is the rule of
        three.

    Sources:
        C. J. Clopper, E. S. Pearson, Biometrika 26 (1934) 404, as quantiles of the beta
        distribution.

    Example:
        >>> import numpy as np
        >>> low, high = exact_interval(np.array([0.0]), np.array([1000.0]), 0.9)
        >>> print(f"{low[0]:g} {high[0]:.4f}")
        0 0.0030
    """
    from scipy import special

    hits, misses = share * n, (1 - share) * n
    tail = (1 - confidence) / 2
    with np.errstate(invalid="ignore", divide="ignore"):
        low = special.betaincinv(hits, misses + 1, tail)
        high = special.betaincinv(hits + 1, misses, 1 - tail)
    return (
        np.where(hits > 0, np.minimum(low, share), 0.0),
        np.where(misses > 0, np.maximum(high, share), 1.0),
    )


def few_clusters_factor(n_episodes: Floats, confidence: float) -> Floats:
    """Return the factor that corrects a design effect estimated from few episodes.

    Args:
        n_episodes: Number of episodes that the design effect was estimated from.
        confidence: Confidence of the interval that the design effect widens.

    Sources:
        E. L. Korn, B. I. Graubard, Survey Methodology 24 (1998) 193: the squared ratio
        of Student's quantile, with one less degrees of freedom than clusters, to the
        normal one.
    """
    # scipy.stats has the same functions but takes three times as long to import.
    from scipy import special

    level = (1 + confidence) / 2
    degrees_of_freedom = np.maximum(n_episodes - 1.0, 1.0)
    ratio: Floats = (special.stdtrit(degrees_of_freedom, level) / special.ndtri(level)) ** 2
    return ratio


def chi_square_p(square: Floats, freedom: Floats) -> Floats:
    """Return the p-value of a chi-square statistic with ``freedom`` degrees of freedom."""
    from scipy import special

    p: Floats = special.chdtrc(freedom, square)
    return p


def chi_square_quantile(freedom: Floats, below: float) -> Floats:
    """Return the ``below`` quantile of chi-square with ``freedom`` degrees of freedom."""
    from scipy import special

    quantile: Floats = special.chdtri(freedom, 1 - below)
    return quantile


def student_p(t: Floats, freedom: Floats) -> Floats:
    """Return the two-sided p-value of Student's t; ``t`` must not be negative."""
    from scipy import special

    p: Floats = 2 * special.stdtr(freedom, -t)
    return p


# Arbitrary, but fixed, so that runs are reproducible.
_SEED: Final = 20240910
# Enough for the ends of a 95 % interval: 25 resamples lie beyond each.
_RESAMPLES: Final = 1000
# With more episodes the resampled sum is close to normal and is not drawn: its variance is the
# sum of the squares.
_MAX_RESAMPLED: Final = 1000


def interval_of_sum(by_episode: Floats, confidence: float) -> tuple[float, float]:
    """Return the bootstrap interval of a sum over episodes.

    Each episode is drawn a Poisson number of times, as in another recording of the same host and
    length (the number of episodes is random too).  The seed is fixed.

    Args:
        by_episode: Summand of each episode, ordered by time.
        confidence: Of the two-sided interval.

    Returns:
        Both ends; 0 and 0 without episodes.

    Sources:
        B. Efron, R. J. Tibshirani, An Introduction to the Bootstrap (1993), chapter 13:
        percentile intervals.  Clusters as the unit: A. C. Davison, D. V. Hinkley,
        Bootstrap Methods and their Application (1997), section 3.8.
    """
    if not len(by_episode):
        return 0.0, 0.0
    total = float(by_episode.sum())
    tails = ((1 - confidence) / 2, (1 + confidence) / 2)
    if len(by_episode) > _MAX_RESAMPLED:
        from scipy import special

        below, above = special.ndtri(tails) * np.sqrt((by_episode**2).sum())
        return max(total + float(below), 0.0), total + float(above)
    sums = _poisson_weights(len(by_episode)) @ by_episode
    low, high = np.quantile(sums, tails)
    return min(float(low), total), max(float(high), total)


@lru_cache(maxsize=8)
def _poisson_weights(n: int) -> NDArray[np.int64]:
    """Return how often each resample (row) draws each of ``n`` episodes (column); fixed seed."""
    chance = np.random.Generator(np.random.PCG64(_SEED))
    return chance.poisson(1.0, (_RESAMPLES, n))
