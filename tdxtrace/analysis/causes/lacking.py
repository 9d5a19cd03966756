"""Why an attempt cannot be explained, and which capture would have told?"""

from __future__ import annotations

from typing import Final

import polars as pl

from tdxtrace.analysis.causes import keys
from tdxtrace.analysis.causes.candidates import UNCERTAIN
from tdxtrace.analysis.causes.conflicts import VP_ENTER, conflicts
from tdxtrace.analysis.causes.judgement import CLOCK, DIFFER
from tdxtrace.analysis.causes.scene import Scene
from tdxtrace.tables.causes import LACKS
from tdxtrace.tdx.leaves import leaf_table

# KVM's callers of what can hold the locks that are contended at run time: Linux 6.16
# arch/x86/kvm/vmx/tdx.c; TDH.VP.ENTER is seen through tdx_vcpu_run.
_VCPU_RUN: Final = "tdx_vcpu_run"
_NAMED: Final = 3

_ADVICE: Final = {
    "entry_probes": "probe entries too, not only returns: without its start nothing overlaps it",
    "arguments": "let the probes fetch td, gpa, level and page: the holder must be on the same",
    "lost_events": "record with a larger buffer: the holder may be among the events lost here",
    "trace_edge": "record for longer: the holder's call may reach beyond the edge of the trace",
    "generation": "say --module VERSION or --generation A, B or C: they give different answers",
    "clock": "record with a clock of nanoseconds (trace_clock mono): several calls may overlap",
    "holder": "nobody fits although the calls that could hold it were probed",
}


def reasons(scene: Scene, told: pl.DataFrame, order: pl.DataFrame) -> pl.DataFrame:
    """Say for each attempt why it would stay unexplained, if it does.

    Args:
        scene: The attempts of one source.
        told: What calls tell of each (:func:`~.judgement.causes_of`).
        order: Their candidates (:func:`~.judgement.ranked`).

    Returns:
        Columns row, lacks (Enum of LACKS) and advice.
    """
    known = _known(scene, told, order)
    timed = pl.col("start_ns").is_not_null()
    lost = pl.col("lossy") | (pl.col("doubtful") & pl.lit(scene.lossy.any()))
    reason = (
        pl.when(~timed & ~pl.col("entries"))
        .then(pl.lit("entry_probes"))
        .when(~timed)
        .then(pl.lit("lost_events"))
        .when(_unnamed(known))
        .then(pl.lit("arguments"))
        .when(pl.col("told") == DIFFER)
        .then(pl.lit("generation"))
        .when(lost)
        .then(pl.lit("lost_events"))
        .when("doubtful")
        .then(pl.lit("trace_edge"))
        .when((pl.col("missing") != "") & (pl.col("told") != CLOCK))
        .then(pl.lit("holder_probes"))
        .when(pl.col("told") == CLOCK)
        .then(pl.lit("clock"))
        .otherwise(pl.lit("holder"))
    )
    probe = pl.format("probe {} too: no call of it was seen, and it may hold this", "missing")
    advice = pl.col("lacks").replace_strict(_ADVICE, default=None, return_dtype=pl.String)
    return known.with_columns(lacks=reason).select(
        "row",
        pl.col("lacks").cast(pl.Enum(LACKS)),
        advice=pl.when(pl.col("lacks") == "holder_probes").then(probe).otherwise(advice),
    )


def _known(scene: Scene, told: pl.DataFrame, order: pl.DataFrame) -> pl.DataFrame:
    """The attempts with what the capture shows of each."""
    rows = scene.asked.attempts.unique("row", keep="first", maintain_order=True)
    # Not gates: what would show whether one was armed is no longer trace.
    unsure = (pl.col("grade") == UNCERTAIN) & ~pl.col("is_armed")
    doubtful = order.filter(unsure).select(row="attempt").unique()
    calls = scene.done[rows["row"]].select("start_ns", "td_id", "gpa", "vp_id", "page")
    entries = scene.done.group_by("leaf").agg(entries=pl.col("start_ns").is_not_null().any())
    locks = rows["lock"].drop_nulls().unique()
    missing = {str(lock): _unprobed(scene, str(lock)) for lock in locks}
    named = pl.col("lock").replace_strict(missing, default="", return_dtype=pl.String)
    return (
        pl.concat([rows, calls], how="horizontal")
        .join(told, on="row", how="left", maintain_order="left")
        .join(entries, on="leaf", how="left", maintain_order="left")
        .with_columns(
            lossy=scene.lossy.gather(rows["row"]),
            doubtful=pl.col("row").is_in(doubtful["row"].implode()),
            missing=pl.when(pl.col("lock").is_null())
            .then(pl.lit(_epoch_probe(scene)))
            .otherwise(named),
        )
    )


def _unnamed(rows: pl.DataFrame) -> pl.Expr:
    """Whether the capture lacks what the attempt's lock is told apart by."""
    missing = pl.lit(False)
    for scope in rows["scope"].drop_nulls().unique():
        columns = keys.needs(str(scope))
        if columns:
            without = pl.any_horizontal(pl.col(c).is_null() for c in columns)
            missing |= (pl.col("scope") == scope) & without
    return missing.fill_null(False)


def _unprobed(scene: Scene, lock: str) -> str:
    """Probes on leaves that can hold the lock against an attempt and of which there is no call."""
    attempting = scene.asked.attempts.filter(pl.col("lock") == lock)["leaf"].unique()
    holding = conflicts(lock).holders(attempting.to_numpy().astype("intp"), scene.mask)
    seen = set(scene.done["leaf"].unique())
    wrappers = dict(leaf_table().select("leaf", "wrappers").iter_rows())
    names = [
        _VCPU_RUN if leaf == VP_ENTER else wrappers[leaf][0]
        for leaf in wrappers
        if holding[leaf] and leaf not in seen and (leaf == VP_ENTER or wrappers[leaf])
    ]
    return ", ".join(names[:_NAMED]) + (", …" if len(names) > _NAMED else "")


def _epoch_probe(scene: Scene) -> str:
    return "" if VP_ENTER in set(scene.done["leaf"].unique()) else _VCPU_RUN
