"""Replay of the mail's doubling limit: warnings, increases and dead VMs."""

from __future__ import annotations

import polars as pl

from tdxtrace.recommend.policy_definitions import MAX_CALLS, DoublingLimit

SCHEMA = {
    "source": pl.UInt16,
    "seq": pl.UInt64,
    "raised_to": pl.Int64,
    "bug": pl.Boolean,
}


def replay(answers: pl.DataFrame, doubling: DoublingLimit) -> pl.DataFrame:
    """Replay the doubling limit over the busy answers of one or more hosts.

    A limit is met by the first request that gets as many busy answers after the limit
    took that value; later requests meet the next value.  So each value but the last is
    met once, and the host's answers are searched once per value.

    Args:
        answers: Rows of ``busy_answers`` for the calls inside the loop.  The limit is
            kept from VM to VM, and begins anew with each source.
        doubling: Initial limit, factor and fatal limit.

    Returns:
        One row per warning: source, seq of the answer, raised_to (null where it is not
        raised), bug (whether the VM dies of it).
    """
    warnings = [
        row
        for source in answers["source"].unique().sort()
        for row in _replay_host(answers.filter(pl.col("source") == source), doubling, source)
    ]
    return pl.DataFrame(warnings, schema=SCHEMA, orient="row")


def _replay_host(
    answers: pl.DataFrame, doubling: DoublingLimit, source: int
) -> list[tuple[int, int, int | None, bool]]:
    warnings: list[tuple[int, int, int | None, bool]] = []
    limit, since = doubling.initial, -1
    # The first busy answer takes the other branch, so a limit of 1 is never met.
    while 1 < limit <= MAX_CALLS:
        reached = answers.filter(pl.col("number") == limit, pl.col("seq") > since)["seq"].sort()
        if reached.is_empty():
            break
        if limit == doubling.bug:
            warnings += [(source, seq, None, True) for seq in reached]
            break
        since = reached[0]
        limit *= doubling.factor
        warnings.append((source, since, limit, False))
    return warnings
