"""Curves of ``attempts``, and limits beyond the observed data from a model of their tail."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import polars as pl

from tdxtrace.intervals import Floats, exact_interval
from tdxtrace.recommend import tail
from tdxtrace.tables.limits import TIMES_NS

# The rule of three allows not one request above the limit.  With 1.5 times as many requests, at
# least 90 % of new recordings support the target (tests/bench/needed.py).
NEEDED_MARGIN: Final = 1.5
# Probability that a recording of the needed size supports the target although a share of requests
# was last seen busy: the power of a test of one share, by the normal approximation.
NEEDED_POWER: Final = 0.9
# Larger numbers of requests, beyond the exact integers of a float, cannot be recorded.
MAX_NEEDED: Final = 2.0**53


@dataclass(frozen=True, slots=True)
class Curve:
    """One curve of ``attempts``, as columns, with target and confidence."""

    unit: str
    within: Floats
    exceedance: Floats
    n: Floats
    n_done: Floats
    n_censored: Floats
    n_episodes: Floats
    target: float
    confidence: float

    def upper(self, confidence: float) -> Floats:
        """One-sided upper bounds of P(needs more than each step)."""
        return exact_interval(self.exceedance, self.n, 2 * confidence - 1)[1]

    def lower(self, confidence: float) -> Floats:
        """One-sided lower bounds of P(needs more than each step)."""
        return exact_interval(self.exceedance, self.n, 2 * confidence - 1)[0]

    @property
    def needed(self) -> int | None:
        """Number of requests that would support the target by counting; None if no number would.

        Computed as the rule of three for independent completed requests, times the number of
        requests in this trace per independent one (because of bursts, few bursts and censoring),
        times a margin. If some requests were last seen busy, also at least the number that
        distinguishes their share from the target. None if their share reaches the target.
        """
        from scipy import special

        left = max(float(self.exceedance[-1]), 0.0)
        if left >= self.target:
            return None
        n_requests = float(self.n_done.sum() + self.n_censored.sum())
        per_independent = max(n_requests / float(self.n[-1]), 1.0)
        none_left = -math.log(1 - self.confidence) / self.target * NEEDED_MARGIN
        z = float(special.ndtri(self.confidence) + special.ndtri(NEEDED_POWER))
        to_distinguish = left * (1 - left) * (z / (self.target - left)) ** 2
        needed = max(none_left, to_distinguish) * per_independent
        # No number of requests distinguishes a share from a target that is almost equal.
        return math.ceil(needed) if needed < MAX_NEEDED else None

    def first_within(self, share: Floats, target: float | None = None) -> int | None:
        """Index of the first step from which the share stays within the target; None if none."""
        above = np.flatnonzero(share > (self.target if target is None else target))
        place = int(above[-1]) + 1 if len(above) else 0
        return place if place < len(share) else None


def curve_of(rows: pl.DataFrame, unit: str, given: dict[str, Any]) -> Curve:
    """Return a curve of ``attempts``.

    Args:
        rows: Rows of one curve, sorted by ``within``; at least one.
        unit: Unit of the curve, ``attempts`` or ``ns``.
        given: Values of ``target`` and ``confidence``; other keys are ignored.
    """
    wanted = (given["target"], given["confidence"])
    return Curve(
        unit,
        rows["within"].to_numpy().astype(float),
        1 - rows["done_ratio"].to_numpy(),
        rows["n_effective"].to_numpy(),
        rows["n_done"].to_numpy().astype(float),
        rows["n_censored"].to_numpy().astype(float),
        rows["n_episodes"].to_numpy().astype(float),
        *wanted,
    )


# Number of bursts with a request above the threshold of the tail: preferred, and minimum.
# The coverage study (tests/bench/coverage.py) uses these numbers; with fewer bursts intervals are
# infinite, with more the threshold lies too low in the distribution.
TAIL_BURSTS: Final = 200
MIN_TAIL_BURSTS: Final = 30
# With n effective requests, no model is used for a target below 1/n; counting supports 3/n.  For a
# mixture of two tails of which the trace shows only one, limits for 1/n keep their target in four
# of five traces, limits for 1/(2 n) in two of five (tests/bench/coverage.py).
# Maximum ratio of the limit to the largest value seen: chosen by the project.
MAX_EXTRAPOLATION: Final = 100
# A model is rejected below this p-value, of the counts (chi-square) or of the maximum.
MIN_GOODNESS: Final = 0.01


def extrapolate(curve: Curve, max_seen: int, caution: str | None) -> dict[str, Any]:
    """Return the limit from a model of the tail, or the reason why it is withheld.

    Args:
        curve: Curve that does not reach its target within the data.
        max_seen: Largest value that any request was seen to need.
        caution: Further reasons for uncertainty; None: none.

    Returns:
        Columns of the ``limits`` table.
    """
    place = _threshold(curve)
    reason = _reason_unsupported(curve, place)
    if reason is not None:
        return _unsupported(curve, max_seen, reason)
    fitted = tail.fit(_tail_sample(curve, place))
    model = {
        "model": "geometric" if fitted.is_geometric else "generalised_pareto",
        "shape": fitted.shape,
        "threshold": int(curve.within[place]),
        "goodness": fitted.goodness,
    }
    max_limit = MAX_EXTRAPOLATION * max(float(max_seen), 1.0)
    limit = fitted.bound(curve.target, curve.confidence, max_limit)
    p_of_max = _p_of_maximum(curve, place, fitted)
    if fitted.goodness < MIN_GOODNESS:
        reason = f"the tail is neither geometric nor generalised Pareto (p = {fitted.goodness:.1g})"
    elif p_of_max < MIN_GOODNESS:
        reason = (
            f"the largest value, {max_seen:,}, does not fit the tail of the others "
            f"(p = {p_of_max:.1g}) and must have another cause"
        )
    elif math.isinf(limit):
        reason = f"the limit may be {MAX_EXTRAPOLATION} times the observed maximum"
    if reason is not None:
        return _unsupported(curve, max_seen, reason)
    return (
        model
        | _ends(curve, fitted, max(limit, float(max_seen)), max_limit)
        | {"reason": "; ".join(filter(None, (_ASSUMPTION, caution)))}
    )


_ASSUMPTION: Final = (
    "from a model, if the tail continues as seen: rarer causes of waiting would not show in it"
)


def _unsupported(curve: Curve, max_seen: int, reason: str) -> dict[str, Any]:
    never = ""
    if curve.needed is None:
        many = round(100 * float(curve.exceedance[-1]), 2 if curve.exceedance[-1] < 0.01 else 1)
        shown = f"{max_seen:,} attempts" if curve.unit == "attempts" else "the longest wait seen"
        never = f"; no number of requests would do: {many:g} % were last seen busy at {shown}"
    return withheld(f"not supported by this trace: {reason}{never}", curve.needed)


def _p_of_maximum(curve: Curve, place: int, fitted: tail.Tail) -> float:
    """P(the maximum of the same number of independent requests reaches the maximum seen)."""
    before = float(fitted.sample.below[-1])
    return -math.expm1(float(curve.n[place]) * math.log1p(-min(fitted.exceedance(before), 0.5)))


def rarest_target(curve: Curve) -> float:
    """Return the smallest target for which a model may be used, at most 1/2."""
    return min(1 / float(curve.n[_threshold(curve)]), 0.5)


def _threshold(curve: Curve) -> int:
    """Return the index of the step above which the tail begins."""
    deep = np.flatnonzero(curve.n_episodes >= TAIL_BURSTS)
    return int(deep[-1]) if len(deep) else int(np.argmax(curve.n_episodes >= MIN_TAIL_BURSTS))


def _reason_unsupported(curve: Curve, place: int) -> str | None:
    """Return the reason why no model can be fitted; None if one can."""
    if curve.n_episodes[place] < MIN_TAIL_BURSTS or not curve.n_done[place + 1 :].sum():
        max_bursts = f"{curve.n_episodes.max():,.0f} of {MIN_TAIL_BURSTS} bursts"
        return f"too few independent retries ({max_bursts}) to estimate a limit"
    n = float(curve.n[place])
    if float(curve.exceedance[place]) <= curve.target:
        return f"the share seen is within the target, but not surely: {n:,.0f} independent requests"
    if curve.target * n < 1:
        return f"the target is rarer than one of {n:,.0f} independent requests"
    return None


def _ends(curve: Curve, fitted: tail.Tail, limit: float, max_limit: float) -> dict[str, Any]:
    """Return the limit in whole steps, and the quantile that it bounds with its interval."""
    both = (1 + curve.confidence) / 2
    low, high = (fitted.bound(curve.target, end, max_limit) for end in (1 - both, both))
    whole = _round_up(limit, curve.unit)
    return {
        "limit": whole,
        "basis": "extrapolated",
        "exceed_ratio": min(fitted.exceedance(float(whole)), curve.target),
        "exceed_high": None,
        "estimate": _round_up(fitted.quantile(curve.target), curve.unit),
        "estimate_low": _round_up(low, curve.unit),
        "estimate_high": None if math.isinf(high) else _round_up(high, curve.unit),
        "needed_requests": curve.needed,
    }


def _tail_sample(curve: Curve, place: int) -> tail.TailSample:
    """Return the requests above the step at ``place``, weighted so that a burst counts as one."""
    at = curve.within[place + 1 :]
    n_done, n_censored = curve.n_done[place + 1 :], curve.n_censored[place + 1 :]
    times = np.array(TIMES_NS, float)
    below = at - 1 if curve.unit == "attempts" else times[np.searchsorted(times, at) - 1]
    return tail.TailSample(
        threshold=float(curve.within[place]),
        below=below,
        at=at,
        n_done=n_done,
        n_censored=n_censored,
        share=float(curve.exceedance[place]),
        n=float(curve.n[place]),
        weight=min(float(curve.n_episodes[place] / (n_done.sum() + n_censored.sum())), 1.0),
    )


def _round_up(value: float, unit: str) -> int:
    """Round up to a whole number of attempts, or to a step of TIMES_NS."""
    if unit == "attempts":
        return math.ceil(value - 1e-9)
    place = int(np.searchsorted(np.array(TIMES_NS), value - 1e-9))
    return int(TIMES_NS[min(place, len(TIMES_NS) - 1)])


def withheld(reason: str, needed: int | None = None) -> dict[str, Any]:
    """Return the columns of a ``limits`` row without a limit, with the reason."""
    return {"limit": None, "basis": "withheld", "reason": reason, "needed_requests": needed}
