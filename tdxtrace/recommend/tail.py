"""Generalised Pareto model of the tail of needed attempts: fit, goodness of fit, quantiles."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from tdxtrace.intervals import Floats

# A tail with a shape of 1 or more has no mean; one with a shape below 0 has an upper end, which
# cannot be assumed of busy answers.
_MAX_SHAPE: Final = 1.5
# Below this shape, the generalised Pareto tail numerically equals the geometric tail.
_GEOMETRIC: Final = 1e-6
# Critical value of the likelihood ratio at 5 %.  A shape of 0 is at the boundary of its range, so
# the statistic is half of a chi-square with one degree of freedom (S. G. Self, K.-Y. Liang,
# J. Am. Stat. Assoc. 82 (1987) 605).
_CHI2_AT_BOUNDARY: Final = 2.706
# Smallest expected count of a cell of a chi-square test (W. G. Cochran, Biometrics 10 (1954) 417).
_MIN_EXPECTED: Final = 5.0


@dataclass(frozen=True, slots=True)
class TailSample:
    """Requests that needed more than ``threshold``, grouped by step."""

    threshold: float
    below: Floats
    """By step: the largest value below it."""
    at: Floats
    """By step: its value; requests done here needed more than ``below`` and at most ``at``."""
    n_done: Floats
    n_censored: Floats
    """Requests that were censored here: they needed more than ``at``."""
    share: float
    """Estimate of P(a request needs more than the threshold)."""
    n: float
    """Effective number of independent requests from which ``share`` was estimated."""
    weight: float
    """Weight of one request of the tail: the reciprocal of the design effect."""


@dataclass(frozen=True, slots=True)
class Tail:
    """A fitted generalised Pareto tail; with shape 0 it is the geometric tail.

    P(X > x) = share * (1 + shape (x - threshold) / scale) ** (-1 / shape), at whole steps.

    Sources:
        A. C. Davison, R. L. Smith, J. R. Statist. Soc. B 52 (1990) 393: exceedances of a
        threshold, profile likelihood for quantiles beyond the data.
    """

    sample: TailSample
    shape: float
    scale: float
    is_geometric: bool
    goodness: float
    best: float
    """Logarithm of the likelihood at its maximum, with free shape."""

    def exceedance(self, x: float) -> float:
        """Return P(a request needs more than ``x``) under the chosen model."""
        excess = np.array([x - self.sample.threshold])
        return self.sample.share * float(np.exp(_log_survival(excess, self.shape, self.scale))[0])

    def quantile(self, target: float) -> float:
        """Return the value x with P(a request needs more than x) = ``target``."""
        return self.sample.threshold + _excess_quantile(
            target / self.sample.share, self.shape, self.scale
        )

    @property
    def n(self) -> float:
        """Effective number of requests that the tail was fitted to."""
        return self.sample.weight * float(self.sample.n_done.sum() + self.sample.n_censored.sum())

    def bound(self, target: float, confidence: float, upper: float) -> float:
        """Return one end of the interval of the quantile, by profile likelihood.

        The maximum likelihood estimate of the shape is biased low by a known fraction of its
        standard error; an upper end is moved up by the same amount. Student's quantile replaces
        the normal one.

        Args:
            target: P(X > quantile).
            confidence: One-sided; above 1/2 for an upper end, below 1/2 for a lower end.
            upper: Upper bound of the search.

        Returns:
            The end; ``inf`` if it exceeds ``upper``, the threshold if it lies below that.

        Sources:
            D. E. Giles, H. Feng, R. T. Godwin, Communications in Statistics - Theory and
            Methods 45 (2016) 2465: the bias, -(1 + k)(3 + k) / (n (1 + 2 k)) for a shape k
            whose standard error is (1 + k) / sqrt(n).
        """
        from scipy import optimize, special

        z = float(special.stdtrit(max(self.n - 2, 1), confidence))
        if z > 0:
            z += (3 + self.shape) / ((1 + 2 * self.shape) * math.sqrt(self.n))
        middle = self.quantile(target)
        start = self.sample.threshold

        def drop_minus_z2(log_x: float) -> float:
            return self._likelihood_drop(math.exp(log_x), target) - z * z

        if z > 0:
            if middle >= upper or self._likelihood_drop(upper - start, target) < z * z:
                return math.inf
            ends = (math.log(middle - start), math.log(upper - start))
        else:
            ends = (math.log(max(1e-3 * (middle - start), 1e-9)), math.log(middle - start))
            if drop_minus_z2(ends[0]) < 0:
                return start
        if drop_minus_z2(ends[0]) * drop_minus_z2(ends[1]) > 0:
            return middle
        return start + math.exp(optimize.brentq(drop_minus_z2, *ends, xtol=1e-4))

    def _likelihood_drop(self, excess: float, target: float) -> float:
        """Return twice the drop in log likelihood if the quantile is threshold + ``excess``."""
        sample = self.sample
        spread = math.sqrt((1 - sample.share) / (sample.share * sample.n))

        def loss(at: Floats) -> float:
            shape = min(max(float(at[0]), 0.0), _MAX_SHAPE)
            share = min(sample.share * math.exp(float(at[1]) * spread), 1 - 1e-12)
            if share <= target:
                return math.inf
            scale = _scale(excess, target / share, shape)
            outside = abs(float(at[0]) - shape)
            return (
                1e3 * outside
                - _log_likelihood(sample, shape, scale)
                - _log_likelihood_of_share(sample, share)
            )

        found = _minimize(loss, (max(self.shape, 0.05), 0.0), (0.15, 0.5))
        return max(2 * (self.best + float(found.fun)), 0.0)


def fit(sample: TailSample) -> Tail:
    """Fit the tail by maximum likelihood, and choose between geometric and generalised Pareto.

    Args:
        sample: The requests of the tail, at least one of them done.
    """
    from scipy import optimize

    mean = float((sample.n_done @ (sample.at - sample.threshold)) / sample.n_done.sum())

    def geometric(log_scale: float) -> float:
        return -_log_likelihood(sample, 0.0, math.exp(log_scale))

    def pareto(at: Floats) -> float:
        shape = min(max(float(at[0]), 0.0), _MAX_SHAPE)
        outside = abs(float(at[0]) - shape)
        return 1e3 * outside - _log_likelihood(sample, shape, math.exp(float(at[1])))

    around = (math.log(mean) - 6, math.log(mean) + 6)
    geometric_fit = optimize.minimize_scalar(geometric, bounds=around, method="bounded")
    pareto_fit = _minimize(pareto, (0.1, float(geometric_fit.x)), (0.2, -0.3))
    best = max(-float(pareto_fit.fun), -float(geometric_fit.fun))
    is_geometric = 2 * (best + float(geometric_fit.fun)) < _CHI2_AT_BOUNDARY
    shape = 0.0 if is_geometric else min(max(float(pareto_fit.x[0]), 0.0), _MAX_SHAPE)
    scale = math.exp(float(geometric_fit.x if is_geometric else pareto_fit.x[1]))
    of_share = _log_likelihood_of_share(sample, sample.share)
    p = _goodness(sample, shape, scale, 1 if is_geometric else 2)
    return Tail(sample, shape, scale, is_geometric, p, best + of_share)


def _minimize(
    loss: Callable[[Floats], float], start: tuple[float, float], step: tuple[float, float]
) -> Any:  # noqa: ANN401 - scipy has no types
    """Minimize a function of two variables by Nelder-Mead, with given start and initial steps."""
    from scipy import optimize

    simplex = np.array([start, (start[0] + step[0], start[1]), (start[0], start[1] + step[1])])
    options = {"initial_simplex": simplex, "xatol": 1e-4, "fatol": 1e-4}
    return optimize.minimize(loss, np.array(start), method="Nelder-Mead", options=options)


def _log_survival(excess: Floats, shape: float, scale: float) -> Floats:
    """Return the logarithm of P(X > threshold + excess | X > threshold)."""
    if shape < _GEOMETRIC:
        return -excess / scale
    logs: Floats = -np.log1p(shape * excess / scale) / shape
    return logs


def _excess_quantile(share: float, shape: float, scale: float) -> float:
    """Return the excess at which P(X > threshold + excess | X > threshold) is ``share``."""
    if shape < _GEOMETRIC:
        return -scale * math.log(share)
    return scale * math.expm1(-shape * math.log(share)) / shape


def _scale(excess: float, share: float, shape: float) -> float:
    """Return the scale at which P(X > threshold + excess | X > threshold) is ``share``."""
    return excess / _excess_quantile(share, shape, 1.0)


def _log_likelihood(sample: TailSample, shape: float, scale: float) -> float:
    low = _log_survival(sample.below - sample.threshold, shape, scale)
    high = _log_survival(sample.at - sample.threshold, shape, scale)
    inside = low + np.log(-np.expm1(np.minimum(high - low, -1e-300)))
    return sample.weight * float(sample.n_done @ inside + sample.n_censored @ high)


def _log_likelihood_of_share(sample: TailSample, share: float) -> float:
    observed = sample.share * sample.n
    return (
        observed * math.log(share) + (sample.n - observed) * math.log1p(-share)
        if share < 1
        else 0.0
    )


def _goodness(sample: TailSample, shape: float, scale: float, n_fitted: int) -> float:
    """Return the p-value of Pearson's chi-square, with neighbouring steps merged.

    Censored requests count neither as observed nor as expected: the expected count of a step is
    its probability times the requests still at risk.
    """
    from scipy import special

    leaving = sample.n_done + sample.n_censored
    at_risk = np.cumsum(leaving[::-1])[::-1]
    low = _log_survival(sample.below - sample.threshold, shape, scale)
    high = _log_survival(sample.at - sample.threshold, shape, scale)
    # Expected counts between two steps at which a request was done or censored.
    between_steps = at_risk * -np.expm1(low - np.concatenate([[0.0], high[:-1]]))
    here = at_risk * -np.expm1(high - low)
    observed = np.column_stack([np.zeros_like(between_steps), sample.n_done]).ravel()
    expected = np.column_stack([between_steps, here]).ravel()
    cells: list[tuple[float, float]] = []
    done = expected_n = 0.0
    for n_seen, n_expected in zip(observed, expected, strict=True):
        done, expected_n = done + float(n_seen), expected_n + float(n_expected)
        if expected_n * sample.weight >= _MIN_EXPECTED:
            cells.append((done, expected_n))
            done = expected_n = 0.0
    if len(cells) <= n_fitted:
        return 1.0
    square = sample.weight * sum((n - cell) ** 2 / cell for n, cell in cells)
    return float(special.chdtrc(max(len(cells) - n_fitted, 1), square))
