"""The ``zero_steps`` table: episodes in which zero-step mitigation kept a vCPU from entering."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Final

import polars as pl

from tdxtrace.analysis.threads import VP_ENTER, may_miss_events, unprobed_entries
from tdxtrace.tables.events import HOST_EVENTS, LOSSES, PAGE_FAULTS, SEAMCALLS, VM_ENTRIES
from tdxtrace.tables.findings import ENDS, FORMS, STRENGTHS, ZERO_STEPS
from tdxtrace.tables.trace import Trace
from tdxtrace.tdx import leaves, word
from tdxtrace.tdx.exit_reasons import STEPPING_EPF_THRESHOLD, exit_reason_number
from tdxtrace.tdx.locks import conflict_table
from tdxtrace.tdx.word import bits

# Exits that a vCPU can have at an unchanged RIP: interruptions, and the fault
# itself.  Any other exit implies an executed instruction.  TDX module
# 1.5.01 src/td_transitions/td_exit_stepping.c: only a new RIP clears the state.
_EXITS_WITHOUT_PROGRESS: Final = (
    "EPT_VIOLATION",
    "EXTERNAL_INTERRUPT",
    "EXCEPTION_NMI",
    "INTERRUPT_WINDOW",
)
# An exit that the module emulates runs no guest code, so it takes less time than the
# shortest measured full exit and entry: CPUID through KVM, 3,851 ns
# (TUM-DSE/CVM_eval benchmarks/vmexit/README.md, 5bc6ab0).
EMULATED_EXIT_NS: Final = 3_851
# KVM reports a status without an exit reason as -1: Linux 6.16
# arch/x86/kvm/vmx/tdx.c, tdx_to_vmx_exit_reason.
_NOT_ENTERED: Final = 0xFFFF_FFFF
# Any other error of TDH.VP.ENTER also gives -1, and is reported to userspace as
# KVM_EXIT_INTERNAL_ERROR: include/uapi/linux/kvm.h; tdx.c, tdx_handle_exit.
_INTERNAL_ERROR: Final = 17
# A private fault is reported as a write: EPT_VIOLATION_ACC_WRITE, in the same file.
_WRITE: Final = 0x2

_TRACK: Final = leaves.parse_leaf("TDH.MEM.TRACK")[0]
# Ordinal of the fault that arms the mitigation; an entry after it can be refused: TDX module 1.5.01
# td_exit_stepping.c, td_exit_epf_stepping_log tolerates STEPPING_EPF_THRESHOLD faults.
ARMING_FAULT: Final = STEPPING_EPF_THRESHOLD + 1
# A fault on a shared page keeps the shared bit, and the module does not count it: GPA bit 47 or 51
# by GPAW (TDX module 1.5 base specification); td_ept_violation.c counts private pages only.
SHARED_BITS: Final = (1 << 47) | (1 << 51)
_INSTALLS: Final = [leaves.parse_leaf(f"TDH.MEM.{n}")[0] for n in ("PAGE.AUG", "SEPT.ADD")]
_EPT_VIOLATION: Final = exit_reason_number("EPT_VIOLATION") or 0
_TDCALL: Final = exit_reason_number("TDCALL") or 0
_TIMED_OUT: Final = word.TDX_HOST_PRIORITY_BUSY_TIMEOUT & word.CODE_BITS
_VCPU: Final = ("source", "tid")
_PAGE_BYTES: Final = 4096
_FIRST_NS, _LAST_NS = -(1 << 62), 1 << 62
# Maximum number of steps kept between segments: two per vCPU.  An arbitrary choice.
_MAX_STEPS: Final = 1 << 17
_STEP_COLUMNS: Final = ("gpa", "refused", "reason", "installs", "installed")
_STEP: Final = (*_VCPU, "tgid", "vp_id", "seq", "gpa", "leaf", "status")


def zero_steps(
    seamcalls: pl.DataFrame,
    vm_entries: pl.DataFrame,
    page_faults: pl.DataFrame,
    host_events: pl.DataFrame | None = None,
    losses: pl.DataFrame | None = None,
    *,
    drift_ns: Mapping[int, int] | None = None,
) -> pl.DataFrame:
    """Find the episodes in which zero-step mitigation kept a vCPU out of its guest.

    An episode is a run of refused entries of one vCPU without a sign of progress in between:
    no exits except faults and interrupts, and no fault on another page after a page was
    installed.  Three forms:

    ``busy_sept`` (proof): TDH.VP.ENTER returned OPERAND_BUSY with operand SEPT,
    which it does only when the mitigation is armed.

    ``failed_vmentry``: KVM traced exit reason -1, entered again, and reported no internal error
    to userspace.  Any busy operand gives that exit, most often because of a TDH.MEM.TRACK.  Strong
    only if nothing else can have been busy and the mitigation must have been armed: one private
    page faulted ARMING_FAULT times without progress, recorded calls show that TDH.MEM.TRACK is
    probed, no call that an unarmed entry collides with was in flight, allowing for clock
    differences between CPUs, and no events may be lost at that time.
    Weak if the record begins within the run, or after ARMING_FAULT faults on different pages: a
    booting guest that touches new pages looks the same if only KVM's tracepoints are recorded, and
    collides with unrecorded TRACKs.  With fewer faults, there is no episode.

    ``emulated_ept_violation`` (weak): after as many faults, an EPT violation caused by a write to
    the same page, not installed meanwhile, within EMULATED_EXIT_NS of entering.  An entry that
    executed nothing and ended otherwise is no episode: single-stepping causes such entries (0.8 %
    of steps in TDXdown, CCS 2024) without any fault.

    Evidence: the events that each form requires.  Absence: if TRACK was not probed, or events may
    be lost, kvm_exit alone proves nothing.  Nearest innocent trace: a guest that touches new pages
    during a TRACK, whose entries fail on the epoch, perhaps by a clock that is some microseconds
    behind.

    Weak episodes are suspicions: no statistic counts them, and no verdict relies on them.

    Args:
        seamcalls: The ``seamcalls`` table.
        vm_entries: The ``vm_entries`` table.
        page_faults: The ``page_faults`` table.
        host_events: The ``host_events`` table; without it, internal errors are not recognised.
        losses: The ``losses`` table; without it, no events are assumed lost.
        drift_ns: Largest clock difference in ns between two CPUs, by source; 0 for sources not
            listed.

    Returns:
        The ``zero_steps`` table, by source and time.

    Raises:
        TableError: If an argument lacks a column or has one of another type.

    Sources:
        TDX module 1.5.01 to 1.5.25 src/td_transitions/td_exit_stepping.c and tdh_vp_enter.c; Linux
        6.16 arch/x86/kvm/vmx/tdx.c, tdx_to_vmx_exit_reason.
    """
    calls = SEAMCALLS.conform(seamcalls)
    entries = VM_ENTRIES.conform(vm_entries)
    faults = PAGE_FAULTS.conform(page_faults)
    proof = _busy_sept(calls)
    kvm_only = unprobed_entries(entries, calls)
    if host_events is not None:
        kvm_only = _drop_internal_errors(kvm_only, HOST_EVENTS.conform(host_events))
    if kvm_only.is_empty():
        return ZERO_STEPS.conform(proof.sort("source", "start_ns", "first_seq"))
    steps = steps_from_kvm_events(kvm_only, calls, faults)
    lost = None if losses is None else LOSSES.conform(losses)
    excluded = _nothing_else_was_busy(kvm_only, calls, lost, drift_ns or {})
    from_kvm_events = [_failed_vmentry(steps, excluded), _emulated(steps)]
    found = pl.concat([ZERO_STEPS.empty(), proof, *from_kvm_events])
    return ZERO_STEPS.conform(found.sort("source", "start_ns", "first_seq"))


def needed_rows(trace: Trace) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Return only the calls and vCPU entries that :func:`zero_steps` uses.

    These are all calls if some vCPU has only KVM's own events, else the calls of the vCPUs with
    refused entries.  KVM's entry events of vCPUs with recorded TDH.VP.ENTER calls are not used.
    """
    refused, entering = is_refused_entry(), pl.col("leaf") == VP_ENTER
    none = SEAMCALLS.empty().select(*_VCPU, "leaf", "status")
    seen = [
        part.filter(entering).select(*none.columns, refused=refused).unique([*_VCPU, "refused"])
        for part in trace.parts("seamcalls", none.columns)
    ]
    probed = pl.concat([none.with_columns(refused=pl.lit(False)), *seen])
    kvm_only = unprobed_entries(trace.vm_entries, probed)
    if not kvm_only.is_empty():
        return trace.seamcalls, kvm_only
    vcpus, own_steps = probed.filter("refused"), [SEAMCALLS.empty()]
    if not vcpus.is_empty():
        own_steps += [_rows_of_vcpus(vcpus, part) for part in trace.parts("seamcalls")]
    return pl.concat(own_steps, how="diagonal"), kvm_only


def _busy_sept(calls: pl.DataFrame) -> pl.DataFrame:
    """Return the episodes found by the status of TDH.VP.ENTER."""
    vcpus = calls.filter(is_refused_entry())
    own_steps = _rows_of_vcpus(vcpus, calls.select(*_STEP, "td_id", "start_ns", "end_ns"))
    return ZERO_STEPS.conform(_episodes(steps_from_seamcalls(own_steps), "busy_sept"))


@dataclass(slots=True)
class RefusalState:
    """Steps of each vCPU that are needed to interpret later steps."""

    latest: pl.DataFrame = field(
        default_factory=lambda: _new_steps(SEAMCALLS.empty(), is_new=False)
    )
    """Per vCPU: the last step of all, and the last that shows whether the page is installed."""

    def keep_latest(self, max_steps: int) -> None:
        """Keep the latest ``max_steps`` steps, to bound the memory when threads come and go."""
        if self.latest.height > max_steps:
            self.latest = self.latest.filter(
                pl.col("when").rank("ordinal", descending=True) <= max_steps
            )


def count_refusals(state: RefusalState, calls: pl.DataFrame) -> pl.DataFrame:
    """Count the refused entries of a segment, and the ``busy_sept`` episodes that begin in it.

    The sums over segments equal those of the ``zero_steps`` table of the whole capture, however
    the capture is divided.

    Args:
        state: State from earlier segments; updated in place.
        calls: Rows of the ``seamcalls`` table.  The calls of a vCPU begin after its calls in
            earlier segments.

    Returns:
        source, tid, n_refused and n_episodes of each vCPU in the segment or kept from earlier ones.
    """
    steps = pl.concat([state.latest, _new_steps(SEAMCALLS.conform(calls), is_new=True)])
    counted = steps.filter(pl.col("refused") & pl.col("is_new") | pl.col("has_episode"))
    own_steps = _rows_of_vcpus(counted, steps).sort(*_VCPU, "is_new", "when", "seq")
    rows = no_progress_run(own_steps, exits_without_progress())
    refused = pl.col("refused") & pl.col("is_new")
    rows = rows.with_columns(
        begins=refused & ~pl.col("has_episode").any().over("run"),
        has_episode=(pl.col("has_episode") | refused).any().over("run"),
        refused_now=refused,
    ).with_columns(begins=pl.col("begins") & (pl.col("begins").cum_sum().over("run") == 1))
    state.latest = _last_steps(steps, rows)
    return rows.group_by(_VCPU).agg(
        n_refused=pl.col("refused_now").sum(), n_episodes=pl.col("begins").sum()
    )


def _last_steps(steps: pl.DataFrame, rows: pl.DataFrame) -> pl.DataFrame:
    """Return the steps to keep in :class:`RefusalState`.

    Args:
        steps: All steps, in time order for each vCPU.
        rows: Steps of the vCPUs with refused entries; ``has_episode`` refers to each step's run.
    """
    shows_page = pl.col("installs") | (pl.col("reason") == _EPT_VIOLATION).fill_null(False)
    last = [part.group_by(_VCPU, maintain_order=True).tail(1) for part in (steps, rows)]
    parts = [
        # Only the very last step is certain to belong to the run that continues.
        steps.filter(shows_page).group_by(_VCPU, maintain_order=True).tail(1),
        last[0].join(last[1].select("source", "seq"), on=("source", "seq"), how="anti"),
    ]
    parts = [part.with_columns(has_episode=pl.lit(False)) for part in parts]
    latest_steps = pl.concat([*parts, last[1].select(steps.columns)])
    latest_steps = latest_steps.unique(["source", "seq"], keep="last", maintain_order=True)
    return latest_steps.with_columns(is_new=pl.lit(False)).tail(_MAX_STEPS)


def _new_steps(calls: pl.DataFrame, *, is_new: bool) -> pl.DataFrame:
    """Return the steps of vCPUs with the flags ``is_new`` and ``has_episode`` (False)."""
    relevant = calls.filter(pl.col("leaf").is_in([VP_ENTER, *_INSTALLS]))
    steps = steps_from_seamcalls(relevant).select("source", "tid", "seq", "when", *_STEP_COLUMNS)
    return steps.with_columns(is_new=pl.lit(is_new), has_episode=pl.lit(False))


def is_refused_entry() -> pl.Expr:
    """Return whether a call is a TDH.VP.ENTER refused by the mitigation: OPERAND_BUSY, SEPT.

    Bits 61 and 60 of a status are not part of its code (:func:`~tdxtrace.tdx.word.status_code`).
    """
    status = pl.col("status")
    of_sept = word.low32(status) == word.TDX_OPERAND_ID_SEPT
    return (word.is_busy(status) & of_sept & (pl.col("leaf") == VP_ENTER)).fill_null(False)


def _rows_of_vcpus(vcpus: pl.DataFrame, rows: pl.DataFrame) -> pl.DataFrame:
    """Return the rows of these vCPUs, in their order."""
    vcpu_keys = vcpus.select(_VCPU).unique()
    return rows.join(vcpu_keys, on=_VCPU, how="semi", nulls_equal=True, maintain_order="left")


def steps_from_seamcalls(calls: pl.DataFrame) -> pl.DataFrame:
    """Return entries and page installs of vCPUs with probed TDH.VP.ENTER, one row per step."""
    entering = pl.col("leaf") == VP_ENTER
    done = pl.col("status") < word.ERROR_BIT
    installs = pl.col("leaf").is_in(_INSTALLS)
    tds = calls.group_by(_VCPU).agg(td_id=pl.col("td_id").drop_nulls().first())
    steps = calls.filter(entering | installs).select(*_STEP, when=pl.coalesce("start_ns", "end_ns"))
    return steps.join(tds, on=_VCPU, how="left", nulls_equal=True).select(
        *_VCPU,
        "tgid",
        "td_id",
        "vp_id",
        "seq",
        "when",
        "gpa",
        vcpu_id=pl.lit(None, pl.UInt32),
        refused=is_refused_entry(),
        entry=entering,
        reason=pl.when(entering).then(exit_reason_of_entry()),
        installs=installs,
        installed=(installs & done).fill_null(False),
    )


def exit_reason_of_entry() -> pl.Expr:
    """Return the exit reason of a TDH.VP.ENTER that entered the guest, from its status; else null.

    The host priority timeout has no exit reason, but follows a TDCALL of the guest: TDX module
    1.5.01 td_exit.c async_tdexit_internal.
    """
    status = pl.col("status")
    timed_out = word.status_code(status) == _TIMED_OUT
    return (
        pl.when(timed_out)
        .then(pl.lit(_TDCALL, pl.UInt32))
        .when(word.is_success(status))
        .then(word.low32(status))
    )


def steps_from_kvm_events(
    entries: pl.DataFrame, calls: pl.DataFrame, faults: pl.DataFrame
) -> pl.DataFrame:
    """Return entries of vCPUs from KVM's own events, with faults and page installs, in order."""
    tracks = calls.filter(pl.col("leaf") == _TRACK)
    entered = _mark_concurrent_track(entries, tracks).select(
        *_VCPU,
        "tgid",
        td_id=pl.lit(None, pl.UInt64),
        vp_id=pl.lit(None, pl.UInt64),
        seq="seq",
        when=pl.coalesce("end_ns", "start_ns"),
        gpa=pl.lit(None, pl.UInt64),
        vcpu_id="vcpu_id",
        faulted=pl.lit(False),
        refused=(pl.col("exit_reason") == _NOT_ENTERED).fill_null(False) & ~pl.col("tracking"),
        entry=pl.lit(True),
        reason="exit_reason",
        installs=pl.lit(False),
        installed=pl.lit(False),
        took_ns=pl.col("end_ns") - pl.col("start_ns"),
        write=((pl.col("info1") == _WRITE) & (pl.col("info2") == 0)).fill_null(False),
    )
    installing = _rows_of_vcpus(entries, calls.filter(pl.col("leaf").is_in(_INSTALLS)))
    done = (pl.col("status") < word.ERROR_BIT).fill_null(False)
    installed = _page_steps(installing.with_columns(when=pl.coalesce("end_ns", "start_ns")), done)
    faulted = _page_steps(
        _rows_of_vcpus(entries, faults).with_columns(when=pl.col("ts_ns")),
        pl.lit(False),
        faulted=(bits(pl.col("gpa"), SHARED_BITS) == 0).fill_null(False),
    )
    return pl.concat([entered, installed, faulted], how="diagonal").sort(*_VCPU, "when", "seq")


def _page_steps(
    rows: pl.DataFrame, installed: pl.Expr, faulted: pl.Expr | None = None
) -> pl.DataFrame:
    """Return page faults or page installs as steps of their thread."""
    return rows.select(
        *_VCPU,
        "tgid",
        "seq",
        "when",
        "gpa",
        refused=pl.lit(False),
        entry=pl.lit(False),
        installs=pl.lit(True),
        installed=installed,
        faulted=pl.lit(False) if faulted is None else faulted,
    )


def _drop_internal_errors(entries: pl.DataFrame, events: pl.DataFrame) -> pl.DataFrame:
    """Set exit_reason to null for failed entries that KVM reported as internal errors."""
    when = pl.coalesce("end_ns", "start_ns").alias("when")
    errors = events.filter(pl.col("reason") == _INTERNAL_ERROR, pl.col("errno").fill_null(0) == 0)
    last = errors.select(*_VCPU, when="ts_ns").sort("when")
    order = entries.select(*_VCPU, "seq", when).drop_nulls("tid").sort("when")
    reported = last.join_asof(order, on="when", by=_VCPU, check_sortedness=False)
    wrong = reported.select("source", "seq", wrong=pl.lit(True)).unique()
    flagged = entries.join(wrong, on=("source", "seq"), how="left", maintain_order="left")
    is_right = pl.col("wrong").is_null() | (pl.col("exit_reason") != _NOT_ENTERED)
    return flagged.with_columns(exit_reason=pl.when(is_right).then("exit_reason")).drop("wrong")


def _mark_concurrent_track(entries: pl.DataFrame, tracks: pl.DataFrame) -> pl.DataFrame:
    """Mark failed entries during which a TDH.MEM.TRACK ran: these failed on the TD's epoch."""
    failed = entries.filter(pl.col("exit_reason") == _NOT_ENTERED)
    spans = tracks.with_columns(
        begins=pl.coalesce("start_ns", "end_ns"), ends=pl.coalesce("end_ns", "start_ns")
    )
    busy = _overlapped(failed, spans).with_columns(tracking=pl.lit(True))
    return entries.join(busy, on=("source", "seq"), how="left", maintain_order="left").with_columns(
        pl.col("tracking").fill_null(False)
    )


def _overlapped(failed: pl.DataFrame, spans: pl.DataFrame) -> pl.DataFrame:
    """Return keys (source, seq) of entries that a call of their process (begins, ends) overlaps."""
    spans = spans.select("source", tgid_of_call="tgid", begins="begins", ends="ends")
    met = failed.join_where(
        spans,
        pl.col("begins") <= pl.col("end_ns"),
        pl.col("ends") >= pl.coalesce("start_ns", "end_ns"),
        suffix="_of_call",
    ).filter(
        pl.col("source") == pl.col("source_of_call"),
        (pl.col("tgid") == pl.col("tgid_of_call")).fill_null(True),
    )
    return met.select("source", "seq").unique()


@cache
def _leaves_against_entries() -> list[int]:
    """Return the leaves that an entry conflicts with even if the mitigation is not armed."""
    unarmed = conflict_table().filter(
        pl.col("leaf") == VP_ENTER, pl.col("lock") != "SEPT_TREE", pl.col("holder_leaf") != VP_ENTER
    )
    return unarmed["holder_leaf"].drop_nulls().unique().to_list()


def _nothing_else_was_busy(
    entries: pl.DataFrame,
    calls: pl.DataFrame,
    losses: pl.DataFrame | None,
    drift_ns: Mapping[int, int],
) -> pl.DataFrame:
    """Return keys (source, seq) of failed entries that only the mitigation can have refused.

    Evidence: TDH.MEM.TRACK was recorded in the source, so it is probed; no call of the process
    that an unarmed entry collides with was in flight; and no events may be lost around the entry.
    A call without a recorded start or end is extended to the thread's neighbouring call, and every
    call is extended by ``drift_ns`` on both sides.
    """
    failed = entries.filter(pl.col("exit_reason") == _NOT_ENTERED)
    probed = calls.filter(pl.col("leaf") == _TRACK)["source"].unique()
    failed = failed.filter(
        pl.col("source").is_in(probed.implode()), pl.col("start_ns").is_not_null()
    )
    if failed.is_empty():
        return failed.select("source", "seq")
    at, end = pl.coalesce("start_ns", "end_ns"), pl.coalesce("end_ns", "start_ns")
    order = calls.select(*_VCPU, "tgid", "leaf", "start_ns", "end_ns", "seq").sort(
        *_VCPU, at, "seq"
    )
    before = end.shift().over(_VCPU).fill_null(pl.lit(_FIRST_NS))
    after = at.shift(-1).over(_VCPU).fill_null(pl.lit(_LAST_NS))
    drift = pl.col("source").replace_strict(drift_ns, default=0, return_dtype=pl.Int64)
    spans = order.with_columns(
        begins=pl.coalesce("start_ns", before) - drift, ends=pl.coalesce("end_ns", after) + drift
    ).filter(pl.col("leaf").is_in(_leaves_against_entries()))
    rest = failed.join(_overlapped(failed, spans), on=("source", "seq"), how="anti")
    if losses is not None:
        around = rest.select("source", begins=at - 1, ends=pl.col("end_ns") + 1)
        rest = rest.filter(~may_miss_events(around, losses, "begins", "ends"))
    return rest.select("source", "seq")


def _failed_vmentry(steps: pl.DataFrame, excluded: pl.DataFrame) -> pl.DataFrame:
    """Return episodes of failed entries after enough faults, or in a run of unknown length.

    Args:
        steps: Steps from KVM's events.
        excluded: Keys of the failed entries without another explanation.
    """
    certain = excluded.with_columns(sure=pl.lit(True))
    flagged = steps.join(certain, on=("source", "seq"), how="left", maintain_order="left")
    found = _episodes(flagged.with_columns(pl.col("sure").fill_null(False)), "failed_vmentry")
    enough = pl.col("n_faults_before") >= ARMING_FAULT
    return ZERO_STEPS.conform(found.filter(enough | ~pl.col("whole")))


def _emulated(steps: pl.DataFrame) -> pl.DataFrame:
    """Return episodes of EPT violations that came too soon for the guest to have been entered."""
    fast = pl.col("write") & (pl.col("took_ns") <= EMULATED_EXIT_NS)
    run = no_progress_run(_rows_of_vcpus(steps.filter(fast), steps), exits_without_progress())
    nth = pl.col("is_fault").cum_sum().over("run")
    # The faulting page of an entry is recorded in the next step.
    next_installs, next_gpa = (pl.col(name).shift(-1).over("run") for name in ("installs", "gpa"))
    same_page = pl.when(next_installs).then(next_gpa) == pl.col("page")
    is_emulated = (nth > ARMING_FAULT) & pl.col("is_fault") & fast & same_page
    flagged = run.with_columns(refused=is_emulated.fill_null(False)).drop("run", "is_fault", "page")
    return ZERO_STEPS.conform(_episodes(flagged, "emulated_ept_violation"))


def _episodes(steps: pl.DataFrame, form: str) -> pl.DataFrame:
    """Group refused entries of a vCPU without a sign of progress between them into episodes.

    Args:
        steps: One row per entry or page install, by vCPU; ``refused`` marks the entries that
            form episodes.
        form: Form of the episodes.
    """
    if not steps["refused"].any():
        return ZERO_STEPS.empty().with_columns(whole=pl.lit(None, pl.Boolean))
    own_steps = _rows_of_vcpus(steps.filter("refused"), steps).sort(*_VCPU, "when", "seq")
    run = no_progress_run(own_steps, exits_without_progress())
    next_entry = pl.col("reason").is_not_null().reverse().cum_max().reverse().over(_VCPU)
    rows = run.with_columns(
        n_before=pl.col("is_fault").cum_sum().over("run"),
        n_same_page=_faults_on_one_page(run.columns),
        enters_later=(next_entry.shift(-1).over(_VCPU)).fill_null(False),
        goes_on=pl.col("entry").reverse().cum_max().reverse().shift(-1).over(_VCPU),
    )
    refused = rows.filter("refused")
    is_sure = pl.col("sure") if "sure" in rows.columns else pl.lit(False)
    again = pl.col("enters_later")
    inside = _count_emulated(rows)
    found = refused.group_by("source", "run", maintain_order=True).agg(
        first_seq=pl.col("seq").first(),
        last_seq=pl.col("seq").last(),
        tid=pl.col("tid").first(),
        tgid=pl.col("tgid").first(),
        td_id=pl.col("td_id").drop_nulls().first(),
        vp_id=pl.col("vp_id").drop_nulls().first(),
        vcpu_id=pl.col("vcpu_id").drop_nulls().first(),
        start_ns=pl.col("when").first(),
        end_ns=pl.col("when").last(),
        n_refused=pl.len().cast(pl.UInt32),
        n_faults_before=pl.col("n_before").first().cast(pl.UInt32),
        gpa=pl.col("page").first(),
        whole=pl.col("whole").first(),
        # The record may begin within the run, so any refusal of the run may be the conclusive one.
        shown=(is_sure & again & (pl.col("n_same_page") >= ARMING_FAULT)).any(),
        enters_later=pl.col("enters_later").last(),
        goes_on=pl.col("goes_on").last(),
    )
    return _with_end_and_strength(found.join(inside, on=("source", "run"), how="left"), form)


def _faults_on_one_page(columns: list[str]) -> pl.Expr:
    """Largest number of faults on one private page in the run so far; 0 without recorded pages."""
    if "faulted" not in columns:
        return pl.lit(0, pl.UInt32)
    same = pl.col("faulted").cum_sum().over("run", pl.col("gpa") // _PAGE_BYTES)
    return pl.when("faulted").then(same).otherwise(0).cum_max().over("run").cast(pl.UInt32)


def _count_emulated(rows: pl.DataFrame) -> pl.DataFrame:
    """Count the EPT violations between the first and the last refusal of each run."""
    so_far = pl.col("refused").cum_sum().over("run")
    total = pl.col("refused").sum().over("run")
    between = (so_far > 0) & (so_far < total) & pl.col("is_fault") & ~pl.col("refused")
    return rows.group_by("source", "run").agg(n_emulated=between.sum().cast(pl.UInt32))


def _with_end_and_strength(found: pl.DataFrame, form: str) -> pl.DataFrame:
    ended = (
        pl.when("enters_later")
        .then(pl.lit("entered"))
        .when(pl.col("goes_on").is_null())
        .then(pl.lit("cut"))
        .otherwise(pl.lit("left"))
    )
    strength = {
        "busy_sept": pl.lit("proof"),
        "failed_vmentry": pl.when("shown").then(pl.lit("strong")).otherwise(pl.lit("weak")),
    }.get(form, pl.lit("weak"))
    return found.with_columns(
        form=pl.lit(form, pl.Enum(FORMS)),
        strength=strength.cast(pl.Enum(STRENGTHS)),
        ended=ended.cast(pl.Enum(ENDS)),
    )


def exits_without_progress() -> list[int]:
    """Return the exit reasons that a vCPU can have without executing anything."""
    return [
        number
        for name in _EXITS_WITHOUT_PROGRESS
        if (number := exit_reason_number(name)) is not None
    ]


def no_progress_run(steps: pl.DataFrame, exits: list[int]) -> pl.DataFrame:
    """Number the runs of steps in which a vCPU showed no sign of progress.

    A run ends at an exit that only an executed instruction causes, and where the
    vCPU faults again after the faulting page was installed: the fault is then on
    another page, so the guest has passed the first.

    Args:
        steps: One row per entry, or per fault on or install of a page, sorted by vCPU and time.
        exits: Exit reasons that a vCPU can have without executing anything.

    Returns:
        The same rows with ``run`` (unique over the table), ``is_fault`` (an EPT
        violation), ``page`` (the last faulting page) and ``whole`` (the run
        begins after the start of the vCPU's record).
    """
    moved = pl.col("reason").is_not_null() & ~pl.col("reason").is_in([*exits, _NOT_ENTERED])
    is_fault = (pl.col("reason") == _EPT_VIOLATION).fill_null(False)
    # State of the last faulting page: missing (0) or installed (1).
    page_state = pl.when(is_fault).then(0).when("installs").then(pl.col("installed").cast(pl.Int32))
    rows = steps.with_columns(
        is_fault=is_fault, _first=begins_vcpu(), _moved=moved.shift().fill_null(False)
    )
    rows = rows.with_columns(
        _page_state=_last_known(page_state, since=pl.col("_first")),
        page=_last_known(pl.when("installs").then("gpa"), since=pl.col("_first")),
    )
    page_arrived = pl.col("is_fault") & (pl.col("_page_state").shift() == 1).fill_null(False)
    rows = rows.with_columns(_ends=~pl.col("_first") & (pl.col("_moved") | page_arrived))
    # Runs ended so far; minus their number at the vCPU's first row, the ended runs of the vCPU.
    ended = pl.col("_ends").cum_sum().cast(pl.Int64)
    before = pl.when("_first").then(ended).forward_fill()
    return rows.with_columns(
        run=(pl.col("_first") | pl.col("_ends")).cum_sum(), whole=ended > before
    ).drop("_first", "_moved", "_page_state", "_ends")


def begins_vcpu() -> pl.Expr:
    """Return whether a row is the first of its vCPU, in rows sorted by vCPU."""
    changes = [pl.col(name).ne_missing(pl.col(name).shift()) for name in _VCPU]
    return pl.any_horizontal(*changes, pl.int_range(pl.len()) == 0)


def _last_known(value: pl.Expr, since: pl.Expr) -> pl.Expr:
    """Return the last non-null value since the last row with ``since``."""
    place = pl.int_range(pl.len())
    known = pl.when(value.is_not_null()).then(place).forward_fill()
    first = pl.when(since).then(place).forward_fill()
    return pl.when(known >= first).then(value.forward_fill())
