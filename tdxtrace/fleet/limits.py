"""Limits of a fleet: of all traces as one recording, with hosts as clusters, and leave-one-out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
import polars as pl

from tdxtrace.analysis.attempts import AttemptCounts, curves_of
from tdxtrace.analysis.comparisons import comparisons
from tdxtrace.errors import QueryError
from tdxtrace.fleet.merge import (
    Facts,
    FleetCounts,
    added,
    added_totals,
    count_fleet,
    recorded_of,
)
from tdxtrace.recommend.extrapolate import curve_of
from tdxtrace.recommend.limits import RecordedRequests, is_mostly_unanswered, limits_of
from tdxtrace.recommend.target import Target
from tdxtrace.tables.fleet import ATTEMPT_TOTALS, FLEET_HOSTS, FLEET_LIMITS
from tdxtrace.tables.limits import ATTEMPTS, TIMES_NS, UNITS

ALL: Final = "all"
GROUPS: Final = ("host", "kernel", "module")
# Maximum number of hosts that are left out one at a time. Of more hosts, those are chosen that
# have the largest share of a leaf's tail (half) and most requests (half), as others change the
# sums less. A choice, to limit the time.
MAX_LEFT_OUT: Final = 20
# Requests in a tail, for comparisons of hosts. A choice.
TAIL_REQUESTS: Final = 30
# A host is an outlier below this p-value, times the number of hosts.
_OUTLIER: Final = 0.01
_ONE_HOST: Final = "of one host: nothing is known of others"
_KEY: Final = ("leaf", "made_by", "unit")


def fleet_limits(
    facts: Facts,
    target: Target | None = None,
    by: str | None = None,
    *,
    counts: FleetCounts | None = None,
) -> pl.DataFrame:
    """Recommend limits for a fleet of hosts.

    One limit is that of ``tdxtrace recommend`` for all traces together; the other has hosts as
    clusters, so that its interval allows for correlation of the requests of a host. The larger one
    is recommended; if either is withheld, the recommendation is withheld.

    Args:
        facts: Facts of the traces.
        target: As for :func:`tdxtrace.recommend.limits.limits`.
        by: host, kernel or module: limits for each of these; None: one limit for all.
        counts: Result of :func:`count_fleet` for these facts, if available.

    Returns:
        The ``fleet_limits`` table, the leaf with most retried requests first in each group.

    Raises:
        InputError: If a file of the facts cannot be read.
        QueryError: If ``by`` is not host, kernel or module.
    """
    known = counts if by is None else None
    parts = [
        _group_limits(name, own, known or count_fleet(own), target or Target())
        for name, own in _grouped(facts, by)
    ]
    return FLEET_LIMITS.conform(pl.concat(parts))


def _grouped(facts: Facts, by: str | None) -> Iterator[tuple[str, Facts]]:
    if by is None:
        yield ALL, facts
        return
    if by not in GROUPS:
        raise QueryError(f"--by is one of {', '.join(GROUPS)}")
    for name in facts.parts[by].unique().sort():
        yield name, facts.only(facts.parts[by] == name)


def _group_limits(group: str, facts: Facts, counts: FleetCounts, target: Target) -> pl.DataFrame:
    recorded = recorded_of(facts, counts.leaves)
    as_one = limits_of(curves_of(counts.whole), recorded, target)
    of_hosts = limits_of(curves_of(counts.of_hosts()), recorded, target)
    n_hosts = counts.leaves.group_by("leaf").agg(n_hosts=pl.col("host").n_unique().cast(pl.UInt64))
    both = as_one.join(
        of_hosts.select(*_KEY, hosts_limit="limit", hosts_basis="basis", hosts_reason="reason"),
        on=_KEY,
        maintain_order="left",
    ).join(n_hosts, on="leaf", maintain_order="left")
    hosts = fleet_hosts(counts)
    without = _without_each(facts, counts, hosts, recorded, target)
    tails = hosts.sort("n_tail", "host", descending=[True, False]).unique(
        ["leaf", "unit"], keep="first", maintain_order=True
    )
    tails = tails.filter(pl.col("n_tail") > 0).select(
        "leaf", "unit", "tail_from", "tail_ratio", tail_host="host"
    )
    is_anyone = pl.col("made_by") == "anyone"
    return FLEET_LIMITS.conform(
        both.with_columns(_wider(), made_by=pl.col("made_by").cast(pl.String), group=pl.lit(group))
        .join(tails, on=["leaf", "unit"], how="left", maintain_order="left")
        .join(without, on=["leaf", "unit"], how="left", maintain_order="left")
        .with_columns(
            pl.col("n_without", "n_without_withheld").fill_null(0),
            *(
                pl.when(is_anyone).then(name).alias(name)
                for name in ("without_low", "without_high", "tail_from", "tail_host", "tail_ratio")
            ),
        )
    )


def _wider() -> list[pl.Expr]:
    """Expressions of the larger of two limits, its basis and reason; null if one is withheld."""
    as_one, hosts = pl.col("limit"), pl.col("hosts_limit")
    takes_hosts = as_one.is_not_null() & (hosts.is_null() | (hosts > as_one))
    limit = pl.when(as_one.is_not_null() & hosts.is_not_null()).then(
        pl.max_horizontal(as_one, hosts)
    )
    reason = pl.when(takes_hosts).then("hosts_reason").otherwise("reason")
    is_one = pl.col("n_hosts") == 1
    return [
        as_one.alias("as_one_limit"),
        limit.alias("limit"),
        pl.when(takes_hosts).then("hosts_basis").otherwise("basis").cast(pl.String).alias("basis"),
        pl.when(is_one)
        .then(pl.concat_str(pl.lit(_ONE_HOST), reason, separator="; ", ignore_nulls=True))
        .otherwise(reason)
        .alias("reason"),
    ]


def fleet_hosts(counts: FleetCounts) -> pl.DataFrame:
    """Return the share of each host in the tail of each leaf, and which hosts are outliers.

    Args:
        counts: Counts of the fleet.

    Returns:
        The ``fleet_hosts`` table, by leaf and unit, the host with the largest share first.
    """
    rows = counts.by_host.filter(pl.col("by") == "leaf", pl.col("settled") != "done")
    key = ["leaf", "unit"]
    steps = rows.group_by(*key, "step").agg(pl.col("n_more").sum()).sort(*key, "step")
    steps = steps.with_columns(more=pl.col("n_more").cum_sum(reverse=True).over(key))
    enough = pl.col("more") >= TAIL_REQUESTS
    begins = steps.group_by(key).agg(
        begin=pl.coalesce(pl.col("step").filter(enough).max(), pl.col("step").min())
    )
    tail = rows.join(begins, on=key).filter(pl.col("step") >= pl.col("begin"))
    tail = tail.group_by("host", *key).agg(n_tail=pl.col("n_more").sum())
    sizes = counts.leaves.group_by("host", "leaf").agg(pl.col("n_all").sum())
    found = begins.join(sizes, on="leaf").join(tail, on=["host", *key], how="left")
    found = found.with_columns(pl.col("n_tail").fill_null(0))
    effects = _burst_effects(counts.whole.steps, begins)
    return _with_outliers(found.join(effects, on=key, how="left"))


def _burst_effects(steps: pl.DataFrame, begins: pl.DataFrame) -> pl.DataFrame:
    """Design effect of the tail from its bursts: mean of their squared sizes over mean size."""
    rows = steps.filter(pl.col("by") == "leaf", pl.col("settled") != "done")
    tail = rows.join(begins, on=["leaf", "unit"]).filter(pl.col("step") >= pl.col("begin"))
    sums = tail.group_by("leaf", "unit").agg(pl.col("squares", "n_more").sum())
    return sums.select("leaf", "unit", effect=(pl.col("squares") / pl.col("n_more")).clip(1.0))


def _with_outliers(found: pl.DataFrame) -> pl.DataFrame:
    from scipy import special  # noqa: PLC0415 - slow to load

    key = ["leaf", "unit"]
    found = found.with_columns(
        share=pl.col("n_tail").sum().over(key) / pl.col("n_all").sum().over(key),
        n_hosts=pl.len().over(key),
        effect=pl.col("effect").fill_null(1.0),
    )
    hits = (found["n_tail"] / found["effect"]).to_numpy()
    misses = ((found["n_all"] - found["n_tail"]) / found["effect"]).to_numpy()
    # P(at least as many) of a binomial distribution, for numbers of bursts, not only integers.
    p = np.where(hits > 0, special.betainc(np.maximum(hits, 1e-9), misses + 1, found["share"]), 1.0)
    times = pl.lit(pl.Series(TIMES_NS, dtype=pl.Int64)).gather(
        pl.col("begin").clip(0, len(TIMES_NS) - 1)
    )
    total = pl.col("n_tail").sum().over(key)
    rows = found.with_columns(
        p=pl.Series(p),
        tail_from=pl.when(pl.col("unit") == "ns").then(times).otherwise("begin"),
        tail_ratio=pl.when(total > 0).then(pl.col("n_tail") / total).otherwise(0.0),
        n_requests=pl.col("n_all").cast(pl.UInt64),
    ).with_columns(
        pl.col("n_tail").cast(pl.UInt64),
        is_outlier=(pl.col("p") * pl.col("n_hosts") < _OUTLIER) & (pl.col("n_hosts") > 1),
    )
    return FLEET_HOSTS.conform(
        rows.sort("leaf", "unit", "n_tail", "host", descending=[False, False, True, False])
    )


def _without_each(
    facts: Facts,
    counts: FleetCounts,
    hosts: pl.DataFrame,
    recorded: RecordedRequests,
    target: Target,
) -> pl.DataFrame:
    """Range of the limit with hosts as clusters if one host is left out, by subtraction.

    Limits from models are not computed.
    """
    chosen = _to_leave_out(hosts)
    names = ("leaf", "unit", "limit")
    schema = {name: FLEET_LIMITS.schema[name] for name in names}
    rows: list[tuple[int, str, int | None]] = []
    for host in chosen:
        rest = counts.without(host, host_counts(facts, host))
        curves = curves_of(rest.of_hosts())
        rows += _counted_limits(curves, recorded, target)
    found = pl.DataFrame(rows, schema=schema, orient="row")
    return found.group_by("leaf", "unit").agg(
        without_low=pl.col("limit").min(),
        without_high=pl.col("limit").max(),
        n_without=pl.len().cast(pl.UInt64),
        n_without_withheld=pl.col("limit").null_count().cast(pl.UInt64),
    )


def _to_leave_out(hosts: pl.DataFrame) -> list[str]:
    if hosts["host"].n_unique() < 2:
        return []
    of_host = hosts.group_by("host").agg(pl.col("tail_ratio").max(), pl.col("n_requests").sum())
    if of_host.height <= MAX_LEFT_OUT:
        return list(of_host["host"].sort())
    chosen: dict[str, None] = {}
    for name in ("tail_ratio", "n_requests"):
        ordered = of_host.sort(name, "host", descending=[True, False])["host"]
        chosen |= dict.fromkeys(ordered.head(MAX_LEFT_OUT // 2))
    return list(chosen)


def host_counts(facts: Facts, host: str) -> AttemptCounts:
    """Return the counts of one host, without those of TDs."""
    own = facts.only(facts.parts["host"] == host)
    steps = added(pl.concat(rows.drop("_source") for rows in own.tables("counts")))
    totals = own.table("leaves").with_columns(
        source=pl.lit(None, pl.UInt16), td_id=pl.lit(None, pl.UInt64)
    )
    names = ATTEMPT_TOTALS.schema.names()
    return AttemptCounts(steps, added_totals(totals.select(names)), has_makers=True)


def _counted_limits(
    curves: pl.DataFrame, recorded: RecordedRequests, target: Target
) -> Iterator[tuple[int, str, int | None]]:
    """Yield leaf, unit and observed limit of each leaf; None: withheld."""
    steps = ATTEMPTS.conform(curves).filter(pl.col("by") == "leaf").sort("within")
    n_leaves = recorded.leaves.height
    for leaf in recorded.leaves.iter_rows(named=True):
        ratio = target.for_leaf(leaf["n_requests"], n_leaves, recorded.exposure)
        if ratio is None:
            continue
        given = leaf | {"target": ratio, "confidence": target.confidence_of_leaf(n_leaves)}
        for unit in UNITS:
            rows = steps.filter(pl.col("leaf") == leaf["leaf"], pl.col("unit") == unit)
            if rows.is_empty():
                continue
            of_rest = given | {"n_requests": rows["n_requests"][0], "n_begin_lost": 0}
            if is_mostly_unanswered(rows, of_rest):
                yield leaf["leaf"], unit, None
                continue
            curve = curve_of(rows, unit, given)
            place = curve.first_within(curve.upper(curve.confidence))
            yield leaf["leaf"], unit, None if place is None else int(curve.within[place])


def compare_fleets(before: Facts, after: Facts) -> pl.DataFrame:
    """Compare the requests of two sets of traces.

    Intervals have hosts as clusters. If both sets contain the same hosts, differences between
    hosts cancel, and the intervals are wider than necessary.

    Args:
        before: Facts of the first set.
        after: Facts of the second set.

    Returns:
        The ``comparisons`` table.

    Raises:
        InputError: If a file of the facts cannot be read.
        QueryError: If a trace is in both sets, or is a histogram.
    """
    if n_histograms := before.n_histograms + after.n_histograms:
        raise QueryError(
            f"{n_histograms:,} of the traces are histograms, which have no bursts and no times to "
            "compare; add: and format <> 'histogram'"
        )
    common = before.parts.join(after.parts, on="part", how="semi").height
    if common:
        raise QueryError(
            f"--before and --after have {common:,} traces in common; choose disjoint sets"
        )
    curves = [curves_of(count_fleet(facts).of_hosts()) for facts in (before, after)]
    return comparisons(*curves)
