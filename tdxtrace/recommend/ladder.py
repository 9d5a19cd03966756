"""When the mail's loop would have warned, raised its limit, and declared a VM dead."""

from __future__ import annotations

import polars as pl

from tdxtrace.recommend.known import MAX_CALLS, Ladder

SCHEMA = {
    "source": pl.UInt16,
    "seq": pl.UInt64,
    "raised_to": pl.Int64,
    "bug": pl.Boolean,
}


def climb(answers: pl.DataFrame, ladder: Ladder) -> pl.DataFrame:
    """Replay the rising limit over the busy answers of one or more hosts.

    A limit is met by the first request that gets as many busy answers after the limit
    took that value; what reaches it later finds the next one.  So each value but the
    last is met once, and the host's answers need be looked at once per value.

    Args:
        answers: Rows of ``busy_answers`` for the calls inside the loop.  The limit is
            kept from VM to VM, and begins anew with each source.
        ladder: Where it begins, by how much it rises, where it ends.

    Returns:
        One row per warning: source, seq of the answer, raised_to (null where it is not
        raised), bug (whether the VM dies of it).
    """
    met = [
        row
        for source in answers["source"].unique().sort()
        for row in _of_host(answers.filter(pl.col("source") == source), ladder, source)
    ]
    return pl.DataFrame(met, schema=SCHEMA, orient="row")


def _of_host(
    answers: pl.DataFrame, ladder: Ladder, source: int
) -> list[tuple[int, int, int | None, bool]]:
    met: list[tuple[int, int, int | None, bool]] = []
    limit, since = ladder.initial, -1
    # The first busy answer takes the other branch, so a limit of 1 is never met.
    while 1 < limit <= MAX_CALLS:
        here = answers.filter(pl.col("number") == limit, pl.col("seq") > since)["seq"].sort()
        if here.is_empty():
            break
        if limit == ladder.bug:
            met += [(source, seq, None, True) for seq in here]
            break
        since = here[0]
        limit *= ladder.factor
        met.append((source, since, limit, False))
    return met
