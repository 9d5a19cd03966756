"""Design effects of requests that are not independent, by unit of dependence.

Requests of one burst, one part of the recording, one TD or one input are correlated. The design
effect of a unit is the variance of a share between the unit's clusters divided by its variance
between independent requests; the unit with the largest effect is used. It is a function of sums
over clusters, which are additive.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tdxtrace.analysis.lookup import in_order
from tdxtrace.intervals import (
    CONFIDENCE,
    Floats,
    chi_square_p,
    chi_square_quantile,
    few_clusters_factor,
    student_p,
)
from tdxtrace.tables.enums import Dependence, names
from tdxtrace.tables.fleet import CLUSTERED_BY
from tdxtrace.tables.limits import MIN_UNITS

# Number of parts with equal numbers of requests. Batch means need 10 to 30 of them (B. Schmeiser,
# Operations Research 30 (1982) 556): with more, they are not independent; with fewer, power is
# lost.
PERIODS: Final = 20
# Number of stretches, each of four such parts: a rate that lasts for several parts shows in fewer
# and larger parts. Five are the fewest for which a further one is predicted (MIN_UNITS).
STRETCHES: Final = 5
# With fewer requests, a part is too small to show a difference from its neighbours.
_MIN_REQUESTS: Final = 5 * PERIODS
# Minimum retried requests to estimate how clusters differ (W. G. Cochran, Biometrics 10 (1954)
# 417, requires one or more in each); with fewer, the effect of the previous step is kept.
MIN_MORE: Final = 10
IN_EACH: Final = 2
# p-value below which the clusters of a unit are assumed to differ at the first step of a curve;
# it is high because a missed difference is the worse error. With fewer than MIN_UNITS clusters,
# where a further one may lie anywhere, and at later steps, which have fewer requests, the lower
# SURELY_DIFFER applies. A drift below DIFFER widens the intervals; a drift below SURELY_DIFFER is
# reported, and no limit is given.
DIFFER: Final = 0.3
SURELY_DIFFER: Final = 0.05
# The same for periods, whose slow differences the stretches show already.
PERIODS_DIFFER: Final = 0.1
# The variance between few clusters is replaced by its upper bound, which is too small with this
# probability; for stretches, which need not begin where the rate changes, with a smaller one. With
# these constants, the interval from six storms of 15 busy requests that differ by half contains a
# seventh in 92 % of cases.
UNDERSTATED: Final = 1 / 3
STRETCHES_UNDERSTATED: Final = 0.2
# The same for the variance of burst sizes, whose upper tail is heavier than that of rates. The
# interval from nine bursts of a branching process (0.9 children each) contains the truth in 90 %
# of cases; with 1/3, in 86 %.
SIZES_UNDERSTATED: Final = 0.1
_ROUNDING: Final = 1e-9
# Adjacent parts are correlated where a rate lasts for longer than one part. The parts count as this
# number of independent observations of what another time may show.
ALIKE_PARTS: Final = 5.0
# If units differ, the share of a further unit is uncertain even where no request needed more.
FEW: Final = 5.0
_SOURCE_BITS: Final = 16


def clusters(at_risk: pl.DataFrame) -> pl.DataFrame:
    """Number the clusters of each unit.

    Args:
        at_risk: source, leaf, td_id and first_seq of the requests that the curves describe.

    Returns:
        The requests ordered by leaf, source and first_seq, with the columns period, stretch and td
        (cluster numbers); period_known, stretch_known and td_known (whether the request belongs to
        such a unit); and from_middle (the number of its period, counted from the middle of its
        input). A cluster never spans two inputs, so that sums over clusters are additive over
        inputs: the requests of an input whose unit is unknown form one cluster. Inputs are
        numbered by their source.
    """
    rows = in_order(at_risk, "first_seq").sort("leaf", maintain_order=True)
    inputs = rows["leaf"].to_numpy().astype(np.int64) << _SOURCE_BITS | rows["source"].to_numpy()
    _, first, n_of = np.unique(inputs, return_index=True, return_counts=True)
    n = np.repeat(n_of, n_of)
    place, known = np.arange(rows.height) - np.repeat(first, n_of), n >= _MIN_REQUESTS
    place = np.where(known, place * PERIODS // n, 0)
    tds = rows.select("source", "td_id").unique().sort("source", "td_id").with_row_index("td")
    td = rows.select("source", "td_id").join(
        tds, on=["source", "td_id"], how="left", nulls_equal=True, maintain_order="left"
    )["td"]
    return rows.with_columns(
        period=pl.col("source").cast(pl.Int64) * PERIODS + pl.Series(place),
        stretch=pl.col("source").cast(pl.Int64) * STRETCHES
        + pl.Series(place * STRETCHES // PERIODS),
        period_known=pl.Series(known),
        stretch_known=pl.Series(known),
        from_middle=pl.Series(np.where(known, place - (PERIODS - 1) / 2, 0.0)),
        td=td.cast(pl.Int64),
        td_known=pl.col("td_id").is_not_null(),
    )


def effect_of_bursts(n: Floats, squares: Floats, n_bursts: Floats) -> Floats:
    """Return the design effect of bursts, increased if bursts are few and differ in size.

    The effect is the mean size of the bursts times 1 + v, where v is their squared coefficient of
    variation. That of few bursts is too small if larger ones are rare, so it is replaced by its
    upper bound; the degrees of freedom of the sum give Student's quantile. Bursts of equal size
    need no such correction.

    Args:
        n: Number of requests at each step.
        squares: Sum of the squares of their burst sizes.
        n_bursts: Number of their bursts.

    Sources:
        F. E. Satterthwaite, Biometrics Bulletin 2 (1946) 110: degrees of freedom of a sum of a
        known and an estimated variance. The degrees of freedom of v: as many bursts of equal size
        as would give the same variance (L. Kish, Survey Sampling (1965), section 11.7), less one.
    """
    mean = np.maximum(n / n_bursts, 1.0)
    varies = np.maximum(n_bursts * squares / n**2 - 1.0, 0.0)
    are_alike = varies < _ROUNDING
    freedom = np.maximum(n_bursts / (1.0 + varies) - 1.0, 1.0)
    most = varies * np.maximum(freedom / chi_square_quantile(freedom, SIZES_UNDERSTATED), 1.0)
    of_sum = freedom * ((1.0 + most) / np.where(are_alike, 1.0, most)) ** 2
    factor = few_clusters_factor(of_sum + 1.0, CONFIDENCE)
    effect: Floats = mean * np.where(are_alike, 1.0, (1.0 + most) * factor)
    return effect


def widest(steps: pl.DataFrame, burst: Floats) -> tuple[Floats, pl.Series, pl.Series]:
    """Return the design effect of each step of curves, its unit, and whether the rate drifts.

    Where TDs, inputs or parts of the recording differ by more than chance, the interval is a
    prediction for a further one: the variance between them is added to the variance of their mean.
    The variance is relative to the share, so that a deep step with few requests does not get a
    smaller variance than an earlier step with many. Where a rate drifts, the interval includes
    the rate at both ends of the recording.

    Args:
        steps: One row per curve and step, in order: group, n_all, n_more, and for each of
            CLUSTERED_BY the columns clusters (their number), squares (sum of squares of the
            requests that need more), products (sum of these requests times all requests of the
            cluster) and sizes (sum of squares of the clusters' requests); for periods also trend,
            trend_squares, trend_mean and trend_square, sums weighted by the period's position.
        burst: Design effects of bursts.

    Sources:
        The variance of a ratio between clusters, and Student's quantile: E. L. Korn, B. I.
        Graubard, Survey Methodology 24 (1998) 193. The interval for a further cluster: J. P. T.
        Higgins, S. G. Thompson, D. J. Spiegelhalter, J. R. Statist. Soc. A 172 (2009) 137.
    """
    of = {name: steps[name].to_numpy().astype(float) for name in steps.columns if name != "group"}
    share = np.divide(of["n_more"], of["n_all"], out=np.zeros_like(burst), where=of["n_all"] > 0)
    p_drift = _drift(steps, of, share, burst)
    is_first = (steps["group"] != steps["group"].shift()).fill_null(True).to_numpy()
    base = np.maximum(burst, 1.0)
    spreads = {unit: _spread(of, unit, share, base, is_first) for unit in CLUSTERED_BY}
    drifts = (p_drift < DIFFER) & (of["n_more"] / base >= MIN_MORE)
    gain = np.where(drifts, _at_the_end(of, share), 0.0)
    # Stretches are periods of another length.
    spreads["period"] = np.maximum(spreads["period"], spreads.pop("stretch"))
    # Differences between inputs also appear as differences between their parts.
    spreads["period"] = np.maximum(spreads["period"] - spreads["source"], gain)
    effects = [base]
    for unit, spread in spreads.items():
        largest = _largest_so_far(steps["group"], spread)
        n = np.maximum(of[f"{unit}_clusters"], 2.0) if unit != "period" else ALIKE_PARTS + 0 * base
        further = np.maximum(of["n_more"], FEW) * largest * (1 + 1 / n)
        effect = base + further * few_clusters_factor(n, CONFIDENCE)
        effects.append(np.where(largest > 0, effect, 1.0))
    which, best = np.argmax(effects, axis=0), np.max(effects, axis=0)
    # The order of Dependence: requests, bursts, then the wide units.
    place = np.where(best > 1.0, which + 1, 0).astype(np.uint8)
    unit_of = pl.Series(place).cat.to(pl.Enum(names(Dependence)))
    return np.maximum(best, 1.0), unit_of, pl.Series(p_drift < SURELY_DIFFER)


def _spread(
    of: dict[str, Floats], unit: str, share: Floats, base: Floats, is_first: NDArray[np.bool_]
) -> Floats:
    """Return the variance of the share between clusters over its square; 0 if none was found.

    Args:
        of: Sums over clusters.
        unit: Unit of dependence.
        share: Share of all requests that need more.
        base: Design effect within clusters.
        is_first: Whether each step is the first of its curve.
    """
    clusters_ = of[f"{unit}_clusters"]
    n = np.maximum(clusters_, 2.0)
    enough = np.maximum(MIN_MORE, IN_EACH * clusters_)
    usable = (of["n_more"] / base >= enough) & (clusters_ >= 2) & (share < 1)
    variance = of["n_more"] * (1 - share) * (n - 1)
    raw = np.divide(_between(of, unit, share) * n, variance, out=np.ones_like(base), where=usable)
    p = chi_square_p(raw * (n - 1) / base, n - 1)
    at_first = PERIODS_DIFFER if unit == "period" else DIFFER
    differs = usable & (p < np.where(is_first & (n >= MIN_UNITS), at_first, SURELY_DIFFER))
    below = STRETCHES_UNDERSTATED if unit == "stretch" else UNDERSTATED
    raw = raw * (n - 1) / chi_square_quantile(n - 1, below)
    in_cluster = share * of[f"{unit}_sizes"] / np.maximum(of["n_all"], 1.0)
    spread = np.divide(raw - base, in_cluster, out=np.zeros_like(base), where=differs)
    known: Floats = np.maximum(spread, 0.0)
    return known


def between_hosts(steps: pl.DataFrame, burst: Floats) -> tuple[Floats, pl.Series, pl.Series]:
    """Return the result of :func:`widest` for the share of all requests, with hosts as only unit.

    The variance between hosts includes that of bursts, TDs and recordings, which each belong to
    one host. If one host has most of the requests, the hosts count as fewer. Where fewer than ten
    requests need more, the effect of the last step with enough requests is kept, or else the
    effect of bursts.

    Args:
        steps: As for :func:`widest`, for the unit host.
        burst: Design effects of bursts.

    Sources:
        The effective number of clusters where their sizes are unequal: A. V.
        Carter, K. T. Schnepel, D. G. Steigerwald, Rev. Econ. Stat. 99 (2017) 698.
    """
    of = {name: steps[name].to_numpy().astype(float) for name in steps.columns if name != "group"}
    share = np.divide(of["n_more"], of["n_all"], out=np.zeros_like(burst), where=of["n_all"] > 0)
    sizes = np.maximum(of["host_sizes"], 1.0)
    n = np.maximum(of["n_all"] ** 2 / sizes, 2.0)
    usable = (of["n_more"] >= MIN_MORE) & (of["host_clusters"] >= 2) & (share < 1)
    variance = of["n_more"] * (1 - share) * (n - 1)
    raw = np.divide(_between(of, "host", share) * n, variance, out=burst.copy(), where=usable)
    # As in _spread: the variance between few hosts is replaced by its upper bound.
    raw = raw * (n - 1) / chi_square_quantile(n - 1, UNDERSTATED)
    effect = raw * few_clusters_factor(n, CONFIDENCE)
    rows = pl.DataFrame({"group": steps["group"], "effect": effect, "known": usable})
    rows = rows.with_columns(burst=pl.Series(burst))
    last = pl.when("known").then("effect").forward_fill().over("group").fill_null(pl.col("burst"))
    best: Floats = rows.select(last.clip(1.0)).to_series().to_numpy()
    unit = pl.Series(["host"] * len(burst), dtype=pl.Enum(names(Dependence)))
    return best, unit, pl.Series(np.zeros(len(burst), np.bool_))


def _between(of: dict[str, Floats], unit: str, share: Floats) -> Floats:
    """Sum over clusters of the squared deviation of the requests that need more from the mean."""
    squares = of[f"{unit}_squares"] - 2 * share * of[f"{unit}_products"]
    return np.maximum(squares + share**2 * of[f"{unit}_sizes"], 0.0)


def _drift(steps: pl.DataFrame, of: dict[str, Floats], share: Floats, burst: Floats) -> Floats:
    """Return for each curve the p-value of the hypothesis that its rate is constant over time.

    Two tests: whether the retried share changes, by a line fitted through the parts' shares and
    their residuals; and whether retried requests need more over time, by a log-rank test for
    trend over all steps, whose variance is that of requests times the design effect of bursts.

    Sources:
        R. E. Tarone, Biometrika 62 (1975) 679: the log-rank test for trend.
    """
    square = of["trend_square"]
    trend = of["trend"] - share * of["trend_mean"]
    explained = np.divide(trend**2, square, out=np.zeros_like(trend), where=square > 0)
    freedom = np.maximum(of["period_clusters"] - 2, 1.0)
    rest = np.maximum(_between(of, "period", share) - explained, 1e-12) / freedom
    p_share = student_p(np.sqrt(explained / rest), freedom)
    usable = (of["n_more"] >= MIN_MORE) & (of["period_clusters"] >= 2) & (share < 1)
    # Residual scatter of the parts around the line, used if larger than bursts explain.
    scatter = np.divide(
        rest * of["period_clusters"],
        np.maximum(of["n_more"], 1.0) * (1 - share),
        out=np.ones_like(share),
        where=usable,
    )
    p_depth = _depth_trend(steps["group"], of, np.maximum(burst, scatter))
    # Bonferroni correction for two tests, where the first step has enough requests for them.
    either = np.where(usable, np.minimum(2 * np.minimum(p_share, p_depth), 1.0), 1.0)
    rows = pl.DataFrame({"group": steps["group"], "p": either})
    of_curve: Floats = rows.select(pl.col("p").first().over("group")).to_series().to_numpy()
    return of_curve


def _depth_trend(group: pl.Series, of: dict[str, Floats], effect: Floats) -> Floats:
    """Return the p-value of each curve's log-rank trend test, with its largest design effect."""
    n = np.maximum(of["n_more"], 1.0)
    mean = of["trend"] / n
    later = pl.DataFrame({"group": group, "n": of["n_more"], "trend": of["trend"]})
    left, trend_left = (
        later.select(pl.col(name).shift(-1).over("group").fill_null(0.0)).to_series().to_numpy()
        for name in ("n", "trend")
    )
    scatter = np.maximum(of["trend_squares"] / n - mean**2, 0.0)
    sums = pl.DataFrame(
        {
            "group": group,
            "trend": trend_left - left * mean,
            "variance": left * (n - left) / np.maximum(n - 1, 1.0) * scatter,
            "effect": effect,
        }
    )
    square = (pl.col("trend").sum() ** 2 / pl.col("variance").sum() / pl.col("effect").max()).over(
        "group"
    )
    found = sums.select(square.fill_nan(0.0)).to_series().to_numpy()
    return chi_square_p(found, np.ones_like(found))


def _at_the_end(of: dict[str, Floats], share: Floats) -> Floats:
    """Squared change of the fitted line from the middle to either end, relative to the share."""
    square = np.maximum(of["trend_square"], 1.0)
    end = (of["trend"] - share * of["trend_mean"]) / square * (PERIODS - 1) / 2
    in_period = of["n_more"] / np.maximum(of["period_clusters"], 1.0)
    gain: Floats = (end / np.maximum(in_period, 1e-12)) ** 2
    return gain


def _largest_so_far(group: pl.Series, values: Floats) -> Floats:
    """Return the cumulative maximum of each curve's values."""
    rows = pl.DataFrame({"group": group, "value": values})
    largest: Floats = rows.select(pl.col("value").cum_max().over("group")).to_series().to_numpy()
    return largest
