"""After how many attempts, or how long, may a caller stop? With what it rests on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tdxtrace.recommend.beyond import extrapolated, withheld
from tdxtrace.recommend.curve import Curve, curve_of
from tdxtrace.recommend.wish import Wish
from tdxtrace.tables.events import LOSSES
from tdxtrace.tables.findings import RETRY_CHAINS
from tdxtrace.tables.limits import ATTEMPTS, LIMITS, MAKERS, UNITS
from tdxtrace.tables.trace import Provenance

_ELSE: Final = "another guest, module version, number of vCPUs or retry policy"
_NO_CAUSES: Final = "who made the answers busy was not found out: no busy_causes for this trace"

_AS_ANYONE: Final = "as for anyone: it alone supports no smaller one"
_UNEXPLAINED: Final = "{:,} busy answers are unexplained and count for host and guest"

Floats = NDArray[np.float64]


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
    whole: dict[str, dict[str, Any]] = {}
    for maker in MAKERS:
        of_maker = (pl.col("by") == "maker") & (pl.col("kind") == maker)
        by = pl.col("by") == "leaf" if maker == "anyone" else of_maker
        curves = steps.filter(by).sort("within")
        in_attempts = curves.filter(pl.col("unit") == "attempts")
        for unit in UNITS:
            rows = curves.filter(pl.col("unit") == unit)
            told = known | {"made_by": maker, "unit": unit, "would_change": _ELSE}
            told |= _met(in_attempts) | _seen(rows, unit)
            if maker != "anyone" and not has_makers:
                yield told | withheld(_NO_CAUSES)
            elif not has_target:
                yield told | withheld("how long was recorded is not known: the clock has no unit")
            elif maker == "anyone":
                whole[unit] = _recommended(curve_of(rows, unit, told), told)
                yield told | whole[unit]
            else:
                found = _recommended(curve_of(rows, unit, told), told)
                yield told | _of_part(found, whole[unit], n_unexplained)


def _of_part(found: dict[str, Any], whole: dict[str, Any], n_unexplained: int) -> dict[str, Any]:
    """The limit of one maker: its own, or that of all, which is never too small for a part."""
    better = whole["limit"] is not None and _or_none(found["limit"]) > whole["limit"]
    chosen = whole if better else found
    parts = [_AS_ANYONE if better else None, chosen["reason"]]
    parts.append(_UNEXPLAINED.format(n_unexplained) if n_unexplained else None)
    return chosen | {"reason": "; ".join(filter(None, parts)) or None}


def _or_none(limit: int | None) -> float:
    """A limit as a number; none is beyond all."""
    return math.inf if limit is None else float(limit)


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


def _recommended(curve: Curve, told: dict[str, Any]) -> dict[str, Any]:
    """The limit from what was counted, else from a model, else why there is none."""
    upper = curve.upper(curve.confidence)
    place = curve.least(upper)
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
        return withheld(
            f"nothing was busy, which supports P(needs more than one) < {upper[-1]:.2g} only",
            curve.needed,
        )
    return extrapolated(curve, told["max_seen"], caution)


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
