"""Entry waits: would one wait for mmu_lock have let a refused vCPU enter?"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import polars as pl

from tdxtrace.analysis.causes.candidates import UNCERTAIN
from tdxtrace.analysis.causes.conflicts import TREE, VP_ENTER
from tdxtrace.analysis.causes.lock_values import READERS, WRITERS
from tdxtrace.analysis.causes.scene import Scene
from tdxtrace.tables.causes import ENTRY_WAITS

_UNDER_MMU_LOCK: Final = [*READERS["mmu_lock"], *WRITERS["mmu_lock"]]


def entry_waits(scenes: Iterable[Scene]) -> pl.DataFrame:
    """Hold the seed's remedy for zero-step against each run of refused entries.

    The remedy: where TDH.VP.ENTER finds the S-EPT tree held, take and release mmu_lock, which
    waits for the critical sections in flight, and enter again (P. Bonzini, kvm list,
    2024-09-10).  It would have sufficed if every holder in flight at the first refused entry
    works under mmu_lock, and none of the entries that were tried after the last of them had
    ended was refused again.

    Args:
        scenes: One per source.

    Returns:
        The ``entry_waits`` table, by source and first_seq.
    """
    parts = [_of_source(scene) for scene in scenes]
    return pl.concat([ENTRY_WAITS.empty(), *parts]).sort("source", "first_seq")


def _of_source(scene: Scene) -> pl.DataFrame:
    refused = scene.asked.attempts.filter(pl.col("leaf") == VP_ENTER, pl.col("lock") == TREE)
    if refused.is_empty():
        return ENTRY_WAITS.empty()
    runs = _runs(scene, refused["row"])
    first = runs.filter(pl.col("row") == pl.col("row").first().over("run"))
    last = first.join(_in_flight(scene), on="row", how="left").select(
        "run", "last_end_ns", "n_holders", "waits_for_all"
    )
    rows = (
        runs.join(last, on="run", how="left")
        .group_by("run", maintain_order=True)
        .agg(
            pl.col("seq").first().alias("first_seq"),
            pl.col("tid", "tgid", "td_id", "vp_id", "entered_ns").first(),
            pl.col("begins").first().alias("start_ns"),
            pl.len().cast(pl.UInt32).alias("n_refused"),
            pl.col("n_holders").first().fill_null(0),
            pl.col("last_end_ns", "waits_for_all").first(),
            n_after=(pl.col("begins") > pl.col("last_end_ns")).sum().cast(pl.UInt32),
        )
    )
    would = pl.col("waits_for_all") & (pl.col("n_after") == 0)
    return ENTRY_WAITS.conform(
        rows.with_columns(
            source=pl.lit(scene.source, pl.UInt16),
            wait_ns=(pl.col("last_end_ns") - pl.col("start_ns")).clip(0),
            sufficed=pl.when(pl.col("n_holders") > 0).then(would),
        )
    )


def _in_flight(scene: Scene) -> pl.DataFrame:
    """Of each attempt: calls that could hold the tree, the last one's end, their kind."""
    holders = scene.fitting.filter(
        pl.col("grade") < UNCERTAIN, pl.col("core_ns") >= -scene.asked.slack_ns
    )
    ends, leaf = scene.done["ends"], scene.done["leaf"]
    return (
        holders.with_columns(
            ends=ends.gather(holders["holder"]), leaf=leaf.gather(holders["holder"])
        )
        .group_by(row="attempt")
        .agg(
            n_holders=pl.len().cast(pl.UInt32),
            last_end_ns=pl.col("ends").max(),
            waits_for_all=pl.col("leaf").is_in(_UNDER_MMU_LOCK).all(),
        )
    )


def _runs(scene: Scene, refused: pl.Series) -> pl.DataFrame:
    """Refused entries, numbered by run of one vCPU, with when it was let in after the run."""
    entries = (
        scene.done.with_row_index("row")
        .filter(pl.col("leaf") == VP_ENTER)
        .with_columns(refused=pl.col("row").is_in(refused.implode()))
        .sort("tid", "begins", "row")
    )
    begins_run = pl.col("refused") & ~pl.col("refused").shift().over("tid").fill_null(False)
    let_in = pl.when(~pl.col("refused")).then("begins").backward_fill().over("tid")
    return entries.with_columns(run=begins_run.cum_sum(), entered_ns=let_in).filter("refused")
