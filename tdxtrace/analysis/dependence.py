"""Units of dependence of requests: how much less a number of requests tells as they are not alone.

Requests of one burst, one part of the recording, one TD or one input are alike. A unit's design
effect is the variance of a share between the unit's clusters over that between independent
requests; the unit with the largest counts. It is a function of sums over clusters, which add.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tdxtrace.intervals import CONFIDENCE, Floats, chi_square_p, few_clusters_factor, student_p
from tdxtrace.tables.enums import Dependence, names
from tdxtrace.tables.fleet import CLUSTERED_BY

# Parts of equal numbers of requests. Batch means want 10 to 30 of them (B. Schmeiser,
# Operations Research 30 (1982) 556): more are no longer independent, fewer tell less.
PERIODS: Final = 20
# With fewer requests a part holds too few to differ from its neighbours.
_MIN_REQUESTS: Final = 5 * PERIODS
# Fewer retried requests than this do not show how they differ between clusters (W. G. Cochran,
# Biometrics 10 (1954) 417, wants one or more in each); the effect of the step before is kept.
MIN_MORE: Final = 10
# p-values below which TDs or inputs differ (not to see it is the worse error), and below which a
# rate changes over the recording, which is looked for at each step of a curve.
DIFFER: Final = 0.1
DRIFTS: Final = 0.01
# Below this a drift is said, and no limit given: of some ten steps of a curve by chance none.
SURE: Final = 0.001


def clusters(at_risk: pl.DataFrame) -> pl.DataFrame:
    """Number the clusters of each unit.

    Args:
        at_risk: source, leaf, td_id and first_seq of the requests that curves are about.

    Returns:
        The requests ordered by leaf, source and first_seq, with the columns period and td, numbers
        of clusters; period_known and td_known, whether the request is in such a unit; and
        from_middle, the number of its period counted from the middle of its input. No cluster is
        in two inputs, so that sums over clusters add over inputs: the requests of an input whose
        unit is not known are one cluster. Inputs are numbered by their source.
    """
    rows = at_risk.sort("leaf", "source", "first_seq")
    of_input = ("leaf", "source")
    n, place = pl.len().over(of_input), pl.int_range(pl.len()).over(of_input)
    known = n >= _MIN_REQUESTS
    place = pl.when(known).then(place * PERIODS // n).otherwise(0).cast(pl.Int64)
    td = pl.struct("source", "td_id").rank("dense").cast(pl.Int64)
    return rows.with_columns(
        period=pl.col("source").cast(pl.Int64) * PERIODS + place,
        period_known=known,
        from_middle=pl.when(known).then(place - (PERIODS - 1) / 2).otherwise(0.0),
        td=td,
        td_known=pl.col("td_id").is_not_null(),
    )


def widest(steps: pl.DataFrame, burst: Floats) -> tuple[Floats, pl.Series, pl.Series]:
    """Return the design effect of each step of curves, its unit, and whether the rate drifts.

    Where TDs (or inputs) differ by more than chance, the interval is one for a further TD: the
    variance between them is added to that of their mean. Where a rate drifts, it reaches the rate
    at either end of the recording.

    Args:
        steps: By curve and step: group, n_all, n_more, and for each of CLUSTERED_BY its clusters,
            squares (sum of squares of the requests that need more), products (sum of these times
            the cluster's requests), sizes (sum of the squares of the clusters' requests); of
            periods trend, trend_mean and trend_square too, sums weighted by their place.
        burst: Design effects of bursts, with the factor for few of them.

    Sources:
        The variance of a ratio between clusters, and Student's quantile: E. L. Korn, B. I.
        Graubard, Survey Methodology 24 (1998) 193.
    """
    of = {name: steps[name].to_numpy().astype(float) for name in steps.columns if name != "group"}
    share = np.divide(of["n_more"], of["n_all"], out=np.zeros_like(burst), where=of["n_all"] > 0)
    effects, base = [burst], np.maximum(burst, 1.0)
    drifts = np.zeros(len(burst), np.bool_)
    for unit in CLUSTERED_BY:
        n = np.maximum(of[f"{unit}_clusters"], 2.0)
        usable = (of["n_more"] >= MIN_MORE) & (of[f"{unit}_clusters"] >= 2) & (share < 1)
        between = _between(of, unit, share)
        variance = of["n_more"] * (1 - share) * (n - 1)
        raw = np.divide(between * n, variance, out=np.ones_like(burst), where=usable)
        if unit == "period":
            p = _drift(of, share, between)
            differs, use = usable & (p < DRIFTS), usable
            drifts = usable & (p < SURE)
        else:
            differs = use = usable & (chi_square_p(raw * (n - 1) / base, n - 1) < DIFFER)
        beyond = _at_the_end(of, share) if unit == "period" else n * np.maximum(raw - base, 0.0)
        further = np.where(differs, beyond, 0.0)
        effect = np.where(use, (raw + further) * few_clusters_factor(n, CONFIDENCE), 1.0)
        effects.append(_as_last_known(steps["group"], effect, usable))
        base = np.maximum(base, raw) if unit == "period" else base
    which, best = np.argmax(effects, axis=0), np.max(effects, axis=0)
    # The order of Dependence: requests, bursts, then the wide units.
    place = np.where(best > 1.0, which + 1, 0).astype(np.uint8)
    unit_of = pl.Series(place).cat.to(pl.Enum(names(Dependence)))
    return np.maximum(best, 1.0), unit_of, pl.Series(drifts)


def between_hosts(steps: pl.DataFrame, burst: Floats) -> tuple[Floats, pl.Series, pl.Series]:
    """Return what :func:`widest` does, with hosts as the only unit: of the share of all requests.

    The variance between hosts holds that of bursts, TDs and recordings, which are each of one
    host. Hosts of which one has most of the requests count as fewer. Where fewer than ten requests
    need more, the effect of the last step with more is kept, or that of bursts.

    Args:
        steps: As for :func:`widest`, for the unit host.
        burst: Design effects of bursts.

    Sources:
        The number of clusters of unequal size that counts, for one of equal clusters: A. V.
        Carter, K. T. Schnepel, D. G. Steigerwald, Rev. Econ. Stat. 99 (2017) 698.
    """
    of = {name: steps[name].to_numpy().astype(float) for name in steps.columns if name != "group"}
    share = np.divide(of["n_more"], of["n_all"], out=np.zeros_like(burst), where=of["n_all"] > 0)
    sizes = np.maximum(of["host_sizes"], 1.0)
    n = np.maximum(of["n_all"] ** 2 / sizes, 2.0)
    usable = (of["n_more"] >= MIN_MORE) & (of["host_clusters"] >= 2) & (share < 1)
    variance = of["n_more"] * (1 - share) * (n - 1)
    raw = np.divide(_between(of, "host", share) * n, variance, out=burst.copy(), where=usable)
    effect = raw * few_clusters_factor(n, CONFIDENCE)
    rows = pl.DataFrame({"group": steps["group"], "effect": effect, "known": usable})
    rows = rows.with_columns(burst=pl.Series(burst))
    last = pl.when("known").then("effect").forward_fill().over("group").fill_null(pl.col("burst"))
    best: Floats = rows.select(last.clip(1.0)).to_series().to_numpy()
    unit = pl.Series(["host"] * len(burst), dtype=pl.Enum(names(Dependence)))
    return best, unit, pl.Series(np.zeros(len(burst), np.bool_))


def _between(of: dict[str, Floats], unit: str, share: Floats) -> Floats:
    """Sum over clusters of the squared distance of their requests that need more from the mean."""
    squares = of[f"{unit}_squares"] - 2 * share * of[f"{unit}_products"]
    return np.maximum(squares + share**2 * of[f"{unit}_sizes"], 0.0)


def _drift(of: dict[str, Floats], share: Floats, between: Floats) -> Floats:
    """The p-value of a line through the parts' shares, by the parts' own scatter around it."""
    square = of["trend_square"]
    trend = of["trend"] - share * of["trend_mean"]
    explained = np.divide(trend**2, square, out=np.zeros_like(trend), where=square > 0)
    freedom = np.maximum(of["period_clusters"] - 2, 1.0)
    rest = np.maximum(between - explained, 1e-12) / freedom
    return student_p(np.sqrt(explained / rest), freedom)


def _at_the_end(of: dict[str, Floats], share: Floats) -> Floats:
    """Design effect of a standard deviation as large as what a line gains until either end."""
    square, count = np.maximum(of["trend_square"], 1.0), of["period_clusters"]
    end = (of["trend"] - share * of["trend_mean"]) / square * (PERIODS - 1) / 2
    variance = np.maximum(of["n_more"] * (1 - share), 1e-12)
    gain: Floats = (end * count) ** 2 / variance
    return gain


def _as_last_known(group: pl.Series, effect: Floats, known: NDArray[np.bool_]) -> Floats:
    """The effects of steps where they are known, after that the last one that is."""
    rows = pl.DataFrame({"group": group, "effect": effect, "known": known})
    last = pl.when("known").then("effect").forward_fill().over("group").fill_null(1.0)
    filled: Floats = rows.select(last).to_series().to_numpy()
    return filled
