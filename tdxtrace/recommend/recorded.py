"""The retry policy of the kernel that was recorded, as far as its requests show it.

A limit of that kernel ends requests, and a kick changes what their next call meets: neither is
chance, and no further recording under the same policy tells what lies beyond.
"""

from __future__ import annotations

from typing import Final

import polars as pl

from tdxtrace.recommend.policy_definitions import MAINLINE
from tdxtrace.tdx.leaves import numbers_of

# Leaves that Linux 6.16 and later call once, and once more after a kick.
_KICKED: Final = [leaf for leaf, rule in MAINLINE.rules.items() if rule.kicks]
_MOST_KICKED_CALLS: Final = 2
# So many requests that end at one number are no coincidence, if none ends elsewhere: a choice of
# ours.
_MIN_ALIKE: Final = 3
# Inputs that a sentence names; of more it gives the number.
_MOST_NAMED: Final = 5
_KEY: Final = ("source", "leaf")


def recorded_policies(retry_chains: pl.DataFrame) -> pl.DataFrame:
    """Return what shows of the policy under which the requests of each leaf were recorded.

    A limit of n calls is seen where at least three requests were given up, all after n calls,
    and none made more; who gives up by chance does so at any number. A kick is possible at the
    leaves for which mainline kicks, where no request made more than two calls; it is seen where
    at least three made the second. An endless loop that never needed a third looks the same, so
    that the words say no more than "as".

    Args:
        retry_chains: The ``retry_chains`` table.

    Returns:
        One row per source and leaf, ordered by both: n_retried; calls, the limit, or 2 where a
        kick is seen, null where neither is; n_given_up, the requests given up at it; may_kick
        and is_kicked.
    """
    gave_up = pl.col("outcome").is_in(["abandoned", "resolved_elsewhere"]) & (pl.col("n_busy") > 0)
    abandoned = pl.col("outcome") == "abandoned"
    at_most = pl.col("n_attempts") == pl.col("n_attempts").max()
    kicked = numbers_of(_KICKED)
    seen = retry_chains.group_by(_KEY).agg(
        n_retried=(pl.col("n_busy") > 0).sum(),
        most=pl.col("n_attempts").max(),
        n_at_most=at_most.sum(),
        n_given_up=(gave_up & at_most).sum(),
        has_abandoned=(abandoned & at_most).any(),
        gave_up_before=(abandoned & ~at_most).any(),
    )
    is_limited = (
        (pl.col("n_given_up") >= _MIN_ALIKE) & pl.col("has_abandoned") & ~pl.col("gave_up_before")
    )
    may_kick = pl.col("leaf").is_in(kicked) & (pl.col("most") <= _MOST_KICKED_CALLS)
    is_kicked = (
        may_kick & (pl.col("most") == _MOST_KICKED_CALLS) & (pl.col("n_at_most") >= _MIN_ALIKE)
    )
    return seen.select(
        *_KEY,
        "n_retried",
        calls=pl.when(is_limited | is_kicked).then("most"),
        n_given_up=pl.when(is_limited).then("n_given_up").otherwise(0),
        may_kick=may_kick,
        is_kicked=is_kicked,
    ).sort(_KEY)


def words_of(recorded: pl.DataFrame) -> tuple[int | None, str | None]:
    """Return the calls beyond which nothing can be counted of a leaf, and say so.

    Args:
        recorded: Rows of :func:`recorded_policies` of one leaf.

    Returns:
        The most calls that any source allows, None where one with retried requests has no limit;
        the words for a reader, None where no source has one.
    """
    limited = recorded.filter(pl.col("calls").is_not_null())
    if limited.is_empty():
        return None, None
    parts = []
    for (calls, kicks), rows in limited.group_by("calls", "is_kicked", maintain_order=True):
        where = ""
        if rows.height > _MOST_NAMED:
            where = f" ({rows.height:,} of {recorded.height:,} inputs)"
        elif recorded.height > 1:
            where = f" (input {', '.join(str(source + 1) for source in rows['source'])})"
        n = int(rows["n_given_up"].sum())
        plural = "" if calls == 1 else "s"
        if kicks:
            parts.append(
                f"no request made more than {calls} calls{where}, as where the vCPUs are kicked "
                f"out before the second: what is said of {calls} holds with such a kick"
            )
        if n:
            parts.append(
                f"recorded under a limit of {calls} call{plural}{where}, at which {n:,} requests "
                "were given up: nothing beyond can be counted"
            )
    unlimited = recorded.filter(pl.col("calls").is_null(), pl.col("n_retried") > 0)
    most = limited["calls"].to_list() if unlimited.is_empty() else []
    return max(most, default=None), "; ".join(parts)
