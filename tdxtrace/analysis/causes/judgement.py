"""Of the calls that could have held a lock, which one is the answer, and how sure is it?"""

from __future__ import annotations

from typing import Final

import polars as pl

from tdxtrace.analysis.causes.candidates import UNCERTAIN, WHOLE
from tdxtrace.analysis.causes.conflicts import ENTRY, GENERATIONS, TREE, VP_ENTER, mask_of
from tdxtrace.analysis.causes.inside import guests_inside
from tdxtrace.analysis.causes.scene import Scene
from tdxtrace.tdx.leaves import numbers_of

# What stands in the place of a cause that could not be told.
NOBODY, CLOCK, DIFFER = "nobody", "clock", "differ"
# Leaves of the host that work on an SEPT entry and that KVM calls at run time.  A capture with
# none but installs in it may have probed no others, and one with a single leaf shows nobody.
_INSTALLS: Final = numbers_of(["TDH.MEM.PAGE.AUG", "TDH.MEM.SEPT.ADD"])
_ZAPS: Final = numbers_of(
    ["TDH.MEM.RANGE.BLOCK", "TDH.MEM.PAGE.REMOVE", "TDH.MEM.PAGE.DEMOTE", "TDH.MEM.SEPT.REMOVE"]
)
_LEAST_SEEN: Final = 2


def ranked(scene: Scene) -> pl.DataFrame:
    """Put the candidates of every attempt in order, best first.

    A call that was in the middle of its work when the attempt met the lock fits better than
    one that only touches it, then one that held the lock to its end better than one that
    failed on the way or whose gate is not surely armed, then the one that held it longer: of
    several that hold a lock together the module knows no order.

    Returns:
        The candidates with cause, short_ns (by how much they miss each other between their
        edges; 0: they do not), is_proven (they meet whatever the clock rounded away; never a
        gate: how soon it let go of the tree is not shown), since (the holder's begin), seen
        (events at the time of the attempt are in sight, of all CPUs).
    """
    slack = scene.asked.slack_ns
    frame = scene.fitting
    return frame.with_columns(
        cause=pl.when("is_armed").then(pl.lit("armed_entry")).otherwise(pl.lit("host_conflict")),
        short_ns=pl.max_horizontal(-pl.col("core_ns"), 0),
        is_proven=(pl.col("core_ns") >= slack) & (pl.col("grade") == WHOLE) & ~pl.col("is_armed"),
        since=scene.done["begins"].gather(frame["holder"]),
        seen=scene.in_sight.gather(frame["attempt"]),
    ).sort(
        "attempt", pl.col("grade") == UNCERTAIN, "short_ns", "is_armed", "grade", "since", "holder"
    )


def causes_of(scene: Scene, order: pl.DataFrame) -> pl.DataFrame:
    """Find the cause of each attempt that calls of the host can have made busy.

    Under one generation the best candidate is the answer if it was at work beyond doubt, or
    if the capture shows every call that could have held the lock and all that may have are
    of one cause.  Where generations that are still possible disagree, or one has nobody,
    there is none.

    Returns:
        Columns row and told: a cause, or NOBODY, CLOCK or DIFFER; one row per attempt.
    """
    attempts = scene.asked.attempts.group_by("row", maintain_order=True).agg(
        (pl.col("mask") & pl.lit(scene.mask, pl.UInt8)).bitwise_or()
    )
    told = []
    for name in GENERATIONS:
        bit = pl.lit(mask_of(name), pl.UInt8)
        here = attempts.filter((pl.col("mask") & bit) > 0).select("row")
        best = _best(scene, order.filter((pl.col("mask") & bit) > 0))
        told.append(
            here.join(best, on="row", how="left").with_columns(pl.col("told").fill_null(NOBODY))
        )
    merged = pl.concat(told).group_by("row").agg(pl.col("told").unique())
    one = pl.col("told").list.len() == 1
    found = merged.select(
        "row", told=pl.when(one).then(pl.col("told").list.first()).otherwise(pl.lit(DIFFER))
    )
    rest = attempts.join(found, on="row", how="anti").select("row", told=pl.lit(NOBODY))
    return pl.concat([found, rest]).sort("row")


def _best(scene: Scene, order: pl.DataFrame) -> pl.DataFrame:
    """The answer of one generation: columns row and told."""
    slack = scene.asked.slack_ns
    complete = VP_ENTER in set(scene.done["leaf"].unique())
    near = pl.col("short_ns") <= pl.col("short_ns").first() + 2 * slack
    as_sure = pl.col("is_proven") & (pl.col("grade") == pl.col("grade").first())
    fits = (pl.col("grade").first() == WHOLE) & (pl.col("short_ns").first() == 0)
    best = order.group_by("attempt", maintain_order=True).agg(
        pl.col("cause", "is_proven", "grade", "lock", "seen").first(),
        n_causes=pl.col("cause").filter(near).n_unique(),
        n_proven=pl.col("cause").filter(as_sure).n_unique(),
        is_gate=pl.col("cause").first() == "armed_entry",
        # Whether a call that surely had the tree was together with the attempt for more than
        # half of what both take to get in and out, or for three quarters if the gate was surely
        # armed and at work: then the attempt may well have met it, and a gate is no answer.
        is_rivalled=(
            (pl.col("cause") != "armed_entry")
            & (pl.col("lock") == TREE)
            & (pl.col("overlap_ns") > pl.col("short_ns") * pl.when(fits).then(3).otherwise(1))
        ).any(),
        is_together=pl.col("overlap_ns").first() >= 0,
    )
    # A guest may have the lock of an entry as well, and an armed entry that was not probed the
    # tree: only a call that was surely at work rules them out.
    alone = (
        (pl.col("n_causes") == 1)
        & (pl.col("lock") != ENTRY)
        & (pl.lit(complete) | (pl.col("lock") != TREE))
    )
    sure = (pl.col("is_proven") & (pl.col("n_proven") == 1)) | alone
    # A gate is what is left when no call fits, so every call must be in sight.
    gate = pl.col("is_together") & ~pl.col("is_rivalled") & pl.col("seen")
    return best.filter(pl.col("grade") < UNCERTAIN).select(
        row="attempt",
        told=pl.when(sure & (gate | ~pl.col("is_gate"))).then("cause").otherwise(pl.lit(CLOCK)),
    )


def guests_of(scene: Scene, told: pl.DataFrame, order: pl.DataFrame) -> pl.DataFrame:
    """Find the attempts that only a guest can have made busy, and which vCPUs it may have been.

    A guest's TDCALLs take the lock of an SEPT entry and nothing else that a host call wants.
    So an entry lock that no call of the host held was held by a guest, provided that the
    capture would have shown such a call, and that a vCPU of the TD was in its guest.

    Returns:
        Columns row, is_inside (False: entries of vCPUs were not captured at all), n_inside
        (UInt32), holder (row of the entry that overlaps most; null if none) and overlap_ns.
    """
    done, asked = scene.done, scene.asked
    on_entry = asked.attempts.filter(pl.col("lock") == ENTRY).select("row").unique()
    doubtful = order.filter(pl.col("lock") == ENTRY).select("attempt").unique()
    rows = (
        told.filter(pl.col("told") == NOBODY)
        .join(on_entry, on="row", how="semi")
        .join(doubtful, left_on="row", right_on="attempt", how="anti")["row"]
    )
    flags = pl.DataFrame({"row": rows, "lossy": scene.lossy.gather(rows)}).with_columns(
        done.select("start_ns", "td_id", "gpa")[rows]
    )
    rows = flags.filter(~pl.col("lossy")).drop_nulls()["row"]
    seen = set(done["leaf"].unique())
    if len(seen & {*_INSTALLS, *_ZAPS}) < _LEAST_SEEN:
        rows = rows.clear()
    inside = guests_inside(done, rows, asked.slack_ns).sort(
        "attempt", -pl.col("overlap_ns"), "holder"
    )
    best = inside.group_by("attempt", maintain_order=True).agg(
        pl.col("holder", "overlap_ns").first(), n_inside=pl.len().cast(pl.UInt32)
    )
    if 0 not in seen:
        blind = pl.DataFrame({"row": rows}, schema={"row": pl.UInt32})
        return blind.with_columns(
            holder=pl.lit(None, pl.UInt32),
            overlap_ns=pl.lit(None, pl.Int64),
            n_inside=pl.lit(1, pl.UInt32),
            is_inside=pl.lit(False),
        )
    return best.rename({"attempt": "row"}).with_columns(is_inside=pl.lit(True))


def confidence_of_call() -> pl.Expr:
    """How sure the best candidate of an attempt is, from its row with ``lossy`` beside it.

    A call that was surely at work is a weak answer beside a gate that may have been: which
    of the two it met is not shown, but calls are many and gates are few.
    """
    alone = pl.col("n_causes_of") == 1
    gate = pl.col("is_armed") & (pl.col("grade") == WHOLE) & (pl.col("short_ns") == 0)
    return (
        pl.when(pl.col("is_proven") & alone & ~pl.col("lossy"))
        .then(pl.lit("proof"))
        .when((pl.col("is_proven") | gate) & alone)
        .then(pl.lit("strong"))
        .otherwise(pl.lit("weak"))
    )


def shows_zaps(seen: set[int]) -> bool:
    """Whether a capture with these leaves shows the zaps that a guest is told apart from."""
    return bool(seen & set(_ZAPS))
