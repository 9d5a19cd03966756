"""How far does a tail reach that was not seen to its end: a model, its fit, its interval."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# Shapes above this have no mean and nothing to recommend; below 0 a tail would end at a
# number, which no count of busy answers can promise.
_MAX_SHAPE: Final = 1.5
# Below this the generalised Pareto tail is the geometric one to the last digit.
_GEOMETRIC: Final = 1e-6
# The shape is at the border of its range if it is 0: half of a chi-square with one degree
# of freedom (S. G. Self, K.-Y. Liang, J. Am. Stat. Assoc. 82 (1987) 605), at 5 %.
_BORDER: Final = 2.706
# Cells of a chi-square test should expect so many at the least (W. G. Cochran, Biometrics
# 10 (1954) 417).
_CELL: Final = 5.0


@dataclass(frozen=True, slots=True)
class Seen:
    """What a tail is fitted to: requests that needed more than ``threshold``."""

    threshold: float
    below: Floats
    """For each step seen: the largest value before it."""
    at: Floats
    """The step: requests that were done here needed more than ``below`` and no more."""
    n_done: Floats
    n_censored: Floats
    """Requests that needed more than ``at``."""
    share: float
    """P(a request needs more than the threshold), as estimated."""
    n: float
    """Independent requests that tell as much as all do, the share's trials."""
    weight: float
    """What one request of the tail counts: one over the design effect."""


@dataclass(frozen=True, slots=True)
class Tail:
    """A fitted generalised Pareto tail, of which the geometric one is that of shape 0.

    P(X > x) = share * (1 + shape (x - threshold) / scale) ** (-1 / shape), at whole steps.

    Sources:
        A. C. Davison, R. L. Smith, J. R. Statist. Soc. B 52 (1990) 393: exceedances of a
        threshold, profile likelihood for what lies beyond the data.
    """

    seen: Seen
    shape: float
    scale: float
    is_geometric: bool
    goodness: float
    best: float
    """Logarithm of the likelihood at its maximum, shape free."""

    def more(self, x: float) -> float:
        """P(a request needs more than ``x``), as the chosen model estimates it."""
        beyond = np.array([x - self.seen.threshold])
        return self.seen.share * float(np.exp(_log_more(beyond, self.shape, self.scale))[0])

    def quantile(self, target: float) -> float:
        """Where the estimate falls to ``target``."""
        return self.seen.threshold + _beyond(target / self.seen.share, self.shape, self.scale)

    @property
    def n(self) -> float:
        """Independent requests that the tail was fitted to."""
        return self.seen.weight * float(self.seen.n_done.sum() + self.seen.n_censored.sum())

    def bound(self, target: float, confidence: float, most: float) -> float:
        """Return one end of the interval of the quantile, by the profile likelihood.

        The likeliest shape is too small on average, by a known part of its standard error;
        an upper end lies further out by as much. Student's quantile stands for the normal
        one.

        Args:
            target: P(X > quantile).
            confidence: One-sided: above 1/2 that of an upper end, below that of a lower.
            most: Where to give up.

        Returns:
            The end; ``inf`` beyond ``most``, the threshold where it lies below.

        Sources:
            D. E. Giles, H. Feng, R. T. Godwin, Communications in Statistics - Theory and
            Methods 45 (2016) 2465: the bias, -(1 + k)(3 + k) / (n (1 + 2 k)) for a shape k
            whose standard error is (1 + k) / sqrt(n).
        """
        from scipy import optimize, stats

        z = float(stats.t.ppf(confidence, max(self.n - 2, 1)))
        if z > 0:
            z += (3 + self.shape) / ((1 + 2 * self.shape) * math.sqrt(self.n))
        middle = self.quantile(target)
        start = self.seen.threshold

        def beyond_z(log_x: float) -> float:
            return self._drop(math.exp(log_x), target) - z * z

        if z > 0:
            if middle >= most or self._drop(most - start, target) < z * z:
                return math.inf
            ends = (math.log(middle - start), math.log(most - start))
        else:
            ends = (math.log(max(1e-3 * (middle - start), 1e-9)), math.log(middle - start))
            if beyond_z(ends[0]) < 0:
                return start
        if beyond_z(ends[0]) * beyond_z(ends[1]) > 0:
            return middle
        return start + math.exp(optimize.brentq(beyond_z, *ends, xtol=1e-4))

    def _drop(self, beyond: float, target: float) -> float:
        """Twice the fall of the log likelihood if the quantile were ``beyond`` the threshold."""
        seen = self.seen
        spread = math.sqrt((1 - seen.share) / (seen.share * seen.n))

        def loss(at: Floats) -> float:
            shape = min(max(float(at[0]), 0.0), _MAX_SHAPE)
            share = min(seen.share * math.exp(float(at[1]) * spread), 1 - 1e-12)
            if share <= target:
                return math.inf
            scale = _scale(beyond, target / share, shape)
            outside = abs(float(at[0]) - shape)
            return 1e3 * outside - _log_likelihood(seen, shape, scale) - _of_share(seen, share)

        found = _least(loss, (max(self.shape, 0.05), 0.0), (0.15, 0.5))
        return max(2 * (self.best + float(found.fun)), 0.0)


def fit(seen: Seen) -> Tail:
    """Fit the tail by maximum likelihood, and choose between geometric and heavier.

    Args:
        seen: What is known of the tail; at least one request in it was done.
    """
    from scipy import optimize

    mean = float((seen.n_done @ (seen.at - seen.threshold)) / seen.n_done.sum())

    def geometric(log_scale: float) -> float:
        return -_log_likelihood(seen, 0.0, math.exp(log_scale))

    def pareto(at: Floats) -> float:
        shape = min(max(float(at[0]), 0.0), _MAX_SHAPE)
        outside = abs(float(at[0]) - shape)
        return 1e3 * outside - _log_likelihood(seen, shape, math.exp(float(at[1])))

    around = (math.log(mean) - 6, math.log(mean) + 6)
    light = optimize.minimize_scalar(geometric, bounds=around, method="bounded")
    heavy = _least(pareto, (0.1, float(light.x)), (0.2, -0.3))
    best = max(-float(heavy.fun), -float(light.fun))
    is_geometric = 2 * (best + float(light.fun)) < _BORDER
    shape = 0.0 if is_geometric else min(max(float(heavy.x[0]), 0.0), _MAX_SHAPE)
    scale = math.exp(float(light.x if is_geometric else heavy.x[1]))
    of_share = _of_share(seen, seen.share)
    p = _goodness(seen, shape, scale, 1 if is_geometric else 2)
    return Tail(seen, shape, scale, is_geometric, p, best + of_share)


def _least(
    loss: Callable[[Floats], float], start: tuple[float, float], step: tuple[float, float]
) -> Any:  # noqa: ANN401 - scipy has no types
    """Where a function of two numbers is least, looked for from ``start`` in such steps."""
    from scipy import optimize

    simplex = np.array([start, (start[0] + step[0], start[1]), (start[0], start[1] + step[1])])
    options = {"initial_simplex": simplex, "xatol": 1e-4, "fatol": 1e-4}
    return optimize.minimize(loss, np.array(start), method="Nelder-Mead", options=options)


def _log_more(beyond: Floats, shape: float, scale: float) -> Floats:
    """Logarithm of P(X > threshold + beyond | X > threshold)."""
    if shape < _GEOMETRIC:
        return -beyond / scale
    logs: Floats = -np.log1p(shape * beyond / scale) / shape
    return logs


def _beyond(share: float, shape: float, scale: float) -> float:
    """Where P(X > threshold + beyond | X > threshold) is ``share``."""
    if shape < _GEOMETRIC:
        return -scale * math.log(share)
    return scale * math.expm1(-shape * math.log(share)) / shape


def _scale(beyond: float, share: float, shape: float) -> float:
    """The scale that makes it so."""
    return beyond / _beyond(share, shape, 1.0)


def _log_likelihood(seen: Seen, shape: float, scale: float) -> float:
    low = _log_more(seen.below - seen.threshold, shape, scale)
    high = _log_more(seen.at - seen.threshold, shape, scale)
    inside = low + np.log(-np.expm1(np.minimum(high - low, -1e-300)))
    return seen.weight * float(seen.n_done @ inside + seen.n_censored @ high)


def _of_share(seen: Seen, share: float) -> float:
    met = seen.share * seen.n
    return met * math.log(share) + (seen.n - met) * math.log1p(-share) if share < 1 else 0.0


def _goodness(seen: Seen, shape: float, scale: float, n_fitted: int) -> float:
    """The p-value of Pearson's chi-square, neighbouring steps taken together.

    Censored requests are left out of both sides: each step expects its share of those
    that were still there.
    """
    from scipy import stats

    leaving = seen.n_done + seen.n_censored
    at_risk = np.cumsum(leaving[::-1])[::-1]
    low = _log_more(seen.below - seen.threshold, shape, scale)
    high = _log_more(seen.at - seen.threshold, shape, scale)
    # Where nobody left, from one step that was seen to the next, some were expected too.
    silent = at_risk * -np.expm1(low - np.concatenate([[0.0], high[:-1]]))
    here = at_risk * -np.expm1(high - low)
    met = np.column_stack([np.zeros_like(silent), seen.n_done]).ravel()
    expected = np.column_stack([silent, here]).ravel()
    cells: list[tuple[float, float]] = []
    done = hoped = 0.0
    for one, more in zip(met, expected, strict=True):
        done, hoped = done + float(one), hoped + float(more)
        if hoped * seen.weight >= _CELL:
            cells.append((done, hoped))
            done = hoped = 0.0
    if len(cells) <= n_fitted:
        return 1.0
    square = seen.weight * sum((n - more) ** 2 / more for n, more in cells)
    return float(stats.chi2.sf(square, max(len(cells) - n_fitted, 1)))
