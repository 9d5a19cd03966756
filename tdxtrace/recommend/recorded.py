"""The retry policy of the recorded kernel, inferred from its requests.

That kernel's limit ends requests, and its kick changes the outcome of their next call. Neither is
random, so further recordings under the same policy give no information beyond the limit.
"""

from __future__ import annotations

from typing import Final

import polars as pl

from tdxtrace.recommend.policy_definitions import MAINLINE
from tdxtrace.tdx.leaves import numbers_of

# Leaves that Linux 6.16 and later call once, and once again after a kick.
_KICKED: Final = [leaf for leaf, rule in MAINLINE.rules.items() if rule.kicks]
_MAX_KICKED_CALLS: Final = 2
# At least this many requests that all end after the same number of calls are taken for a limit:
# chosen by the project.
_MIN_EQUAL: Final = 3
# Maximum number of inputs that a sentence lists; with more it gives their number.
_MAX_NAMED: Final = 5
_KEY: Final = ("source", "leaf")


def recorded_policies(retry_chains: pl.DataFrame) -> pl.DataFrame:
    """Infer the limit and the kick of the recorded kernel, per source and leaf.

    A limit of n calls is inferred if at least three requests were given up, all after n calls, and
    no request made more; callers that give up for other reasons would do so at any number. A kick
    is possible for the leaves for which mainline kicks, if no request made more than two calls; it
    is inferred if at least three made the second. An endless loop that never needed a third call
    looks the same, so reports word it as a comparison ("as on a kernel that ...").

    Args:
        retry_chains: The ``retry_chains`` table.

    Returns:
        One row per source and leaf, sorted by both: n_retried; calls, the inferred limit, 2 for an
        inferred kick, null for neither; n_given_up, the requests given up at the limit; may_kick;
        is_kicked.
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
        (pl.col("n_given_up") >= _MIN_EQUAL) & pl.col("has_abandoned") & ~pl.col("gave_up_before")
    )
    may_kick = pl.col("leaf").is_in(kicked) & (pl.col("most") <= _MAX_KICKED_CALLS)
    is_kicked = (
        may_kick & (pl.col("most") == _MAX_KICKED_CALLS) & (pl.col("n_at_most") >= _MIN_EQUAL)
    )
    return seen.select(
        *_KEY,
        "n_retried",
        calls=pl.when(is_limited | is_kicked).then("most"),
        n_given_up=pl.when(is_limited).then("n_given_up").otherwise(0),
        may_kick=may_kick,
        is_kicked=is_kicked,
    ).sort(_KEY)


def policy_summary(recorded: pl.DataFrame) -> tuple[int | None, str | None]:
    """Return the number of calls beyond which a leaf's requests cannot be counted, with a text.

    Args:
        recorded: Rows of :func:`recorded_policies` of one leaf.

    Returns:
        The largest limit of all sources, None if a source with retried requests has no limit;
        and a description of the limits, None if no source has one.
    """
    limited = recorded.filter(pl.col("calls").is_not_null())
    if limited.is_empty():
        return None, None
    parts = []
    for (calls, kicks), rows in limited.group_by("calls", "is_kicked", maintain_order=True):
        where = ""
        if rows.height > _MAX_NAMED:
            where = f" ({rows.height:,} of {recorded.height:,} inputs)"
        elif recorded.height > 1:
            where = f" (input {', '.join(str(source + 1) for source in rows['source'])})"
        n = int(rows["n_given_up"].sum())
        plural = "" if calls == 1 else "s"
        if kicks:
            parts.append(
                f"no request made more than {calls} calls{where}, as on a kernel that kicks the "
                f"vCPUs out before the second: numbers for {calls} are valid only with such a kick"
            )
        if n:
            parts.append(
                f"recorded under a limit of {calls} call{plural}{where}, at which {n:,} requests "
                "were given up: beyond it nothing can be counted"
            )
    unlimited = recorded.filter(pl.col("calls").is_null(), pl.col("n_retried") > 0)
    calls_per_leaf = limited["calls"].to_list() if unlimited.is_empty() else []
    return max(calls_per_leaf, default=None), "; ".join(parts)
