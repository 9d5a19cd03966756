"""The ``limits`` table: safe retry limits in attempts and time, per leaf, with uncertainty."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import polars as pl

from tdxtrace.recommend.extrapolate import Curve, curve_of, extrapolate, withheld
from tdxtrace.recommend.recorded import policy_summary, recorded_policies
from tdxtrace.recommend.target import Exposure, Target
from tdxtrace.tables.events import LOSSES
from tdxtrace.tables.findings import RETRY_CHAINS
from tdxtrace.tables.limits import ATTEMPTS, LIMITS, MAKERS, MIN_EPISODES, UNITS
from tdxtrace.tables.pace import pace_ns as pace_of_chains
from tdxtrace.tables.trace import Provenance
from tdxtrace.tdx.consequences import if_busy_is_final, kills_vm
from tdxtrace.tdx.leaves import parse_leaf
from tdxtrace.tdx.operands import n_small_pages

_AUG: Final = parse_leaf("TDH.MEM.PAGE.AUG")[0]
_VALID_FOR: Final = "another guest, module version, number of vCPUs or retry policy"
_NO_CAUSES: Final = "causes of busy answers unknown: no busy_causes for this trace"

_SAME_AS_ANYONE: Final = (
    "same limit as for anyone: the answers of this maker alone support no smaller one"
)
# A limit is withheld where more than 1/2 of the requests have no answer: the unanswered majority
# may behave differently. Chosen by the project.
_MAX_UNANSWERED: Final = 2
_CLUSTERS: Final = {"td": "TDs", "source": "inputs"}
_DRIFTING: Final = (
    "not supported by this trace: the share that needs more rises or falls over the recording, so "
    "a limit would hold only for its average; analyse a part of it (--since, --until)"
)
_UNEXPLAINED: Final = "{:,} busy answers are unexplained and count for both host and guest"

CHAIN_COLUMNS: Final = (
    *("source", "leaf", "td_id", "level", "start_ns", "end_ns", "took_ns", "n_attempts"),
    *("n_busy", "outcome", "begin_lost"),
)
"""Columns of ``retry_chains`` that limits depend on."""


@dataclass(frozen=True, slots=True)
class RecordedRequests:
    """Inputs of ``limits`` besides the curves: counts, which add over recordings."""

    leaves: pl.DataFrame
    """Result of :func:`leaves_of`."""
    policies: pl.DataFrame
    """Result of :func:`tdxtrace.recommend.recorded.recorded_policies`."""
    exposure: Exposure
    n_losses: int


def recorded_requests(
    retry_chains: pl.DataFrame | pl.LazyFrame, losses: pl.DataFrame, seconds: float | None
) -> RecordedRequests:
    """Return the inputs of ``limits`` besides the curves; arguments as :func:`limits`."""
    chains = RETRY_CHAINS.pick(retry_chains, *CHAIN_COLUMNS)
    return RecordedRequests(
        leaves_of(chains),
        recorded_policies(chains),
        exposure_of(chains, seconds),
        LOSSES.conform(losses).filter(pl.col("severity") == "data_loss").height,
    )


def limits(
    attempts: pl.DataFrame,
    retry_chains: pl.DataFrame | pl.LazyFrame,
    losses: pl.DataFrame,
    seconds: float | None = None,
    target: Target | None = None,
    pace_ns: float | None = None,
) -> pl.DataFrame:
    """Recommend a limit for every leaf, or give the reason why none can be recommended.

    The limit is the smallest number such that P(a request needs more) is below the target
    with the given confidence. Within the data it is an exact binomial bound for the effective
    number of requests (Clopper and Pearson); if no request was busy, this is the rule of three.
    Beyond the data, a generalised Pareto tail is fitted, of which the geometric tail is a special
    case. The limit is the upper end of the quantile's interval, by profile likelihood with free
    shape, and at least the largest value seen. It has no confidence: it holds only if the tail
    continues as seen. It is withheld if too few requests reach the tail, if the model does not fit
    the counts or the maximum, or if the target is much rarer than the counts support.

    Where the target is a rate of lost VMs, a leaf for which KVM loses no VM at the limit gets the
    smallest limit and no part of the rate.

    ``guest`` counts the busy answers that remain if a lock in the host serializes its calls;
    unexplained answers count for both host and guest.

    Args:
        attempts: The ``attempts`` table.
        retry_chains: The ``retry_chains`` table that it was made from, or a query of it.
        losses: The ``losses`` table.
        seconds: Recorded time in s, for a target rate; see :func:`observed_seconds`.
        target: Ratio or rate of requests that may need more, and confidence. The confidence of a
            rate holds for all leaves together, that of a ratio for each leaf alone.
        pace_ns: Time from one attempt to the next, in ns, on the kernel that will use the limit;
            the wait for a lock is assumed not to depend on it. None: not known.

    Returns:
        The ``limits`` table, the leaf with most retried requests first.

    Raises:
        TableError: If an argument lacks a column or has one of another type.

    Sources:
        The definition of a limit: the project's issue 6. Generalised Pareto tails:
        J. Pickands, Annals of Statistics 3 (1975) 119.
    """
    return limits_of(attempts, recorded_requests(retry_chains, losses, seconds), target, pace_ns)


def limits_of(
    attempts: pl.DataFrame,
    recorded: RecordedRequests,
    target: Target | None = None,
    pace_ns: float | None = None,
) -> pl.DataFrame:
    """Return :func:`limits` from the curves and the counts of one or more recordings."""
    target = target or Target()
    steps = ATTEMPTS.conform(attempts)
    leaves, exposure, seconds = recorded.leaves, recorded.exposure, recorded.exposure.host_s
    unknown = None if target.rate is None else exposure.why_unknown(target.rate)
    has_makers = not steps.filter(pl.col("by") == "maker").is_empty()
    rows = []
    counts_vms = target.rate is not None and target.rate.counts_vms
    lose_none = {leaf for leaf in leaves["leaf"] if counts_vms and kills_vm(leaf) is False}
    n_leaves = max(leaves.height - len(lose_none), 1)
    for leaf in leaves.iter_rows(named=True):
        ratio = target.for_leaf(leaf["n_requests"], n_leaves, exposure)
        row_base = leaf | {
            "observed_s": seconds,
            "n_losses": recorded.n_losses,
            "target": ratio or target.ratio,
        }
        row_base |= {"confidence": target.confidence_of_leaf(n_leaves)}
        row_base |= {"loses_no_vm": leaf["leaf"] in lose_none}
        policies = recorded.policies.filter(pl.col("leaf") == leaf["leaf"])
        calls, text = policy_summary(policies)
        row_base |= {"recorded_calls": calls, "recorded_policy": text}
        row_base |= {"is_kicked": policies["is_kicked"].any()}
        of_leaf = steps.filter(pl.col("leaf") == leaf["leaf"])
        rows += list(
            _rows_of_leaf(of_leaf, row_base, unknown if ratio is None else None, has_makers)
        )
    return LIMITS.conform(_with_times(pl.DataFrame(rows, schema=LIMITS.schema), pace_ns))


def _with_times(rows: pl.DataFrame, pace_ns: float | None) -> pl.DataFrame:
    """Add the time that recording the needed requests takes, and limits in attempts at a pace."""
    per_s = pl.col("n_requests") / pl.col("observed_s")
    fit = (pl.col("limit") / pl.lit(pace_ns, pl.Float64)).ceil().cast(pl.Int64) + 1
    return rows.with_columns(
        needed_s=pl.when(per_s.is_finite()).then(pl.col("needed_requests") / per_s),
        bare_attempts=pl.when(pl.col("unit") == "ns").then(fit),
    )


def observed_seconds(provenance: Provenance) -> float | None:
    """Return the recorded time of all sources in s; None if the unit of a clock is unknown."""
    spans = [
        s.last_ns - s.first_ns
        for s in provenance.sources
        if s.first_ns is not None and s.last_ns is not None and s.clock != "integer"
    ]
    return sum(spans) / 1e9 if spans and len(spans) == len(provenance.sources) else None


def exposure_of(chains: pl.DataFrame, seconds: float | None) -> Exposure:
    """Return the recorded time and pages by which a target rate is converted to a ratio.

    Args:
        chains: The ``retry_chains`` table.
        seconds: Recorded time in s; None: its clock has no unit.
    """
    span = chains.filter(pl.col("td_id").is_not_null()).group_by("source", "td_id")
    spans = span.agg(ns=pl.col("end_ns").max() - pl.col("start_ns").min())["ns"]
    added = chains.filter(pl.col("leaf") == _AUG, pl.col("outcome") == "succeeded")
    pages = added.select(n_small_pages(pl.col("level")).sum()).item()
    vm_s = float(spans.sum()) / 1e9 if seconds is not None and len(spans) else None
    return Exposure(seconds, vm_s, int(pages or 0))


def leaves_of(chains: pl.DataFrame) -> pl.DataFrame:
    """Return one row per leaf, the one with most retried requests first.

    Columns: leaf, n_requests, n_tds, n_retried, n_begin_lost and pace_ns.
    """
    return (
        chains.group_by("leaf")
        .agg(
            n_requests=pl.len(),
            n_tds=pl.struct("source", "td_id").filter(pl.col("td_id").is_not_null()).n_unique(),
            n_retried=(pl.col("n_busy") > 0).sum(),
            n_begin_lost=pl.col("begin_lost").fill_null(False).sum(),
            pace_ns=pace_of_chains().median(),
        )
        .sort("n_retried", "n_requests", "leaf", descending=[True, True, False])
    )


def _rows_of_leaf(
    steps: pl.DataFrame, row_base: dict[str, Any], no_target: str | None, has_makers: bool
) -> Iterator[dict[str, Any]]:
    unexplained = steps.filter(pl.col("by") == "cause", pl.col("kind") == "unexplained")
    n_unexplained = _retry_counts(unexplained.filter(pl.col("unit") == "attempts"))["n_busy"]
    of_anyone: dict[str, dict[str, Any]] = {}
    for maker in MAKERS:
        of_maker = (pl.col("by") == "maker") & (pl.col("kind") == maker)
        by = pl.col("by") == "leaf" if maker == "anyone" else of_maker
        curves = steps.filter(by).sort("within")
        in_attempts = curves.filter(pl.col("unit") == "attempts")
        for unit in UNITS:
            rows = curves.filter(pl.col("unit") == unit)
            row = row_base | {"made_by": maker, "unit": unit, "would_change": _VALID_FOR}
            row |= _retry_counts(in_attempts) | _curve_extent(rows, unit)
            row["n_unanswered"] = n_unanswered(rows, row)
            row["never"] = _is_never(in_attempts, row)
            if row["loses_no_vm"]:
                yield row | _no_vm_lost(row)
            elif maker != "anyone" and not has_makers:
                yield row | withheld(_NO_CAUSES)
            elif no_target is not None:
                yield row | withheld(no_target)
            elif maker == "anyone":
                of_anyone[unit] = _recommend(rows, row)
                of_anyone[unit] |= _worst(steps, unit, of_anyone[unit]["limit"])
                yield row | of_anyone[unit]
            else:
                found = _recommend(rows, row)
                yield row | _limit_of_maker(found, of_anyone[unit], n_unexplained)


def _no_vm_lost(row: dict[str, Any]) -> dict[str, Any]:
    """Return the smallest limit, for a leaf whose busy answers never lose a VM."""
    return {
        "limit": 1 if row["unit"] == "attempts" else 0,
        "basis": "no_vm_lost",
        "reason": f"no VM is lost by any limit (Linux 6.16 on): {if_busy_is_final()[row['leaf']]}",
    }


def _limit_of_maker(
    found: dict[str, Any], of_anyone: dict[str, Any], n_unexplained: int
) -> dict[str, Any]:
    """Return the smaller of a maker's limit and anyone's limit, which also bounds each maker."""
    use_anyone = (
        of_anyone["limit"] is not None and _limit_or_infinity(found["limit"]) > of_anyone["limit"]
    )
    chosen = of_anyone if use_anyone else found
    parts = [_SAME_AS_ANYONE if use_anyone else None, chosen["reason"]]
    parts.append(_UNEXPLAINED.format(n_unexplained) if n_unexplained else None)
    return chosen | {"reason": "; ".join(filter(None, parts)) or None}


def _limit_or_infinity(limit: int | None) -> float:
    """Return a limit as a float; infinite for None."""
    return math.inf if limit is None else float(limit)


def _retry_counts(steps: pl.DataFrame) -> dict[str, Any]:
    """Count retried requests and busy answers of a curve in attempts."""
    retried = steps.select(
        (pl.col("n_done") * (pl.col("within") > 1)).sum() + pl.col("n_censored").sum()
    )
    busy = pl.col("n_done") * (pl.col("within") - 1) + pl.col("n_censored") * pl.col("within")
    return {"n_retried": int(retried.item()), "n_busy": int(steps.select(busy.sum()).item())}


def n_unanswered(steps: pl.DataFrame, leaf: dict[str, Any]) -> int:
    """Return the number of requests of a leaf that a curve leaves out.

    No answer of these requests was recorded, or they were last seen busy because of another maker.

    Args:
        steps: Rows of the curve.
        leaf: n_requests and n_begin_lost of the leaf.
    """
    n_at_risk = 0 if steps.is_empty() else int(steps["n_at_risk"][0])
    return int(leaf["n_requests"] - leaf["n_begin_lost"] - n_at_risk)


def is_mostly_unanswered(steps: pl.DataFrame, leaf: dict[str, Any]) -> bool:
    """Return whether a curve leaves out too many requests of its leaf to support a limit."""
    return steps.is_empty() or n_unanswered(steps, leaf) * _MAX_UNANSWERED > leaf["n_requests"]


def _worst(steps: pl.DataFrame, unit: str, limit: int | None) -> dict[str, Any]:
    """Return the TD, and the input, with the largest share of requests above the limit.

    Args:
        steps: Curves of the leaf, including those of TDs.
        unit: Unit of the limit.
        limit: The limit; None (withheld): the first step of the curve is used instead.
    """
    of_td = steps.filter(pl.col("by") == "td", pl.col("unit") == unit)
    within = (1 if unit == "attempts" else 0) if limit is None else limit
    keys = ["source", "td_id"]
    done = of_td.filter(pl.col("within") <= within).group_by(keys).agg(pl.col("done_ratio").max())
    found = of_td.select(*keys, "n_requests").unique().join(done, on=keys, how="left")
    if found.is_empty():
        return {}
    found = found.with_columns(more=1 - pl.col("done_ratio").fill_null(0.0))
    source, td_id, ratio = _first(found, keys)
    row = {"worst_td_source": source, "worst_td": td_id, "worst_td_ratio": ratio}
    n = pl.col("n_requests")
    inputs = found.group_by("source").agg(more=(pl.col("more") * n).sum() / n.sum())
    if inputs.height == 1:
        return row
    source, ratio = _first(inputs, ["source"])
    return row | {"worst_source": source, "worst_source_ratio": ratio}


def _first(found: pl.DataFrame, keys: list[str]) -> tuple[Any, ...]:
    """Return ``keys`` and ``more`` of the row with the largest ``more``, the first of equals."""
    descending = [True, *(False for _ in keys)]
    return found.sort("more", *keys, descending=descending).select(*keys, "more").row(0)


def _is_never(in_attempts: pl.DataFrame, row: dict[str, Any]) -> bool:
    """Return whether the recorded kernel's own limit leaves more requests than the target."""
    if row["recorded_calls"] is None or in_attempts.is_empty():
        return False
    return 1 - float(in_attempts["done_ratio"][-1]) > float(row["target"])


def _curve_extent(steps: pl.DataFrame, unit: str) -> dict[str, Any]:
    """Return the largest step of a curve, its censored requests, episodes and design effect."""
    if steps.is_empty():
        first_within = 1 if unit == "attempts" else 0
        return {
            "n_censored": 0,
            "n_episodes": 0,
            "design_effect": 1.0,
            "unit_of_dependence": "request",
            "drifts": False,
            "max_seen": first_within,
        }
    return {
        "n_censored": int(steps["n_censored"].sum()),
        "n_episodes": int(steps["n_episodes"][0]),
        "design_effect": float(steps["design_effect"].max()),  # type: ignore[arg-type]
        "unit_of_dependence": steps["unit_of_dependence"][
            int(steps["design_effect"].arg_max() or 0)
        ],
        "drifts": bool(steps["drifts"].any()),
        "max_seen": int(steps["within"][-1]),
    }


def _recommend(steps: pl.DataFrame, row: dict[str, Any]) -> dict[str, Any]:
    """Return the limit from the data, else from a model, else the reason why it is withheld."""
    if is_mostly_unanswered(steps, row) or row["drifts"]:
        return withheld(_DRIFTING if row["drifts"] else _unanswered_text(row))
    curve = curve_of(steps, row["unit"], row)
    upper = curve.upper(curve.confidence)
    place = curve.first_within(upper)
    caution = _caution(row)
    if place is not None:
        both = (1 + curve.confidence) / 2
        ends = [
            curve.first_within(curve.exceedance),
            curve.first_within(curve.lower(both)),
            curve.first_within(curve.upper(both)),
        ]
        estimate, low, high = (None if end is None else int(curve.within[end]) for end in ends)
        return {
            "limit": int(curve.within[place]),
            "basis": "observed" if row["n_retried"] else "nothing_busy",
            "exceed_ratio": float(max(curve.exceedance[place], 0.0)),
            "exceed_high": float(upper[place]),
            "estimate": estimate,
            "estimate_low": low,
            "estimate_high": high,
            "reason": caution,
        }
    if not row["n_retried"]:
        return withheld(
            f"no busy answers, which supports only P(needs more than one) < {upper[-1]:.2g}",
            curve.needed,
        )
    return _beyond_counts(curve, row, caution)


def _beyond_counts(curve: Curve, row: dict[str, Any], caution: str | None) -> dict[str, Any]:
    """Return the limit from a model, else the reason why it is withheld."""
    found = extrapolate(curve, row["max_seen"], caution)
    if row["never"] and (row["is_kicked"] or found["limit"] is None):
        return withheld(f"{row['recorded_policy']}; never under this policy")
    found = _within_policy(found, row, curve.needed)
    if found["limit"] is None and row["unit_of_dependence"] in _CLUSTERS:
        clusters = _CLUSTERS[row["unit_of_dependence"]]
        return withheld(
            f"not supported by this trace: the {clusters} differ by more than chance, so another "
            "one may differ too; record more of them, not more requests"
        )
    return found


def _within_policy(
    found: dict[str, Any], row: dict[str, Any], needed: int | None
) -> dict[str, Any]:
    """Withhold a model's limit beyond a kick: after it, waits have another distribution."""
    calls = row["recorded_calls"]
    if calls is None or found["limit"] is None or not row["is_kicked"]:
        return found
    if found["limit"] <= (calls if row["unit"] == "attempts" else row["max_seen"]):
        return found
    return withheld(f"{row['recorded_policy']}; no model reaches beyond that", needed)


def _unanswered_text(row: dict[str, Any]) -> str:
    """Return the number of requests that a row leaves out, and why."""
    others = "" if row["made_by"] == "anyone" else ", or they were last seen busy because of others"
    return (
        f"{row['n_unanswered']:,} of {row['n_requests']:,} requests are left out: no answer was "
        f"recorded{others}"
    )


def _caution(row: dict[str, Any]) -> str | None:
    """Return reasons for uncertainty beyond the interval of a limit; None if none."""
    parts = []
    if row["n_unanswered"]:
        parts.append(_unanswered_text(row))
    parts += _dependence(row)
    if row["recorded_policy"]:
        parts.append(row["recorded_policy"])
    if row["n_begin_lost"]:
        parts.append(f"{row['n_begin_lost']:,} requests are left out: their beginning may be lost")
    if row["n_censored"]:
        parts.append(
            f"{row['n_censored']:,} requests were cut or given up while busy; they are assumed to "
            "need as many further attempts as the others"
        )
    if row["n_losses"]:
        parts.append(f"the recording has losses ({row['n_losses']:,})")
    return "; ".join(parts) or None


def _dependence(row: dict[str, Any]) -> Iterator[str]:
    """Yield what a limit assumes of other TDs, times and bursts than those recorded."""
    if row["unit_of_dependence"] in _CLUSTERS:
        clusters = _CLUSTERS[row["unit_of_dependence"]]
        yield f"the limit is for one more of the {clusters}, because they differ"
    if 0 < row["n_episodes"] < MIN_EPISODES:
        yield (
            f"fewer than {MIN_EPISODES} bursts were seen ({row['n_episodes']:,}): if rare ones are "
            "larger, more requests exceed the limit"
        )
