"""A limit beyond what was seen: from a model of the tail, or the reason why not."""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np

from tdxtrace.recommend import tail
from tdxtrace.recommend.curve import Curve
from tdxtrace.tables.limits import TIMES_NS

# A tail is fitted to the part of it that so many independent requests reach, and not at
# all below the second number.  The coverage study (tests/bench/coverage.py) was run with
# these; fewer give intervals that reach to infinity, more use less of the tail.
TAIL_REQUESTS: Final = 200
LEAST_REQUESTS: Final = 30
# How much rarer than one among the independent requests seen a model may be asked about,
# and how much further than the largest seen its answer may lie: choices of ours.
RARER: Final = 100
FURTHER: Final = 100
# A model that the data refute at this level is not used.
LEAST_FIT: Final = 0.01


def extrapolated(curve: Curve, max_seen: int, caution: str | None) -> dict[str, Any]:
    """Return the limit that a model of the tail gives, or why it is not to be trusted.

    Args:
        curve: Whose target was not met within what was seen.
        max_seen: The most that any request was seen to need.
        caution: What else makes the limit less sure.

    Returns:
        Columns of the ``limits`` table.
    """
    place = _threshold(curve)
    why = _unsupported(curve, place)
    if why is not None:
        return withheld(f"not supported by this trace: {why}", curve.needed)
    fitted = tail.fit(_tail_of(curve, place))
    model = {
        "model": "geometric" if fitted.is_geometric else "generalised_pareto",
        "shape": fitted.shape,
        "threshold": int(curve.within[place]),
        "goodness": fitted.goodness,
    }
    most = FURTHER * max(float(max_seen), 1.0)
    limit = fitted.bound(curve.target, curve.confidence, most)
    if fitted.goodness < LEAST_FIT:
        why = f"the tail is neither geometric nor generalised Pareto (p = {fitted.goodness:.1g})"
    elif math.isinf(limit):
        why = f"the tail may reach {FURTHER} times as far as was seen"
    if why is not None:
        return withheld(f"not supported by this trace: {why}", curve.needed)
    return (
        model
        | _ends(curve, fitted, limit, most)
        | {
            "reason": "; ".join(
                filter(None, (f"extrapolated: at most {max_seen:,} was seen", caution))
            )
        }
    )


def _threshold(curve: Curve) -> int:
    """The step above which the tail begins."""
    tells = curve.n * curve.more
    deep = np.flatnonzero(tells >= TAIL_REQUESTS)
    return int(deep[-1]) if len(deep) else int(np.argmax(tells >= LEAST_REQUESTS))


def _unsupported(curve: Curve, place: int) -> str | None:
    """Why no model is to be fitted, if so."""
    tells = curve.n * curve.more
    if tells[place] < LEAST_REQUESTS or not curve.n_done[place + 1 :].sum():
        none = "less than one independent one"
        few = none if tells.max() < 1 else f"{tells.max():.1f} independent ones"
        return f"of its requests only {few} needed more than {curve.within[0]:.0f}"
    n = float(curve.n[place])
    if curve.target * RARER * n < 1:
        return f"the target is more than {RARER} times rarer than one of {n:,.0f} requests"
    return None


def _ends(curve: Curve, fitted: tail.Tail, limit: float, most: float) -> dict[str, Any]:
    """The limit in whole steps, and the interval of the number it is the upper bound of."""
    both = (1 + curve.confidence) / 2
    low, high = (fitted.bound(curve.target, end, most) for end in (1 - both, both))
    whole = _whole(limit, curve.unit)
    return {
        "limit": whole,
        "basis": "extrapolated",
        "exceed_ratio": min(fitted.more(float(whole)), curve.target),
        "exceed_high": curve.target,
        "estimate": _whole(fitted.quantile(curve.target), curve.unit),
        "estimate_low": _whole(low, curve.unit),
        "estimate_high": None if math.isinf(high) else _whole(high, curve.unit),
        "needed_requests": curve.needed,
    }


def _tail_of(curve: Curve, place: int) -> tail.Seen:
    """What needed more than the step at ``place``."""
    at = curve.within[place + 1 :]
    times = np.array(TIMES_NS, float)
    below = at - 1 if curve.unit == "attempts" else times[np.searchsorted(times, at) - 1]
    return tail.Seen(
        threshold=float(curve.within[place]),
        below=below,
        at=at,
        n_done=curve.n_done[place + 1 :],
        n_censored=curve.n_censored[place + 1 :],
        share=float(curve.more[place]),
        n=float(curve.n[place]),
        weight=1 / float(curve.effect[place]),
    )


def _whole(value: float, unit: str) -> int:
    """The next whole number, or step of time, that is no smaller."""
    if unit == "attempts":
        return math.ceil(value - 1e-9)
    place = int(np.searchsorted(np.array(TIMES_NS), value - 1e-9))
    return int(TIMES_NS[min(place, len(TIMES_NS) - 1)])


def withheld(reason: str, needed: int | None = None) -> dict[str, Any]:
    """Return the columns of a row without a limit, with the reason."""
    about = f"; about {needed:,} requests would be needed" if needed is not None else ""
    return {"limit": None, "basis": "withheld", "reason": reason + about, "needed_requests": needed}
