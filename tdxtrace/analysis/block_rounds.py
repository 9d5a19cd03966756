"""Rounds of blocked ranges: a TDH.MEM.RANGE.BLOCK and the next state change of the range."""

from __future__ import annotations

from typing import Final

import polars as pl

from tdxtrace.analysis.lookup import first_after
from tdxtrace.analysis.threads import VP_ENTER, may_miss_events
from tdxtrace.tables.trace import Trace
from tdxtrace.tdx import leaves, word
from tdxtrace.tdx.exit_reasons import STEPPING_EPF_THRESHOLD, exit_reason_number

_AUG, _BLOCK, _UNBLOCK, _TRACK = leaves.numbers_of(
    f"TDH.MEM.{name}" for name in ("PAGE.AUG", "RANGE.BLOCK", "RANGE.UNBLOCK", "TRACK")
)
_SEAMCALL: Final = "seamcall"
_SEPT_RD: Final = leaves.parse_leaf("TDH.MEM.SEPT.RD")[0]
_DEMOTE, _PROMOTE, _RELOCATE = leaves.numbers_of(
    f"TDH.MEM.PAGE.{name}" for name in ("DEMOTE", "PROMOTE", "RELOCATE")
)
# Leaves that require the range to be blocked and tracked: intel/tdx-module 1.5
# tdh_mem_page_remove.c and the files of the other leaves.
REMOVALS: Final = [
    *(_DEMOTE, _PROMOTE, _RELOCATE),
    *leaves.numbers_of(f"TDH.MEM.{name}" for name in ("PAGE.REMOVE", "SEPT.REMOVE")),
]
STATE_CHANGES: Final = [_AUG, _BLOCK, _UNBLOCK, *REMOVALS]
# A split followed by a merge, or a merge followed by a split, restores the guest's mapping.
_INVERSES: Final = [_DEMOTE, _PROMOTE]
# KVM_EXIT_HYPERCALL, include/uapi/linux/kvm.h: the exit by which KVM forwards MapGPA to userspace
# (Linux 6.16 arch/x86/kvm/vmx/tdx.c, tdx_map_gpa).
_HYPERCALL: Final = 3
_LAST_NS: Final = (1 << 63) - 1
_TDCALL: Final = exit_reason_number("TDCALL") or 0
# 512 entries at each level: TDX module 1.5 base specification, Secure EPT.
_LEVEL_BITS: Final = 9
_PAGE_BITS: Final = 12
_N_LEVELS: Final = 5
ENTRY: Final = ("source", "td_id", "level", "key")
# Columns of calls that this module reads.
_COLUMNS: Final = ("source", "seq", "tid", "tgid", "td_id", "leaf", "status", "gpa", "level")

FATES: Final = ("open", "removed", "undone", "churned")


def entry_key(level: int | pl.Expr) -> pl.Expr:
    """Return the number of the Secure EPT entry at a level that maps ``gpa``."""
    width = 1 << _PAGE_BITS
    if isinstance(level, int):
        return pl.col("gpa") // (width << _LEVEL_BITS * level)
    return pl.col("gpa") // entry_bytes(level)


def entry_bytes(level: pl.Expr) -> pl.Expr:
    """Return the number of bytes that a Secure EPT entry at a level maps."""
    sizes = [1 << _PAGE_BITS + _LEVEL_BITS * n for n in range(_N_LEVELS)]
    return level.replace_strict(range(_N_LEVELS), sizes, default=sizes[0], return_dtype=pl.UInt64)


def state_changes(calls: pl.DataFrame) -> pl.DataFrame:
    """Return the calls that changed the state of a Secure EPT entry, ordered by start time.

    Args:
        calls: The ``seamcalls`` table.

    Returns:
        Columns source, seq, tid, td_id, leaf, gpa, level (if not recorded, the level of other
        calls on this address, else 0), key (:func:`entry_key`), at and end (ns).
    """
    done = calls.filter(pl.col("leaf").is_in(STATE_CHANGES), pl.col("status") == 0)
    return _with_entry(done).drop_nulls(["td_id", "gpa", "at"]).drop("status").sort("at", "seq")


def _with_entry(calls: pl.DataFrame) -> pl.DataFrame:
    """Add the times of calls, and the Secure EPT entry of each."""
    at, end = pl.coalesce("start_ns", "end_ns"), pl.coalesce("end_ns", "start_ns")
    rows = calls.select(*_COLUMNS, at=at, end=end)
    if rows["level"].null_count():
        other = pl.col("level").drop_nulls().first().over("source", "td_id", "gpa")
        rows = rows.with_columns(level=pl.coalesce("level", other, 0))
    rows = rows.with_columns(level=level_by_address())
    return rows.with_columns(key=entry_key(pl.col("level")))


def level_by_address() -> pl.Expr:
    """Return the level of a call; 0 if its address is not aligned to the recorded level.

    The module refuses such an address (1.5 src/common/helpers/helpers.h, verify_page_info_input),
    so the level was read with the wrong base: Linux counts from 0, and since 7.2 from 1.
    """
    level = pl.col("level")
    fits = (pl.col("gpa") % entry_bytes(level) == 0).fill_null(True)
    return pl.when(fits).then(level).otherwise(0)


def block_rounds(trace: Trace, faults: pl.DataFrame) -> pl.DataFrame:
    """Classify the outcome of each blocked range.

    ``churned``: the range was restored unchanged to the guest, and nothing was attempted meanwhile:
    the range was unblocked, and no call that needs a blocked range was tried on it; or it was split
    (merged) again, after it had been split (merged) and the opposite, or moved again.

    ``undone``: the range was also restored, but the blocking had a purpose, or may have had one.
    Nearest innocent rounds, each of which is classified as ``undone``:

    * The host tried to remove, split, merge or move the range, or a part of it, and failed; or it
      read its entries (TDH.MEM.SEPT.RD), as when it checks whether they can be merged.
    * The range was mapped by a table, and a trace of probes on wrappers has no PROMOTE: no released
      kernel has a wrapper for PROMOTE, so it is rarely probed, and a failed merge is not recorded
      (a range that was mapped as one page cannot be merged).  A BLOCK recorded by the probe on
      ``__seamcall_ret`` shows that every leaf with outputs was probed, which includes PROMOTE.
    * The thread that blocked the range failed to block another range or to track, and reverted
      everything.
    * The round is the first split or merge of a range that was split and merged in turn: until the
      sequence repeats, it looks like a split for dirty logging, which a merge follows.
    * The range was blocked for the guest: the last exit of the vCPU of the thread that blocked was
      a TDCALL, such as TDG.VP.VMCALL<MapGPA>; or a vCPU of the process waited for userspace to
      serve one.
    * A vCPU's thread unblocked the range to serve a fault, before that vCPU had enough faults to
      arm the mitigation (inferred: the purpose of UNBLOCK in the series of 2024-09).

    ``removed``: the range was removed, split, merged or moved.  ``open``: no end was recorded, or
    events may be lost before it.

    Evidence: the calls themselves.  Absence: a leaf without rows in the trace may not be probed,
    and its calls in between are then not recorded; verdicts must take this into account.

    Args:
        trace: The events.
        faults: Private faults of the trace: source, tid, ts_ns, gpa.

    Returns:
        Columns of :data:`ENTRY`, seq (of the BLOCK), tid, start_ns (of the BLOCK), end_ns (start of
        the call that ended the round; null if none), done_ns (its end), ended_by (its leaf), fate
        (one of :data:`FATES`).

    Sources:
        intel/tdx-module 1.5.01 tdh_mem_range_block.c, tdh_mem_range_unblock.c.
    """
    calls, entries = trace.seamcalls, trace.vm_entries
    changes = state_changes(calls)
    blocked = changes.filter(pl.col("leaf") == _BLOCK).select(ENTRY).unique()
    changes = _mark_repeats(changes.join(blocked, on=ENTRY, how="semi", maintain_order="left"))
    rounds = (
        changes.with_columns(
            pl.col("again", "repeated").shift(-1, fill_value=False).over(ENTRY),
            ended_by=pl.col("leaf").shift(-1).over(ENTRY),
            end_ns=pl.col("at").shift(-1).over(ENTRY),
            done_ns=pl.col("end").shift(-1).over(ENTRY),
            end_tid=pl.col("tid").shift(-1).over(ENTRY),
            mapped_by=_last_mapping(),
        )
        .filter(pl.col("leaf") == _BLOCK)
        .rename({"at": "start_ns"})
        .drop("end", "leaf")
        .with_row_index("round")
    )
    restored = rounds.filter(pl.col("again") | (pl.col("ended_by") == _UNBLOCK))
    with_purpose = pl.concat(
        [
            _with_attempts(restored, calls),
            _may_be_merges(restored, calls),
            _after_tdcall(restored, calls, entries),
            _for_userspace(restored, trace),
            _ended_by_faults(restored, calls, entries, faults),
        ]
    ).unique()
    has_purpose = pl.col("round").is_in(with_purpose["round"].implode())
    lossy = pl.col("round").is_in(_lossy(rounds, trace.losses)["round"].implode())
    return rounds.with_columns(excused=has_purpose, lossy=lossy).select(
        *ENTRY, "seq", "tid", "start_ns", "end_ns", "done_ns", "ended_by", fate=_fate()
    )


def _fate() -> pl.Expr:
    ended_by = pl.col("ended_by")
    fate = (
        pl.when(ended_by.is_null() | pl.col("lossy"))
        .then(pl.lit("open"))
        .when(pl.col("again") & ~pl.col("excused"))
        .then(pl.lit("churned"))
        .when(ended_by == _UNBLOCK)
        .then(pl.when("excused").then(pl.lit("undone")).otherwise(pl.lit("churned")))
        .when("repeated")
        .then(pl.lit("undone"))
        .when(ended_by.is_in(REMOVALS))
        .then(pl.lit("removed"))
        .otherwise(pl.lit("open"))
    )
    return fate.cast(pl.Enum(FATES))


def _mark_repeats(changes: pl.DataFrame) -> pl.DataFrame:
    """Mark repeated splits, merges and moves (again), and the first turn of them (repeated)."""
    size_changes = changes.filter(~pl.col("leaf").is_in([_BLOCK, _UNBLOCK])).with_columns(
        before=pl.col("leaf").shift(1).over(ENTRY), earlier=pl.col("leaf").shift(2).over(ENTRY)
    )
    leaf, before = pl.col("leaf"), pl.col("before")
    both = leaf.is_in(_INVERSES) & before.is_in(_INVERSES) & (before != leaf)
    turned = (both & (pl.col("earlier") == leaf)).fill_null(False)
    moved = ((leaf == _RELOCATE) & (before == _RELOCATE)).fill_null(False)
    turns = size_changes.with_columns(turned=turned).select(
        "source",
        "seq",
        again=turned | moved,
        repeated=pl.any_horizontal(
            pl.col("turned").shift(-n, fill_value=False).over(ENTRY) for n in (1, 2)
        ),
    )
    marked = changes.join(turns, on=["source", "seq"], how="left", maintain_order="left")
    return marked.with_columns(pl.col("again", "repeated").fill_null(False))


def _last_mapping() -> pl.Expr:
    """Return the leaf that last mapped the range as one page, or by a table."""
    maps = pl.col("leaf").is_in([_AUG, *_INVERSES])
    return pl.when(maps).then("leaf").forward_fill().over(ENTRY)


def _may_be_merges(rounds: pl.DataFrame, calls: pl.DataFrame) -> pl.DataFrame:
    """Return rounds whose range may be mapped by a table, in sources where PROMOTE may be missing.

    BLOCK and PROMOTE return the entry, so both go through ``__seamcall_ret`` (Linux 6.16
    arch/x86/virt/vmx/tdx/tdx.c, seamcall_ret).
    """
    all_leaves = (pl.col("leaf") == _BLOCK) & (pl.col("probe") == _SEAMCALL)
    seen = calls.filter((pl.col("leaf") == _PROMOTE) | all_leaves)["source"].unique()
    is_page = (pl.col("level") == 0) | pl.col("mapped_by").is_in([_AUG, _PROMOTE]).fill_null(False)
    return rounds.filter(~is_page, ~pl.col("source").is_in(seen.implode())).select("round")


def _with_attempts(rounds: pl.DataFrame, calls: pl.DataFrame) -> pl.DataFrame:
    """Return rounds in which the host read entries, or a call related to the blocking failed."""
    own = ["source", "tid", "leaf", "gpa"]
    attempts = calls.filter(pl.col("leaf").is_in([_BLOCK, _TRACK, _SEPT_RD, *REMOVALS]))
    if rounds.is_empty() or attempts.is_empty():
        return rounds.select("round").clear()
    is_read = pl.col("leaf") == _SEPT_RD
    failed = is_read | ~word.is_success(pl.col("status")).fill_null(False)
    tried = _with_entry(attempts).sort("at", "seq").with_columns(failed=failed)
    done_at = pl.when(~pl.col("failed")).then("at").backward_fill().over(own)
    tried = tried.with_columns(done_at=done_at).filter("failed")
    pairs = (
        rounds.select("round", "source", "td_id", "level", "gpa", "tid", "start_ns", "end_ns")
        .join_where(
            tried.drop("key", "status", "seq", "end", "failed"),
            pl.col("start_ns") <= pl.col("at"),
            pl.col("end_ns") >= pl.col("at"),
            suffix="_tried",
        )
        .filter(
            pl.col("source") == pl.col("source_tried"),
            (pl.col("td_id") == pl.col("td_id_tried")).fill_null(True),
            (pl.col("done_at") > pl.col("end_ns")).fill_null(True),
        )
    )
    blocked_range, tried_range = (
        (pl.col(gpa), pl.col(gpa) + entry_bytes(pl.col(level)))
        for gpa, level in (("gpa", "level"), ("gpa_tried", "level_tried"))
    )
    overlaps = (
        (blocked_range[0] < tried_range[1]) & (tried_range[0] < blocked_range[1])
    ).fill_null(True)
    on_range = overlaps & pl.col("leaf").is_in([_SEPT_RD, *REMOVALS])
    by_same_thread = ~is_read & (pl.col("tid") == pl.col("tid_tried")).fill_null(True)
    return pairs.filter(on_range | by_same_thread).select("round").unique()


def _after_tdcall(rounds: pl.DataFrame, calls: pl.DataFrame, entries: pl.DataFrame) -> pl.DataFrame:
    """Return rounds whose BLOCK was called by a vCPU's thread after its guest exited by TDCALL."""
    of_calls = calls.filter(pl.col("leaf") == VP_ENTER).select(
        "source", "tid", at="end_ns", reason="status"
    )
    exits = pl.concat(
        [of_calls, entries.select("source", "tid", at="end_ns", reason=_as_status("exit_reason"))]
    ).drop_nulls()
    last = rounds.sort("start_ns").join_asof(
        exits.sort("at"),
        left_on="start_ns",
        right_on="at",
        by=["source", "tid"],
        check_sortedness=False,
    )
    return last.filter(pl.col("reason") == _TDCALL).select("round")


def _for_userspace(rounds: pl.DataFrame, trace: Trace) -> pl.DataFrame:
    """Return rounds whose BLOCK was called while userspace served a hypercall (MapGPA)."""
    hypercalls = trace.host_events.filter(
        pl.col("reason") == _HYPERCALL, pl.col("tid").is_not_null()
    )
    if hypercalls.is_empty() or rounds.is_empty():
        return rounds.select("round").clear()
    at = pl.coalesce("start_ns", "end_ns")
    calls = trace.seamcalls.filter(pl.col("leaf") == VP_ENTER)
    entered = pl.concat(
        [frame.select("source", "tid", back=at) for frame in (calls, trace.vm_entries)]
    )
    waits = first_after(hypercalls, "ts_ns", entered.drop_nulls(), "back", ["source", "tid"])
    pairs = (
        rounds.select("round", "source", "tgid", "start_ns")
        .join_where(
            waits.select(source_of="source", tgid_of="tgid", ts_ns="ts_ns", back="back"),
            pl.col("ts_ns") <= pl.col("start_ns"),
            pl.col("back").fill_null(_LAST_NS) >= pl.col("start_ns"),
        )
        .filter(
            pl.col("source") == pl.col("source_of"),
            (pl.col("tgid") == pl.col("tgid_of")).fill_null(True),
        )
    )
    return pairs.select("round").unique()


def _as_status(reason: str) -> pl.Expr:
    return pl.col(reason).cast(pl.UInt64)


def _ended_by_faults(
    rounds: pl.DataFrame, calls: pl.DataFrame, entries: pl.DataFrame, faults: pl.DataFrame
) -> pl.DataFrame:
    """Return rounds that a vCPU's thread ended to serve one of its first faults on the range."""
    vcpus = pl.concat(
        [
            calls.filter(pl.col("leaf") == VP_ENTER).select("source", end_tid="tid"),
            entries.select("source", end_tid="tid"),
        ]
    ).unique()
    by_vcpu = rounds.join(vcpus, on=["source", "end_tid"], how="semi")
    found = [rounds.select("round").clear()]
    for (level,), part in by_vcpu.group_by("level"):
        fault_entries = faults.select(
            "source", "ts_ns", end_tid="tid", key=entry_key(int(str(level)))
        ).drop_nulls()
        inside = part.join(fault_entries, on=["source", "end_tid", "key"]).filter(
            pl.col("ts_ns").is_between("start_ns", "end_ns")
        )
        few_faults = inside.group_by("round").len().filter(pl.col("len") <= STEPPING_EPF_THRESHOLD)
        found.append(few_faults.select("round"))
    return pl.concat(found)


def _lossy(rounds: pl.DataFrame, losses: pl.DataFrame) -> pl.DataFrame:
    """Return rounds in which events of any CPU may be lost."""
    ended = rounds.drop_nulls("end_ns").with_columns(pl.col("end_ns") + 1)
    return ended.filter(may_miss_events(ended, losses, "start_ns", "end_ns")).select("round")
