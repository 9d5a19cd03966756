"""After how many attempts, or how long, may a caller stop? With what it rests on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tdxtrace.intervals import exact_interval
from tdxtrace.recommend import tail
from tdxtrace.recommend.wish import Wish
from tdxtrace.tables.events import LOSSES
from tdxtrace.tables.findings import RETRY_CHAINS
from tdxtrace.tables.limits import ATTEMPTS, LIMITS, MAKERS, TIMES_NS, UNITS
from tdxtrace.tables.trace import Provenance

# A tail is fitted to the part of it that so many independent requests reach, and not at
# all below the second number.  The coverage study (tests/bench/coverage.py) was run with
# these; fewer give intervals that reach to infinity, more use less of the tail.
TAIL_REQUESTS: Final = 200
LEAST_REQUESTS: Final = 30
# How much rarer than one among the independent requests seen a model may be asked about,
# and how much further than the largest seen its answer may lie.  Choices; the first is
# that of hydrology's return periods, where a few times the record is good practice and
# a hundred is the most that is dared.
RARER: Final = 100
FURTHER: Final = 100
# A model that the data refute at this level is not used.
LEAST_FIT: Final = 0.01

_ELSE: Final = "another guest, module version, number of vCPUs or retry policy"
_NO_CAUSES: Final = "who made the answers busy was not found out: no busy_causes for this trace"

_UNEXPLAINED: Final = "{:,} busy answers are unexplained and count for host and guest"

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class _Curve:
    """One curve of ``attempts``, as columns, with what is wished of it."""

    unit: str
    within: Floats
    more: Floats
    n: Floats
    n_done: Floats
    n_censored: Floats
    effect: Floats
    target: float
    confidence: float

    def upper(self, confidence: float) -> Floats:
        """Upper bounds of P(needs more than each step), one-sided."""
        return exact_interval(self.more, self.n, 2 * confidence - 1)[1]

    def lower(self, confidence: float) -> Floats:
        """Lower bounds, one-sided."""
        return exact_interval(self.more, self.n, 2 * confidence - 1)[0]

    def least(self, share: Floats, target: float | None = None) -> int | None:
        """The first step from which on a share stays within the target."""
        above = np.flatnonzero(share > (self.target if target is None else target))
        place = int(above[-1]) + 1 if len(above) else 0
        return place if place < len(share) else None


def limits(
    attempts: pl.DataFrame,
    retry_chains: pl.DataFrame,
    losses: pl.DataFrame,
    seconds: float | None = None,
    wish: Wish | None = None,
) -> pl.DataFrame:
    """Recommend a limit for every leaf, or say why none can be recommended.

    The limit is the smallest number such that P(a request needs more) is below the target
    with the confidence wished for. Within what was seen that is an exact binomial bound of
    the effective number of requests (Clopper and Pearson); where none was busy it is the
    rule of three. Beyond, a tail of generalised Pareto form is fitted, the geometric one
    among them, and the limit is the upper end of its quantile by profile likelihood, shape
    free, whatever form was chosen. It is withheld where the tail is reached by too few
    requests, the model does not fit, or the target is much rarer than what was counted.

    ``guest`` counts the busy answers that are left if a lock of the host keeps its other
    calls out; answers that nobody can explain count for host and guest.

    Args:
        attempts: The ``attempts`` table.
        retry_chains: The ``retry_chains`` table that it was made from.
        losses: The ``losses`` table.
        seconds: How long was recorded, for a wish per time; see :func:`observed_seconds`.
        wish: Target and confidence.

    Returns:
        The ``limits`` table, the leaf with most retried requests first.

    Raises:
        TableError: If an argument lacks a column or has one of another type.

    Sources:
        The definition of a limit: the project's issue 6. Generalised Pareto tails:
        J. Pickands, Annals of Statistics 3 (1975) 119.
    """
    wish = wish or Wish()
    steps = ATTEMPTS.conform(attempts)
    leaves = _leaves(RETRY_CHAINS.conform(retry_chains))
    lost = LOSSES.conform(losses).filter(pl.col("severity") == "data_loss").height
    has_makers = not steps.filter(pl.col("by") == "maker").is_empty()
    rows = []
    for leaf in leaves.iter_rows(named=True):
        target = wish.target_of(leaf["n_requests"], leaves.height, seconds)
        known = leaf | {"observed_s": seconds, "n_losses": lost, "target": target or wish.target}
        known |= {"confidence": wish.confidence}
        mine = steps.filter(pl.col("leaf") == leaf["leaf"])
        rows += list(_of_leaf(mine, known, target is not None, has_makers))
    return LIMITS.conform(pl.DataFrame(rows, schema=LIMITS.schema))


def observed_seconds(provenance: Provenance) -> float | None:
    """How long the sources recorded in all, None where a clock counts ticks of no known length."""
    spans = [
        (s.last_ns - s.first_ns) / 1e9
        for s in provenance.sources
        if s.first_ns is not None and s.last_ns is not None and s.clock != "integer"
    ]
    return sum(spans) if spans and len(spans) == len(provenance.sources) else None


def _leaves(chains: pl.DataFrame) -> pl.DataFrame:
    return (
        chains.group_by("leaf")
        .agg(
            n_requests=pl.len(),
            n_tds=pl.col("td_id").drop_nulls().n_unique(),
            retried=(pl.col("n_busy") > 0).sum(),
        )
        .sort("retried", "n_requests", "leaf", descending=[True, True, False])
        .drop("retried")
    )


def _of_leaf(
    steps: pl.DataFrame, known: dict[str, Any], has_target: bool, has_makers: bool
) -> Iterator[dict[str, Any]]:
    unexplained = steps.filter(pl.col("by") == "cause", pl.col("kind") == "unexplained")
    n_unexplained = _met(unexplained.filter(pl.col("unit") == "attempts"))["n_busy"]
    for maker in MAKERS:
        of_maker = (pl.col("by") == "maker") & (pl.col("kind") == maker)
        by = pl.col("by") == "leaf" if maker == "anyone" else of_maker
        curves = steps.filter(by).sort("within")
        in_attempts = curves.filter(pl.col("unit") == "attempts")
        for unit in UNITS:
            rows = curves.filter(pl.col("unit") == unit)
            told = known | {"made_by": maker, "unit": unit, "would_change": _ELSE}
            told |= _met(in_attempts) | _seen(rows, unit)
            both = _UNEXPLAINED.format(n_unexplained) if maker != "anyone" and n_unexplained else ""
            if maker != "anyone" and not has_makers:
                yield told | _withheld(_NO_CAUSES)
            elif not has_target:
                yield told | _withheld("how long was recorded is not known: the clock has no unit")
            else:
                found = _recommended(_curve(rows, unit, told), told)
                reason = "; ".join(filter(None, (found["reason"], both))) or None
                yield told | found | {"reason": reason}


def _met(steps: pl.DataFrame) -> dict[str, Any]:
    """How many requests met busy, and how often, from a curve in attempts."""
    retried = steps.select(
        (pl.col("n_done") * (pl.col("within") > 1)).sum() + pl.col("n_censored").sum()
    )
    busy = pl.col("n_done") * (pl.col("within") - 1) + pl.col("n_censored") * pl.col("within")
    return {"n_retried": int(retried.item()), "n_busy": int(steps.select(busy.sum()).item())}


def _seen(steps: pl.DataFrame, unit: str) -> dict[str, Any]:
    """How far a curve goes and what is lost on the way."""
    if steps.is_empty():
        least = 1 if unit == "attempts" else 0
        return {"n_censored": 0, "n_episodes": 0, "design_effect": 1.0, "max_seen": least}
    return {
        "n_censored": int(steps["n_censored"].sum()),
        "n_episodes": int(steps["n_episodes"][0]),
        "design_effect": float(steps["design_effect"].max()),  # type: ignore[arg-type]
        "max_seen": int(steps["within"][-1]),
    }


def _curve(rows: pl.DataFrame, unit: str, told: dict[str, Any]) -> _Curve:
    n_requests = float(told["n_requests"])
    wished = (told["target"], told["confidence"])
    if rows.is_empty():
        one, none = np.ones(1), np.zeros(1)
        first = one if unit == "attempts" else none
        return _Curve(unit, first, none, one * n_requests, one * n_requests, none, one, *wished)
    return _Curve(
        unit,
        rows["within"].to_numpy().astype(float),
        1 - rows["done_ratio"].to_numpy(),
        rows["n_effective"].to_numpy(),
        rows["n_done"].to_numpy().astype(float),
        rows["n_censored"].to_numpy().astype(float),
        rows["design_effect"].to_numpy(),
        *wished,
    )


def _recommended(curve: _Curve, told: dict[str, Any]) -> dict[str, Any]:
    """The limit from what was counted, else from a model, else why there is none."""
    upper = curve.upper(curve.confidence)
    place = curve.least(upper)
    needed = _needed(curve)
    caution = _caution(told)
    if place is not None:
        both = (1 + curve.confidence) / 2
        ends = [
            curve.least(curve.more),
            curve.least(curve.lower(both)),
            curve.least(curve.upper(both)),
        ]
        estimate, low, high = (None if end is None else int(curve.within[end]) for end in ends)
        return {
            "limit": int(curve.within[place]),
            "basis": "observed" if told["n_retried"] else "nothing_busy",
            "exceed_ratio": float(max(curve.more[place], 0.0)),
            "exceed_high": float(upper[place]),
            "estimate": estimate,
            "estimate_low": low,
            "estimate_high": high,
            "reason": caution,
        }
    if not told["n_retried"]:
        return _withheld(
            f"nothing was busy, which supports P(needs more than one) < {upper[-1]:.2g} only",
            needed,
        )
    return _extrapolated(curve, told, needed, caution)


def _extrapolated(
    curve: _Curve, told: dict[str, Any], needed: int, caution: str | None
) -> dict[str, Any]:
    """The limit from a model of the tail, or why it is not to be trusted."""
    tells = curve.n * curve.more
    deep = np.flatnonzero(tells >= TAIL_REQUESTS)
    place = int(deep[-1]) if len(deep) else int(np.argmax(tells >= LEAST_REQUESTS))
    n = float(curve.n[place])
    if tells[place] < LEAST_REQUESTS or not curve.n_done[place + 1 :].sum():
        few = f"{tells.max():.1f} independent ones needed more than {curve.within[0]:.0f}"
        return _withheld(f"not supported by this trace: of its requests only {few}", needed)
    if curve.target * RARER * n < 1:
        rare = (
            f"the target is more than {RARER} times rarer than one of {n:,.0f} independent requests"
        )
        return _withheld(f"not supported by this trace: {rare}", needed)
    fitted = tail.fit(_tail_of(curve, place))
    model = {
        "model": "geometric" if fitted.is_geometric else "generalised_pareto",
        "shape": fitted.shape,
        "threshold": int(curve.within[place]),
        "goodness": fitted.goodness,
    }
    if fitted.goodness < LEAST_FIT:
        why = f"the tail is neither geometric nor generalised Pareto (p = {fitted.goodness:.1g})"
        return _withheld(f"not supported by this trace: {why}", needed)
    most = FURTHER * max(float(told["max_seen"]), 1.0)
    limit = fitted.bound(curve.target, curve.confidence, most)
    if math.isinf(limit):
        why = f"the tail may reach {FURTHER} times as far as was seen"
        return _withheld(f"not supported by this trace: {why}", needed)
    both = (1 + curve.confidence) / 2
    low, high = (fitted.bound(curve.target, end, most) for end in (1 - both, both))
    whole = _whole(limit, curve.unit)
    beyond = f"extrapolated: at most {told['max_seen']:,} was seen"
    return model | {
        "limit": whole,
        "basis": "extrapolated",
        "exceed_ratio": min(fitted.more(float(whole)), curve.target),
        "exceed_high": curve.target,
        "estimate": _whole(fitted.quantile(curve.target), curve.unit),
        "estimate_low": _whole(low, curve.unit),
        "estimate_high": None if math.isinf(high) else _whole(high, curve.unit),
        "needed_requests": needed,
        "reason": "; ".join(filter(None, (beyond, caution))),
    }


def _tail_of(curve: _Curve, place: int) -> tail.Seen:
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


def _needed(curve: _Curve) -> int:
    """Requests among which none beyond the limit would be enough: the rule of three."""
    alone = -math.log(1 - curve.confidence) / curve.target
    return math.ceil(alone * float(curve.effect[-1]))


def _withheld(reason: str, needed: int | None = None) -> dict[str, Any]:
    """A row without a limit."""
    about = f"; about {needed:,} requests would be needed" if needed is not None else ""
    return {"limit": None, "basis": "withheld", "reason": reason + about, "needed_requests": needed}


def _caution(told: dict[str, Any]) -> str | None:
    """What makes a limit less sure than its numbers say."""
    parts = []
    if told["n_censored"]:
        parts.append(
            f"{told['n_censored']:,} requests were cut or given up while busy, and are taken to "
            "have gone on as others did"
        )
    if told["n_losses"]:
        parts.append(f"the recording has losses ({told['n_losses']:,})")
    return "; ".join(parts) or None
