"""The ``attempts`` table: share of requests done within n attempts, or within a time.

The shares are Kaplan-Meier curves over attempts or time, with censoring and clustering.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tdxtrace.analysis.arrays import Flags, Index, Times
from tdxtrace.analysis.dependence import between_hosts, clusters, effect_of_bursts, widest
from tdxtrace.analysis.lookup import find_rows, in_order
from tdxtrace.analysis.loops.bursts import DEEPEST, HALF, count_bursts
from tdxtrace.compiler import choose
from tdxtrace.intervals import CONFIDENCE, Floats, exact_interval
from tdxtrace.tables.causes import BUSY_CAUSES
from tdxtrace.tables.findings import RETRY_CHAINS
from tdxtrace.tables.fleet import ATTEMPT_COUNTS, ATTEMPT_TOTALS, CLUSTERED_BY
from tdxtrace.tables.limits import ATTEMPTS, BUSY_ANSWERS, MIN_EPISODES, TIMES_NS, UNITS, VIEWS
from tdxtrace.tdx.operands import resource

# A TD belongs to one input: the struct tdx_td of two hosts, or of one host on two days, may have
# the same address.
_GROUP: Final = ("leaf", "by", "source", "td_id", "kind")

# Sums that the loop over bursts computes for each step.
_BURST_SUMS: Final = ("n_more", "squares", "n_episodes")

# Outcomes in which the module ended the request: no further attempt was needed.
_DONE: Final = ("succeeded", "failed")
_IS_WHOLE: Final = ~pl.col("begin_lost").fill_null(False)

# Causes that a host lock could prevent, and the others.  An armed TDH.VP.ENTER is a host call,
# but no such lock is held during it, and the guest arms it (P. Bonzini, 2024-09-10: the lock goes
# around the memory SEAMCALLs, the zero-step answer is a separate problem).  Unexplained answers may
# belong to either maker and count for both.
_MAKERS: Final = {
    "host": ("host_conflict", "kernel_bug", "unexplained"),
    "guest": ("guest", "armed_entry", "unexplained"),
}

# Bytes that a loop over requests reads for each, for both units; decides whether it is compiled.
_BYTES_PER_REQUEST: Final = 2 * 20
_CHAIN_COLUMNS: Final = (
    *("source", "leaf", "td_id", "first_seq", "n_busy", "outcome", "begin_lost"),
)
_ANSWER_COLUMNS: Final = (
    *("source", "seq", "first_seq", "leaf", "status", "waited_ns", "episode"),
)
_TIME_STEPS: Final = np.array(TIMES_NS, np.int64)


def attempts(
    retry_chains: pl.DataFrame | pl.LazyFrame,
    busy_answers: pl.DataFrame | pl.LazyFrame,
    busy_causes: pl.DataFrame | pl.LazyFrame | None = None,
) -> pl.DataFrame:
    """Estimate the share of requests done within n attempts, and within t ns of retrying.

    A request is done at the first attempt that returned a status that is not retryable; an error
    also ends the retrying.  Time is counted up to the last busy answer, which is when a retry
    loop would check its clock: a request that was never busy took no time.  Requests that were
    cut, given up or settled by another thread are censored: they needed more attempts than the
    recorded busy answers.  Requests without any answer are not at risk at any step.  Requests
    whose beginning may be lost are excluded, busy or not: only the last of their attempts were
    recorded, and whether they were recorded does not depend on the number of attempts.

    Curves of a resource, a cause or a maker count only busy answers of that kind, over
    all requests of the leaf: the curve if the other kinds had not occurred.  A request whose
    record ends while busy with another kind is not evidence for this kind.

    Requests of one burst are not independent. Intervals are computed for an effective number of
    independent requests: their number divided by the design effect, which is the variance
    under resampling of whole episodes divided by the variance under resampling of requests (in
    closed form, so the result is deterministic).

    Args:
        retry_chains: The ``retry_chains`` table, or a query of it. All its sources are combined,
            except in the curves of TDs: the same address in two inputs means two TDs.
        busy_answers: The ``busy_answers`` table of the same chains, optionally of more chains; or a
            query of it.
        busy_causes: The ``busy_causes`` table, or a query of it; None for no curves of causes and
            makers.

    Returns:
        The ``attempts`` table, ordered by its key.

    Raises:
        TableError: If an argument lacks a column or has one of another type.

    Sources:
        E. L. Kaplan, P. Meier, J. Am. Stat. Assoc. 53 (1958) 457: the estimate.
        E. L. Korn, B. I. Graubard, Survey Methodology 24 (1998) 193: exact binomial
        intervals for an effective number of trials.
    """
    return curves_of(count_attempts(retry_chains, busy_answers, busy_causes))


@dataclass(frozen=True, slots=True)
class AttemptCounts:
    """Additive counts of one or more inputs, from which curves are computed."""

    steps: pl.DataFrame
    """The ``attempt_counts`` table."""
    totals: pl.DataFrame
    """The ``attempt_totals`` table."""
    has_makers: bool
    """Whether the causes of busy answers were given."""


def count_attempts(
    retry_chains: pl.DataFrame | pl.LazyFrame,
    busy_answers: pl.DataFrame | pl.LazyFrame,
    busy_causes: pl.DataFrame | pl.LazyFrame | None = None,
) -> AttemptCounts:
    """Compute the counts for :func:`attempts`, with the same arguments and errors."""
    chains = RETRY_CHAINS.pick(retry_chains, *_CHAIN_COLUMNS)
    answers = BUSY_ANSWERS.pick(busy_answers, *_ANSWER_COLUMNS)
    at_risk = clusters(
        chains.filter(_IS_WHOLE & ((pl.col("n_busy") > 0) | pl.col("outcome").is_in(_DONE))).select(
            "source", "leaf", "td_id", "first_seq", "n_busy", "outcome"
        )
    )
    requests = at_risk.filter(pl.col("n_busy") > 0).with_columns(
        done=pl.col("outcome").is_in(_DONE)
    )
    keyed = requests.select("source", "first_seq").with_row_index("request")
    keyed = in_order(keyed, "first_seq")
    own = find_rows(answers.select("source", "first_seq"), keyed.drop("request"))
    answers = answers.with_columns(request=keyed["request"][own]).drop_nulls("request")
    views = _views(answers, busy_causes)
    totals = _totals(chains)
    extents = _extents(at_risk)
    retried, groups = _retried(totals, requests, extents, views, answers)
    of_unit = ((UNITS[0], _depth_in_attempts, 0), (UNITS[1], _depth_in_time, -1))
    parts = [
        part.with_columns(unit=pl.lit(unit, pl.Enum(UNITS)))
        for unit, depth_of, base in of_unit
        for part in _both_ways(retried, depth_of, base, groups.height)
    ]
    steps = pl.concat(parts).join(groups, on="group", maintain_order="left")
    sums = [
        pl.concat([rows, extents[by].columns(rows)], how="horizontal")
        for by, rows in totals.items()
    ]
    return AttemptCounts(
        ATTEMPT_COUNTS.conform(steps).sort(ATTEMPT_COUNTS.key),
        ATTEMPT_TOTALS.conform(pl.concat(sums).with_columns(pl.col("n_all").cast(pl.Int64))),
        has_makers=busy_causes is not None,
    )


@dataclass(frozen=True, slots=True)
class _Retried:
    """Requests that were not done at the first attempt, ordered by curve."""

    group: Index
    """Number of the curve, ascending."""
    burst: Times
    """Number of the request's episode."""
    n_busy: Times
    """Number of busy answers that count for the curve."""
    waited_ns: Times
    """Time in ns to the last of these answers."""
    done: Flags
    settled: Flags
    """Whether another thread settled the request."""
    from_middle: Floats
    """Number of the request's period, counted from the middle of the input."""
    period: Times
    """Number of the request's cluster: period, stretch, TD or source."""
    stretch: Times
    td: Times
    source: Times
    period_n: Times
    """Number of requests at risk in that cluster."""
    stretch_n: Times
    td_n: Times
    source_n: Times


_View = tuple[str, str | None, NDArray[np.bool_]]


def _views(
    answers: pl.DataFrame, busy_causes: pl.DataFrame | pl.LazyFrame | None
) -> Iterator[_View]:
    """Yield the views of the answers for curves: view, kind, and a mask of the counted answers."""
    every = np.ones(answers.height, np.bool_)
    yield "leaf", None, every
    yield "td", None, every
    named = answers.select("leaf", "status").unique()
    named = named.with_columns(kind=resource(pl.col("status"), pl.col("leaf")))
    kinds = answers.select("leaf", "status").join(
        named, on=["leaf", "status"], how="left", maintain_order="left"
    )["kind"]
    yield from _one_each("resource", kinds.cast(pl.Categorical))
    if busy_causes is None:
        return
    rows = BUSY_CAUSES.pick(busy_causes, "source", "seq", "rank", "cause")
    first = in_order(rows.filter(pl.col("rank") == 1), "seq")
    keys = ("source", "seq")
    causes = first["cause"][find_rows(answers.select(keys), first.select(keys))]
    causes = causes.fill_null("unexplained")
    yield from _one_each("cause", causes)
    for maker, made in _MAKERS.items():
        yield "maker", maker, causes.is_in(list(made)).to_numpy()


def _one_each(by: str, kinds: pl.Series) -> Iterator[_View]:
    for kind in kinds.drop_nulls().unique().cast(pl.String):
        yield by, kind, (kinds == kind).fill_null(False).to_numpy()


def _retried(
    totals: dict[str, pl.DataFrame],
    requests: pl.DataFrame,
    extents: dict[str, _Extents],
    views: Iterator[_View],
    answers: pl.DataFrame,
) -> tuple[_Retried, pl.DataFrame]:
    """Return the retried requests of all curves, and the curves: a number and _GROUP per row."""
    request = answers["request"].to_numpy()
    burst, done = _bursts(requests, request, answers), requests["done"].to_numpy()
    settled = (requests["outcome"] == "resolved_elsewhere").to_numpy()
    from_middle = requests["from_middle"].to_numpy()
    waited_ns = answers["waited_ns"].to_numpy()
    parts: list[_Retried] = []
    curves: list[pl.DataFrame] = []
    n_groups = 0
    told = {
        view: (_group_of(requests, totals[view]), extents[view].of_requests(requests))
        for view in totals
    }
    for by, kind, counts in views:
        of_view = "td" if by == "td" else "leaf"
        group, sizes = told[of_view]
        n_busy, longest_ns = _count(request[counts], waited_ns[counts], requests.height)
        at = np.flatnonzero((n_busy > 0) & (group >= 0))
        if by == "td":
            at = at[np.argsort(group[at], kind="stable")]
        curves.append(
            totals[of_view].select(
                *("leaf", "source", "td_id"),
                by=pl.lit(by, pl.Enum(VIEWS)),
                kind=pl.lit(kind, pl.String),
            )
        )
        columns: tuple[NDArray[Any], ...] = (burst, n_busy, longest_ns, done, settled, from_middle)
        of_request: list[Any] = [column[at] for column in (*columns, *sizes)]
        parts.append(_Retried(group[at] + n_groups, *of_request))
        n_groups += totals[of_view].height
    joined = (
        np.concatenate([getattr(part, name) for part in parts]) for name in _Retried.__slots__
    )
    return _Retried(*joined), pl.concat(curves).with_row_index("group")


def _totals(chains: pl.DataFrame) -> dict[str, pl.DataFrame]:
    """Count requests, and requests done, for each leaf, and for each TD of a leaf."""
    of_td = chains.group_by("leaf", "source", "td_id").agg(
        n_requests=pl.len().cast(pl.UInt64),
        n_done=(pl.col("outcome").is_in(_DONE) & _IS_WHOLE).sum().cast(pl.Int64),
    )
    of_leaf = of_td.group_by("leaf").agg(pl.col("n_requests", "n_done").sum()).sort("leaf")
    of_leaf = of_leaf.with_columns(source=pl.lit(None, pl.UInt16), td_id=pl.lit(None, pl.UInt64))
    of_td = of_td.filter(pl.col("td_id").is_not_null()).sort("leaf", "source", "td_id")
    return {"leaf": of_leaf.select(of_td.columns), "td": of_td}


@dataclass(frozen=True, slots=True)
class _Extents:
    """Number of requests at risk in each cluster, by leaf or by TD of a leaf."""

    keys: tuple[str, ...]
    by_cluster: dict[str, pl.DataFrame]
    """For each unit: the keys, the cluster's number, and n, the number of its requests."""

    def of_requests(self, requests: pl.DataFrame) -> list[Times]:
        """Return for each request its cluster of each unit, followed by the clusters' sizes."""
        found = []
        for unit, rows in self.by_cluster.items():
            on = list(dict.fromkeys((*self.keys, unit)))
            asked = requests.lazy().select(on)
            joined = asked.join(rows.lazy(), on=on, how="left", maintain_order="left")
            found.append(joined.select(pl.col("n").fill_null(0)).collect()["n"].to_numpy())
        numbers = [requests[unit].cast(pl.Int64).to_numpy() for unit in self.by_cluster]
        return numbers + found

    def columns(self, totals: pl.DataFrame) -> pl.DataFrame:
        """Return the sums over clusters for each row of totals."""
        joined = totals.lazy().select(self.keys)
        for unit, rows in self.by_cluster.items():
            sums = (
                rows.lazy()
                .group_by(self.keys)
                .agg(
                    pl.len().cast(pl.Int64).alias(f"{unit}_clusters"),
                    pl.col("known").sum().cast(pl.Int64).alias(f"{unit}_known"),
                    (pl.col("n") ** 2).sum().alias(f"{unit}_sizes"),
                    *(
                        [(pl.col("from_middle") * pl.col("n")).sum().alias("trend_mean")]
                        + [(pl.col("from_middle") ** 2).sum().alias("trend_square")]
                        + [pl.col("n").sum().alias("n_all")]
                        if unit == "period"
                        else []
                    ),
                )
            )
            joined = joined.join(sums, on=self.keys, how="left", maintain_order="left")
        return joined.drop(self.keys).fill_null(0).collect()


def _extents(at_risk: pl.DataFrame) -> dict[str, _Extents]:
    """Return the cluster sizes by leaf, and by TD of a leaf."""
    # Few rows; the clusters of every unit are sums of them.
    parts = (
        at_risk.group_by("leaf", "source", "td_id", "period", "td")
        .agg(
            pl.len().alias("n"),
            pl.col("stretch", "period_known", "stretch_known", "td_known", "from_middle").first(),
        )
        .with_columns(pl.col("n").cast(pl.Int64), source_known=pl.lit(True))
    )
    found = {}
    for by, keys in (("leaf", ("leaf",)), ("td", ("leaf", "source", "td_id"))):
        found[by] = _Extents(
            keys,
            {
                unit: parts.group_by(list(dict.fromkeys((*keys, unit)))).agg(
                    pl.col("n").sum(),
                    known=pl.col(f"{unit}_known").any(),
                    from_middle=pl.col("from_middle").first(),
                )
                for unit in CLUSTERED_BY
            },
        )
    return found


def _bursts(requests: pl.DataFrame, request: Index, answers: pl.DataFrame) -> Times:
    """Return the episode number of each request, from its answers."""
    episode = np.zeros(requests.height, np.int64)
    episode[request] = answers["episode"].to_numpy()
    of_source = requests["source"].to_numpy().astype(np.int64) << HALF
    numbers: Times = np.unique(of_source | episode, return_inverse=True)[1]
    return numbers


def _count(request: Index, waited_ns: Times, n_requests: int) -> tuple[Times, Times]:
    """Return the number and the longest delay (ns) of the busy answers of each request."""
    longest_ns = np.full(n_requests, np.iinfo(np.int64).min)
    np.maximum.at(longest_ns, request, waited_ns)
    return np.bincount(request, minlength=n_requests), longest_ns


def _group_of(requests: pl.DataFrame, totals: pl.DataFrame) -> Index:
    """Return the row number in ``totals`` of each request; -1 if missing."""
    keys = ["leaf"] if totals["td_id"].null_count() else ["leaf", "source", "td_id"]
    rows = requests.select(keys).join(
        totals.select(keys).with_row_index("group"), on=keys, how="left", maintain_order="left"
    )
    return rows["group"].cast(pl.Int64).fill_null(-1).to_numpy()


def _both_ways(
    retried: _Retried, depth_of: Callable[[_Retried], Times], base: int, n_groups: int
) -> Iterator[pl.DataFrame]:
    """Yield counts under both assumptions about requests that another thread settled.

    The lock was free when the other thread acquired it, so such a request would have been done
    soon. The share assumes that the request needed more than was recorded. The upper end of the
    interval is the larger of that under this assumption and that of the curve on which the
    request was done at its last attempt.
    """
    has_settled = np.zeros(n_groups, np.bool_)
    has_settled[retried.group[retried.settled]] = True
    of_group = pl.DataFrame({"has_settled": has_settled}).with_row_index("group")

    def counted(requests: _Retried, depth: Times) -> pl.DataFrame:
        rows = _count_by_step(requests, depth, base, n_groups)
        return rows.join(of_group, on="group", maintain_order="left")

    dtype = ATTEMPT_COUNTS.schema["settled"]
    as_busy = pl.when("has_settled").then(pl.lit("busy")).otherwise(pl.lit("none"))
    rows = counted(retried, depth_of(retried))
    yield rows.select(pl.exclude("has_settled"), settled=as_busy.cast(dtype))
    if not has_settled.any():
        return
    soon = replace(retried, done=retried.done | retried.settled)
    depth = np.where(retried.settled, depth_of(soon) - (base == 0), depth_of(soon))
    rows = counted(soon, depth).filter("has_settled")
    yield rows.select(pl.exclude("has_settled"), settled=pl.lit("done", dtype))


def _depth_in_attempts(retried: _Retried) -> Times:
    """Return the last attempt after which each request still needed more."""
    return retried.n_busy


def _depth_in_time(retried: _Retried) -> Times:
    """Return the index of the last of TIMES_NS at which each request needed more; -1 if none."""
    depth = np.searchsorted(_TIME_STEPS, retried.waited_ns, "left") - 1
    censored = np.searchsorted(_TIME_STEPS, retried.waited_ns, "right") - 1
    return np.where(retried.done, depth, censored)


def _count_by_step(retried: _Retried, depth: Times, base: int, n_groups: int) -> pl.DataFrame:
    """Count requests done and censored at each step, and sum over those that need more.

    Args:
        retried: The requests that were not done at the first attempt.
        depth: The last step after which each of them still needed more.
        base: The depth of requests done at the first attempt.
        n_groups: Number of curves.
    """
    above = depth - base
    n_steps = np.full(n_groups, 2)
    np.maximum.at(n_steps, retried.group, above + 2)
    first = np.zeros(n_groups + 1, np.int64)
    np.cumsum(n_steps, out=first[1:])
    counts = _count_clusters(retried, retried.burst, above, first)
    leaves_at = first[retried.group] + above + retried.done
    of_step = np.repeat(np.arange(n_groups), n_steps)
    by_step = pl.DataFrame(
        {
            "group": pl.Series(of_step, dtype=pl.UInt32),
            "step": np.arange(first[-1]) - first[of_step] + base,
            "n_done": np.bincount(leaves_at[retried.done], minlength=first[-1]),
            "n_censored": np.bincount(leaves_at[~retried.done], minlength=first[-1]),
            **dict(zip(_BURST_SUMS, counts, strict=True)),
            **_count_wide_units(retried, above, first),
        }
    )
    counted = pl.any_horizontal(pl.col("n_done", "n_censored", "n_more") > 0)
    return by_step.filter(pl.col("step") > base, counted)


def _count_clusters(retried: _Retried, cluster: Times, above: Times, first: Times) -> Times:
    """Return the sums _BURST_SUMS at each step of each curve, from the loop over bursts."""
    counts = np.zeros((len(_BURST_SUMS), first[-1]), np.int64)
    begins = np.searchsorted(retried.group, np.arange(len(first)))
    key = ((cluster + 1) << HALF) | (DEEPEST - above)
    count = choose(len(key) * _BYTES_PER_REQUEST)(count_bursts)
    for group in np.flatnonzero(begins[1:] > begins[:-1]):
        own = key[begins[group] : begins[group + 1]]
        own.sort()
        count(own, *counts[:, first[group] : first[group + 1]])
    return counts


def _count_wide_units(retried: _Retried, above: Times, first: Times) -> dict[str, NDArray[Any]]:
    """Return the increments of the units' sums at the last step after which requests need more."""
    at = first[retried.group] + above
    sums: dict[str, NDArray[Any]] = {}
    for unit in CLUSTERED_BY:
        cluster, size = getattr(retried, unit), getattr(retried, f"{unit}_n")
        sums[f"{unit}_squares"] = _count_clusters(retried, cluster, above, first)[1]
        # The sum passes through float64, which is exact up to 2^53.
        sums[f"{unit}_products"] = np.bincount(at, size, first[-1]).astype(np.int64)
    # Without requests, np.bincount returns integers.
    for name, power in (("trend", 1), ("trend_squares", 2)):
        sums[name] = np.bincount(at, retried.from_middle**power, first[-1]).astype(np.float64)
    return sums


def curves_of(counts: AttemptCounts) -> pl.DataFrame:
    """Return the ``attempts`` table for counts, or for sums of counts.

    Args:
        counts: Counts of one or more inputs, each with its own number in ``source``. If they also
            contain sums over hosts (host_squares and host_products in steps, host_clusters and
            host_sizes in totals), the intervals use hosts as clusters.
    """
    curves = _curves(counts)
    steps = _with_done_at_once(counts.steps, curves)
    rows = _done_curves(steps.filter(pl.col("settled") != "done"), curves)
    if (steps["settled"] == "done").any():
        soon = _done_curves(steps.filter(pl.col("settled") != "busy"), curves)
        rows = rows.sort("step").join_asof(
            soon.sort("step").select("group", "step", soon_high="done_high"),
            on="step",
            by="group",
            check_sortedness=False,
        )
        rows = rows.with_columns(done_high=pl.max_horizontal("done_high", "soon_high"))
    times = pl.lit(pl.Series(TIMES_NS, dtype=pl.Int64))
    of_time = times.gather(pl.col("step").clip(0, len(TIMES_NS) - 1))
    within = pl.when(pl.col("unit") == "ns").then(of_time).otherwise("step")
    return ATTEMPTS.conform(rows.with_columns(within=within).sort(ATTEMPTS.key))


def _curves(counts: AttemptCounts) -> pl.DataFrame:
    """Return one row per curve and unit: its number, its keys, and the totals of its requests."""
    is_leaf = pl.col("td_id").is_null()
    leaves = counts.totals.filter(is_leaf)
    kinds = counts.steps.select("leaf", "by", "kind").unique()
    kinds = kinds.filter(pl.col("by").is_in(["resource", "cause"]))
    by, kind = pl.lit("leaf", kinds.schema["by"]), pl.lit(None, pl.String)
    parts = [
        leaves.with_columns(by=by, kind=kind),
        counts.totals.filter(~is_leaf).with_columns(by=pl.lit("td", kinds.schema["by"]), kind=kind),
        leaves.join(kinds, on="leaf"),
    ]
    if counts.has_makers:
        makers = pl.DataFrame({"by": ["maker"] * len(_MAKERS), "kind": list(_MAKERS)})
        parts.append(leaves.join(makers.cast({"by": kinds.schema["by"]}), how="cross"))
    units = pl.DataFrame({"unit": UNITS}, schema={"unit": ATTEMPT_COUNTS.schema["unit"]})
    curves = pl.concat(parts, how="diagonal").join(units, how="cross").sort(*_GROUP, "unit")
    return curves.with_columns(
        # A unit without known clusters is not used.
        pl.when(pl.col(f"{unit}_known") > 0).then(f"{unit}_clusters").otherwise(0)
        for unit in CLUSTERED_BY
    ).with_row_index("group")


def _with_done_at_once(steps: pl.DataFrame, curves: pl.DataFrame) -> pl.DataFrame:
    """Key counts by curve number, and add requests without a busy answer of the curve's kind."""
    on = [*_GROUP, "unit"]
    steps = steps.join(curves.select("group", *on), on=on, nulls_equal=True).drop(on)
    retried = steps.filter(pl.col("settled") != "done").group_by("group")
    at_once = curves.join(retried.agg(retried=pl.col("n_done").sum()), on="group", how="left")
    first = at_once.select(
        "group",
        step=pl.when(pl.col("unit") == "ns").then(0).otherwise(1).cast(pl.Int64),
        n_done=pl.col("n_done") - pl.col("retried").fill_null(0),
        settled=pl.lit("none", steps.schema["settled"]),
    )
    return pl.concat([steps, first], how="diagonal").fill_null(0)


def _done_curves(steps: pl.DataFrame, curves: pl.DataFrame) -> pl.DataFrame:
    """Return one row per curve and step at which requests were done or censored.

    Args:
        steps: Counts by curve number and step; a step may have several rows.
        curves: The curves with their numbers.

    Returns:
        The columns group, _GROUP, unit, step, and those of the ``attempts`` table from n_requests
        on.
    """
    steps = _still_retrying(steps).with_columns(
        _hazard=pl.col("n_done") / pl.col("n_at_risk"),
        _risk=pl.col("n_done") / (pl.col("n_at_risk") * (pl.col("n_at_risk") - pl.col("n_done"))),
    )
    steps = steps.with_columns(
        more=(1 - pl.col("_hazard")).cum_prod().over("group").clip(0, 1),
        _greenwood=pl.col("_risk").cum_sum().over("group"),
    )
    named = ["group", *_GROUP, "unit", "n_requests"]
    sums = curves.drop(*named[1:], "n_done", *(f"{unit}_known" for unit in CLUSTERED_BY))
    steps = _with_effective_n(steps.join(sums, on="group", maintain_order="left"))
    low, high = exact_interval(
        steps["more"].to_numpy(), steps["n_effective"].to_numpy(), CONFIDENCE
    )
    unsigned = ("n_at_risk", "n_done", "n_censored", "n_episodes")
    return steps.join(curves.select(named), on="group", maintain_order="left").select(
        *named,
        "step",
        pl.col(unsigned).cast(pl.UInt64),
        done_ratio=1 - pl.col("more"),
        done_low=pl.Series(1 - high),
        done_high=pl.Series(1 - low),
        design_effect="design_effect",
        unit_of_dependence="unit_of_dependence",
        drifts="drifts",
        n_effective="n_effective",
    )


def _still_retrying(steps: pl.DataFrame) -> pl.DataFrame:
    """Sum over the requests that need more than each step, from the increments of the steps."""
    added = [c for c in steps.columns if c not in ("group", "step", "settled")]
    steps = steps.group_by("group", "step").agg(pl.col(added).sum()).sort("group", "step")
    left = [c for c in added if c not in ("n_done", "n_censored")]
    leaving = (pl.col("n_done") + pl.col("n_censored")).cum_sum(reverse=True)
    return steps.with_columns(
        *(pl.col(name).cum_sum(reverse=True).over("group") for name in left),
        n_at_risk=leaving.over("group"),
    ).filter(pl.col("n_done") + pl.col("n_censored") > 0)


def _with_effective_n(steps: pl.DataFrame) -> pl.DataFrame:
    """Add the design effect, its unit, and the effective number of independent requests."""
    known = (pl.col("n_episodes") >= MIN_EPISODES) | pl.int_range(pl.len()).eq(0).over("group")
    sums = [
        pl.when(known & (pl.col("n_more") > 0)).then(name).forward_fill().over("group")
        for name in _BURST_SUMS
    ]
    n, squares, n_bursts = (
        steps.select(known=total.fill_null(1.0)).to_series().to_numpy().astype(float)
        for total in sums
    )
    burst = effect_of_bursts(n, squares, n_bursts)
    # Equivalent number of uncensored requests: S (1 - S) divided by Greenwood's variance.
    n_uncensored = (1 - pl.col("more")) / (pl.col("more") * pl.col("_greenwood"))
    n_uncensored = pl.when(pl.col("more") > 0).then(
        pl.when(pl.col("_greenwood") > 0).then(n_uncensored).otherwise(pl.col("n_at_risk"))
    )
    first = pl.col("n_at_risk").first().over("group")
    is_fleet = "host_squares" in steps.columns
    effect, unit, drifts = (between_hosts if is_fleet else widest)(steps, burst)
    return steps.with_columns(
        design_effect=pl.Series(effect), unit_of_dependence=unit, drifts=drifts
    ).with_columns(
        n_effective=pl.coalesce(
            n_uncensored, n_uncensored.forward_fill().over("group"), first
        ).cast(pl.Float64)
        / pl.col("design_effect")
    )
