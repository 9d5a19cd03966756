"""How sure a share is that was seen among so many: exact intervals, and what bursts cost."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# Of the intervals that curves and policies carry.
CONFIDENCE: Final = 0.95


def exact_interval(share: Floats, n: Floats, confidence: float) -> tuple[Floats, Floats]:
    """Return the exact binomial interval of shares seen among ``n`` trials.

    Numbers of trials may be broken, as effective ones are.

    Args:
        share: Shares seen, 0 to 1.
        n: Trials behind each.
        confidence: Of the two-sided interval; one-sided at (1 + confidence) / 2.

    Returns:
        Lower and upper ends. None seen among n at 0.95 one-sided is the rule of three.

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

    met, not_met = share * n, (1 - share) * n
    tail = (1 - confidence) / 2
    with np.errstate(invalid="ignore", divide="ignore"):
        low = special.betaincinv(met, not_met + 1, tail)
        high = special.betaincinv(met + 1, not_met, 1 - tail)
    return (
        np.where(met > 0, np.minimum(low, share), 0.0),
        np.where(not_met > 0, np.maximum(high, share), 1.0),
    )


def widening(n_episodes: Floats, confidence: float) -> Floats:
    """Return by how much a design effect grows that is known from few episodes only.

    Args:
        n_episodes: Episodes it was found from.
        confidence: Of the interval that it is for.

    Sources:
        E. L. Korn, B. I. Graubard, Survey Methodology 24 (1998) 193: the squared ratio
        of Student's quantile, with one less degrees of freedom than clusters, to the
        normal one.
    """
    from scipy import stats

    middle = (1 + confidence) / 2
    freedom = np.maximum(n_episodes - 1.0, 1.0)
    ratio: Floats = (stats.t.ppf(middle, freedom) / stats.norm.ppf(middle)) ** 2
    return ratio
