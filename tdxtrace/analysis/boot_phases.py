"""The ``boot_phases`` table: duration of each phase of a TD's life, and its share of retries."""

from __future__ import annotations

from typing import Final

import polars as pl

from tdxtrace.analysis.accept_rates import AUG
from tdxtrace.analysis.tdvmcalls import TDCALL
from tdxtrace.analysis.threads import VP_ENTER, infer_td, td_of_events
from tdxtrace.analysis.time_shares import TEARS_DOWN, timed_attempts, vcpu_times
from tdxtrace.tables.events import HOST_EVENTS, SEAMCALLS, VM_ENTRIES
from tdxtrace.tables.findings import RETRY_CHAINS
from tdxtrace.tables.lifecycle import BOOT_PHASE_NAMES, BOOT_PHASES
from tdxtrace.tables.limits import BUSY_ANSWERS
from tdxtrace.tdx import status, word
from tdxtrace.tdx.firmware import MARK_PORTS
from tdxtrace.tdx.leaves import numbers_of
from tdxtrace.tdx.operands import n_small_pages

# The accept phase ends when no page was requested for this long.  The value is this project's
# definition.
ACCEPT_PAUSE_NS: Final = 10_000_000
_CREATE: Final = numbers_of(["TDH.MNG.CREATE"])
_MEASURES: Final = numbers_of(["TDH.MEM.PAGE.ADD", "TDH.MR.EXTEND"])
_FINALIZE: Final = numbers_of(["TDH.MR.FINALIZE"])
_NO_MARKS: Final = (
    "kvm:kvm_pio recorded no mark of the firmware: the phase is assumed to end at the first page "
    "that a vCPU requested"
)
_NO_ENTRIES: Final = (
    "no recorded entry is known to belong to a vCPU of this TD, so the guest's time is unknown: "
    "record kvm:kvm_entry and kvm:kvm_exit, and processes (record-tgid)"
)
_NO_BUILD: Final = (
    "the build of the TD was not recorded, so firmware, accepting and running cannot be "
    "distinguished: start recording before the TD is created"
)
_NO_BEGIN: Final = "TDH.MNG.CREATE was not recorded: the build may have begun before the trace"
_TD: Final = ("source", "td_id")
_LENGTH: Final = pl.col("when_end") - pl.col("when")
_PHASE: Final = pl.Enum(BOOT_PHASE_NAMES)
_BEGAN_BY: Final = {
    "build": "TDH.MNG.CREATE",
    "measure": "TDH.MEM.PAGE.ADD or TDH.MR.EXTEND",
    "finalize": "TDH.MR.FINALIZE",
    "firmware": "end of TDH.MR.FINALIZE, else the first entry",
    "accept": "last mark of the firmware, else TDH.MEM.PAGE.AUG",
    "running": "end of the phase before, or the beginning of the trace",
    "teardown": "TDH.MNG.VPFLUSHDONE, KEY.FREEID or PAGE.RECLAIM",
}


def boot_phases(
    seamcalls: pl.DataFrame,
    vm_entries: pl.DataFrame,
    host_events: pl.DataFrame,
    chains: pl.DataFrame,
    busy_answers: pl.DataFrame,
) -> pl.DataFrame:
    """Divide the life of each TD into phases, and sum its calls in each phase.

    A call belongs to the phase in which it began.  A phase without any recorded event has no row.
    Absence: without firmware marks, the firmware phase ends at the first page that a vCPU
    requested.  If neither the build nor firmware marks were recorded, the firmware and accept
    phases cannot be separated from ``running``.

    Args:
        seamcalls: The ``seamcalls`` table.
        vm_entries: The ``vm_entries`` table.
        host_events: The ``host_events`` table.
        chains: The ``retry_chains`` table, with inferred TDs.
        busy_answers: The ``busy_answers`` table for these chains.

    Returns:
        The ``boot_phases`` table, sorted by source, TD and start.

    Raises:
        TableError: If an argument lacks a column or has one of another type.
    """
    calls, requests = SEAMCALLS.conform(seamcalls), RETRY_CHAINS.conform(chains)
    attempts = timed_attempts(calls, requests, BUSY_ANSWERS.conform(busy_answers))
    attempts = infer_td(attempts, requests).drop_nulls("td_id")
    if attempts.is_empty():
        return BOOT_PHASES.empty()
    entries = VM_ENTRIES.conform(vm_entries)
    exits, inside, events = (
        td_of_events(rows, entries, requests).drop_nulls("td_id")
        for rows in (
            entries,
            vcpu_times(attempts, entries, calls),
            HOST_EVENTS.conform(host_events),
        )
    )
    marks = events.filter(
        pl.col("event") == "kvm_pio",
        pl.col("port").is_in(MARK_PORTS),
        pl.col("is_write").fill_null(False),
    )
    phases = _phases(_bounds(attempts, exits, marks))
    found = phases.join(_sums(attempts, phases, requests), on=[*_TD, "phase"], how="left")
    for name, rows, value in (
        ("guest_ns", inside.filter(~pl.col("is_refused")), _LENGTH.sum()),
        ("n_tdcalls", exits.filter(pl.col("exit_reason") == TDCALL), pl.len().cast(pl.UInt64)),
        ("n_marks", marks, pl.len().cast(pl.UInt64)),
        ("converted_bytes", _conversions(events), pl.col("n_bytes").sum()),
    ):
        found = _counted(found, rows, phases, value.alias(name))
    return BOOT_PHASES.conform(_explained(found, events).sort(*_TD, "start_ns"))


def _conversions(events: pl.DataFrame) -> pl.DataFrame:
    return events.filter(pl.col("event") == "kvm_vm_set_mem_attributes")


def _bounds(attempts: pl.DataFrame, exits: pl.DataFrame, marks: pl.DataFrame) -> pl.DataFrame:
    """Return one row per TD with the starts of its phases; null where not recorded."""
    leaf, at, end = pl.col("leaf"), pl.col("when"), pl.col("when_end")
    entered = leaf == VP_ENTER
    rows = attempts.group_by(_TD).agg(
        build=at.filter(leaf.is_in(_CREATE)).min(),
        measure=at.filter(leaf.is_in(_MEASURES)).min(),
        finalize=at.filter(leaf.is_in(_FINALIZE)).min(),
        built=end.filter(leaf.is_in(_FINALIZE)).max(),
        first=at.min(),
        last=end.max(),
        entered=at.filter(entered).min(),
        left=at.filter(entered).max(),
    )
    exit_times = exits.group_by(_TD).agg(
        first_exit=pl.coalesce("start_ns", "end_ns").min(),
        last_exit=pl.coalesce("start_ns", "end_ns").max(),
        last_end=pl.coalesce("end_ns", "start_ns").max(),
    )
    rows = rows.join(exit_times, on=_TD, how="left", nulls_equal=True)
    rows = rows.with_columns(
        entered=pl.min_horizontal("entered", "first_exit"),
        left=pl.max_horizontal("left", "last_exit"),
        last=pl.max_horizontal("last", "last_end"),
    )
    done = marks.group_by(_TD).agg(marked=pl.col("ts_ns").max())
    rows = rows.join(done, on=_TD, how="left", nulls_equal=True)
    # If the TD was built before the trace, only firmware marks show that it boots.
    ready = pl.coalesce("built", pl.when(pl.col("marked") > pl.col("entered")).then("entered"))
    rows = rows.with_columns(ready=ready, marked=pl.when(pl.col("marked") > ready).then("marked"))
    rows = rows.join(_teardown(attempts, rows), on=_TD, how="left", nulls_equal=True)
    return rows.join(_accepting(attempts, rows), on=_TD, how="left", nulls_equal=True)


def _teardown(attempts: pl.DataFrame, bounds: pl.DataFrame) -> pl.DataFrame:
    """Return the start of each TD's first teardown call after its last entry."""
    rows = attempts.filter(pl.col("leaf").is_in(TEARS_DOWN))
    rows = rows.join(bounds.select(*_TD, "left"), on=_TD, nulls_equal=True)
    after = pl.col("when") >= pl.col("left").fill_null(0)
    return rows.filter(after).group_by(_TD).agg(teardown=pl.col("when").min())


def _accepting(attempts: pl.DataFrame, bounds: pl.DataFrame) -> pl.DataFrame:
    """Return each TD's accept interval.

    It starts at the first AUG after the firmware phase and ends when the last AUG before a
    pause longer than ACCEPT_PAUSE_NS ends.
    """
    augs = attempts.filter(pl.col("leaf") == AUG)
    since = bounds.select(*_TD, since=pl.coalesce("marked", "ready"))
    augs = augs.join(since, on=_TD, nulls_equal=True)
    augs = augs.filter(pl.col("when") >= pl.col("since")).sort(*_TD, "when")
    reached = pl.col("when_end").cum_max().over(_TD)
    paused = pl.col("when") - reached.shift(1).over(_TD) > ACCEPT_PAUSE_NS
    augs = augs.with_columns(run=paused.fill_null(False).cum_sum().over(_TD))
    first = augs.filter(pl.col("run") == 0)
    return first.group_by(_TD).agg(asked=pl.col("when").min(), accepted=pl.col("when_end").max())


def _phases(bounds: pl.DataFrame) -> pl.DataFrame:
    """Return one row per TD and phase with its times; each phase lasts until the next begins."""
    is_building = pl.col("build").is_not_null() | pl.col("measure").is_not_null()
    is_built = pl.any_horizontal(pl.col("built", "entered", "asked").is_not_null())
    begins = {
        "build": pl.col("build"),
        "measure": pl.col("measure"),
        "finalize": pl.col("finalize"),
        "firmware": pl.when(pl.col("marked").is_not_null() | pl.col("asked").is_not_null()).then(
            "ready"
        ),
        # The last mark still belongs to the firmware phase.
        "accept": pl.when(pl.col("asked").is_not_null()).then(
            pl.coalesce(pl.col("marked") + 1, "asked")
        ),
        "running": pl.when(~is_building | is_built).then(
            pl.coalesce("accepted", pl.col("marked") + 1, "ready", "first")
        ),
        "teardown": pl.col("teardown"),
    }
    rows = pl.concat(
        bounds.select(
            *_TD,
            "last",
            phase=pl.lit(name, _PHASE),
            start_ns=begin,
            is_begun=pl.col("build").is_not_null(),
            is_built=pl.col("built").is_not_null(),
            is_marked=pl.col("marked").is_not_null(),
        )
        for name, begin in begins.items()
    ).drop_nulls("start_ns")
    rows = rows.sort(*_TD, "start_ns", "phase").with_columns(
        end_ns=pl.col("start_ns").shift(-1).over(_TD).fill_null(pl.col("last"))
    )
    # A TD that is torn down right after it accepted its memory has no running phase.
    is_empty = (pl.col("phase") == "running") & (pl.col("end_ns") <= pl.col("start_ns"))
    rows = rows.filter(~is_empty).drop("last")
    return rows.with_columns(took_ns=pl.col("end_ns") - pl.col("start_ns"))


def _in_phase(rows: pl.DataFrame, phases: pl.DataFrame, at: str) -> pl.DataFrame:
    """Add to each row the phase that contains its time; drop rows before the first phase."""
    begins = phases.select(*_TD, "phase", "start_ns").sort("start_ns", "phase")
    return (
        rows.sort(at)
        .join_asof(
            begins,
            left_on=at,
            right_on="start_ns",
            by=list(_TD),
            strategy="backward",
            check_sortedness=False,
        )
        .drop_nulls("phase")
    )


def _sums(attempts: pl.DataFrame, phases: pl.DataFrame, requests: pl.DataFrame) -> pl.DataFrame:
    """Count calls and sum their times by TD and phase."""
    levels = requests.select("source", "level", chain="first_seq")
    rows = _in_phase(attempts, phases, "when").join(levels, on=["source", "chain"], how="left")
    keys = [*_TD, "phase"]
    entry = pl.col("leaf") == VP_ENTER
    retried = status.is_retryable(pl.col("status")).fill_null(False)
    is_mapped = (pl.col("leaf") == AUG) & word.is_success(pl.col("status")).fill_null(False)
    sums = rows.group_by(keys).agg(
        n_calls=(~entry).sum().cast(pl.UInt64),
        n_retries=(~entry & retried).sum().cast(pl.UInt64),
        call_ns=pl.col("took").filter(~entry & ~retried).sum(),
        retry_ns=pl.col("took").filter(~entry & retried).sum(),
        n_pages=n_small_pages(pl.col("level")).filter(is_mapped).sum(),
    )
    waits = (
        rows.filter(~entry, ~pl.col("single"))
        .group_by(*keys, "chain")
        .agg(
            wait_ns=(pl.col("when_end").max() - pl.col("when").min() - pl.col("took").sum()).clip(0)
        )
        .group_by(keys)
        .agg(pl.col("wait_ns").sum())
    )
    return sums.join(waits, on=keys, how="left", nulls_equal=True)


def _counted(
    found: pl.DataFrame, rows: pl.DataFrame, phases: pl.DataFrame, value: pl.Expr
) -> pl.DataFrame:
    """Add a column that aggregates events by TD and phase; null where a phase has no events."""
    at = next(name for name in ("ts_ns", "when", "end_ns") if name in rows.columns)
    in_phase = _in_phase(rows.drop("start_ns", strict=False).drop_nulls(at), phases, at)
    counts = in_phase.group_by(*_TD, "phase").agg(value)
    return found.join(counts, on=[*_TD, "phase"], how="left", nulls_equal=True)


def _explained(found: pl.DataFrame, events: pl.DataFrame) -> pl.DataFrame:
    """Add the event that begins each phase and the reason for missing data; fill nulls with 0.

    ``n_marks`` and ``converted_bytes`` stay null for sources that recorded no such events.
    """
    numbers = ("n_calls", "n_retries", "call_ns", "retry_ns", "wait_ns", "guest_ns", "n_pages")
    recorded = (
        ("n_marks", events.filter(pl.col("event") == "kvm_pio")),
        ("converted_bytes", _conversions(events)),
    )
    for name, rows in recorded:
        is_recorded = pl.col("source").is_in(rows["source"].unique().implode())
        found = found.with_columns(pl.when(is_recorded).then(pl.col(name).fill_null(0)).alias(name))
    phase, guest = pl.col("phase"), pl.col("guest_ns").fill_null(0)
    in_guest = phase.is_in(["firmware", "accept", "running"])
    early = phase.is_in(["measure", "finalize"])
    return found.with_columns(
        pl.col(*numbers, "n_tdcalls").fill_null(0),
        began_by=phase.cast(pl.String).replace_strict(_BEGAN_BY),
        withheld=pl.when((phase == "running") & ~pl.col("is_built") & ~pl.col("is_marked"))
        .then(pl.lit(_NO_BUILD))
        .when(in_guest & (guest == 0))
        .then(pl.lit(_NO_ENTRIES))
        .when((phase == "firmware") & ~pl.col("is_marked"))
        .then(pl.lit(_NO_MARKS))
        .when(early & ~pl.col("is_begun"))
        .then(pl.lit(_NO_BEGIN)),
    )
