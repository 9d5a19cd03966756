"""Zero-step episodes: where the module's mitigation kept a vCPU from entering."""

from __future__ import annotations

from typing import Final

import polars as pl

from tdxtrace.analysis.progress import no_progress_run
from tdxtrace.tables.events import HOST_EVENTS, PAGE_FAULTS, SEAMCALLS, VM_ENTRIES
from tdxtrace.tables.findings import ENDS, FORMS, STRENGTHS, ZERO_STEPS
from tdxtrace.tdx import leaves, word
from tdxtrace.tdx.exit_reasons import exit_reason_number
from tdxtrace.tdx.stepping import STEPPING_EPF_THRESHOLD

# Exits that a vCPU makes at an unchanged RIP: what interrupts it, and the fault
# itself.  Any other exit is an instruction that was executed.  TDX module
# 1.5.01 src/td_transitions/td_exit_stepping.c: only a new RIP clears the state.
_STANDING: Final = ("EPT_VIOLATION", "EXTERNAL_INTERRUPT", "EXCEPTION_NMI", "INTERRUPT_WINDOW")
# An exit that the module emulates enters no guest, so it is shorter than the
# shortest full exit and entry that was measured: CPUID through KVM, 3,851 ns
# (TUM-DSE/CVM_eval benchmarks/vmexit/README.md, 5bc6ab0).
EMULATED_EXIT_NS: Final = 3_851
# KVM reports an answer it has no exit reason for as -1: Linux 6.16
# arch/x86/kvm/vmx/tdx.c, tdx_to_vmx_exit_reason.
_NOT_ENTERED: Final = 0xFFFF_FFFF
# Any other error of TDH.VP.ENTER gives the same -1, and goes on to userspace as
# KVM_EXIT_INTERNAL_ERROR: include/uapi/linux/kvm.h; tdx.c, tdx_handle_exit.
_INTERNAL_ERROR: Final = 17
# A private fault is passed on as a write: EPT_VIOLATION_ACC_WRITE, the same file.
_WRITE: Final = 0x2

_VP_ENTER: Final = leaves.parse_leaf("TDH.VP.ENTER")[0]
_TRACK: Final = leaves.parse_leaf("TDH.MEM.TRACK")[0]
_INSTALLS: Final = [leaves.parse_leaf(f"TDH.MEM.{n}")[0] for n in ("PAGE.AUG", "SEPT.ADD")]
_EPT_VIOLATION: Final = exit_reason_number("EPT_VIOLATION") or 0
_BUSY_SEPT: Final = word.TDX_OPERAND_BUSY | word.TDX_OPERAND_ID_SEPT
_VCPU: Final = ("source", "tid")
_STEP: Final = (*_VCPU, "tgid", "vp_id", "seq", "gpa", "leaf", "status")


def zero_steps(
    seamcalls: pl.DataFrame,
    vm_entries: pl.DataFrame,
    page_faults: pl.DataFrame,
    host_events: pl.DataFrame | None = None,
    *,
    emulated_exit_ns: int = EMULATED_EXIT_NS,
) -> pl.DataFrame:
    """Find the episodes in which zero-step mitigation kept a vCPU out of its guest.

    An episode is a run of refused entries of one vCPU between which it gave no
    sign of progress: no exit but faults and interrupts, and no fault on another
    page after one was installed.  Three forms:

    ``busy_sept`` (proof): TDH.VP.ENTER answered OPERAND_BUSY with operand SEPT,
    which it does only when the mitigation is armed.
    ``failed_vmentry`` (strong): KVM printed exit reason -1 and entered again, after
    at least STEPPING_EPF_THRESHOLD EPT violations without progress and with no
    TDH.MEM.TRACK in flight, and told userspace of no internal error; weak where the
    trace does not reach that far back, or does not show that KVM entered again.
    ``emulated_ept_violation`` (weak): after as many, an EPT violation by writing on
    the same page, not installed meanwhile, within ``emulated_exit_ns`` of entering.

    Args:
        seamcalls: The ``seamcalls`` table.
        vm_entries: The ``vm_entries`` table.
        page_faults: The ``page_faults`` table.
        host_events: The ``host_events`` table; without it, internal errors are not told apart.
        emulated_exit_ns: Longest entry-to-exit time of an exit that entered nothing.

    Returns:
        The ``zero_steps`` table, by source and time.

    Raises:
        TableError: If an argument lacks a column or has one of another type.
    """
    calls = SEAMCALLS.conform(seamcalls)
    entries = VM_ENTRIES.conform(vm_entries)
    faults = PAGE_FAULTS.conform(page_faults)
    proof = _busy_sept(calls)
    told = calls.filter(pl.col("leaf") == _VP_ENTER).select(_VCPU).unique()
    stock = entries.join(told, on=_VCPU, how="anti", nulls_equal=True)
    if host_events is not None:
        stock = _without_errors(stock, HOST_EVENTS.conform(host_events))
    steps = stock_steps(stock, calls, faults)
    others = [_failed_vmentry(steps), _emulated(steps, emulated_exit_ns)]
    found = pl.concat([ZERO_STEPS.empty(), proof, *others])
    return ZERO_STEPS.conform(found.sort("source", "start_ns", "first_seq"))


def _busy_sept(calls: pl.DataFrame) -> pl.DataFrame:
    """Episodes from the status of TDH.VP.ENTER itself."""
    vcpus = calls.filter(pl.col("status") == _BUSY_SEPT, pl.col("leaf") == _VP_ENTER)
    mine = _of(vcpus, calls.select(*_STEP, "td_id", "start_ns", "end_ns"))
    return ZERO_STEPS.conform(_episodes(told_steps(mine), "busy_sept"))


def _of(vcpus: pl.DataFrame, rows: pl.DataFrame) -> pl.DataFrame:
    """The rows of these vCPUs, in their order."""
    mine = vcpus.select(_VCPU).unique()
    return rows.join(mine, on=_VCPU, how="semi", nulls_equal=True, maintain_order="left")


def told_steps(calls: pl.DataFrame) -> pl.DataFrame:
    """Entries and installs of vCPUs whose TDH.VP.ENTER was probed, as steps of their threads."""
    entering = pl.col("leaf") == _VP_ENTER
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
        refused=(entering & (pl.col("status") == _BUSY_SEPT)).fill_null(False),
        entry=entering,
        reason=pl.when(entering & done).then(pl.col("status").cast(pl.UInt32, strict=False)),
        installs=installs,
        installed=(installs & done).fill_null(False),
    )


def stock_steps(entries: pl.DataFrame, calls: pl.DataFrame, faults: pl.DataFrame) -> pl.DataFrame:
    """Entries of vCPUs that KVM's own events show, their faults and installs, in order."""
    tracks = calls.filter(pl.col("leaf") == _TRACK)
    entered = _in_flight(entries, tracks).select(
        *_VCPU,
        "tgid",
        td_id=pl.lit(None, pl.UInt64),
        vp_id=pl.lit(None, pl.UInt64),
        seq="seq",
        when=pl.coalesce("end_ns", "start_ns"),
        gpa=pl.lit(None, pl.UInt64),
        vcpu_id="vcpu_id",
        refused=(pl.col("exit_reason") == _NOT_ENTERED).fill_null(False) & ~pl.col("tracking"),
        entry=pl.lit(True),
        reason="exit_reason",
        installs=pl.lit(False),
        installed=pl.lit(False),
        took_ns=pl.col("end_ns") - pl.col("start_ns"),
        write=((pl.col("info1") == _WRITE) & (pl.col("info2") == 0)).fill_null(False),
    )
    installing = _of(entries, calls.filter(pl.col("leaf").is_in(_INSTALLS)))
    done = (pl.col("status") < word.ERROR_BIT).fill_null(False)
    installed = _placed(installing.with_columns(when=pl.coalesce("end_ns", "start_ns")), done)
    faulted = _placed(_of(entries, faults).with_columns(when=pl.col("ts_ns")), pl.lit(False))
    return pl.concat([entered, installed, faulted], how="diagonal").sort(*_VCPU, "when", "seq")


def _placed(rows: pl.DataFrame, installed: pl.Expr) -> pl.DataFrame:
    """A page that was faulted on or installed, as a step of its thread."""
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
    )


def _without_errors(entries: pl.DataFrame, events: pl.DataFrame) -> pl.DataFrame:
    """Forget the reason of failed entries that KVM reported as internal errors."""
    when = pl.coalesce("end_ns", "start_ns").alias("when")
    errors = events.filter(pl.col("reason") == _INTERNAL_ERROR, pl.col("errno").fill_null(0) == 0)
    last = errors.select(*_VCPU, when="ts_ns").sort("when")
    order = entries.select(*_VCPU, "seq", when).drop_nulls("tid").sort("when")
    reported = last.join_asof(order, on="when", by=_VCPU, check_sortedness=False)
    wrong = reported.select("source", "seq", wrong=pl.lit(True)).unique()
    told = entries.join(wrong, on=("source", "seq"), how="left", maintain_order="left")
    kept = pl.col("wrong").is_null() | (pl.col("exit_reason") != _NOT_ENTERED)
    return told.with_columns(exit_reason=pl.when(kept).then("exit_reason")).drop("wrong")


def _in_flight(entries: pl.DataFrame, tracks: pl.DataFrame) -> pl.DataFrame:
    """Mark failed entries during which a TDH.MEM.TRACK ran: those meet the TD's epoch."""
    failed = entries.filter(pl.col("exit_reason") == _NOT_ENTERED)
    if failed.is_empty() or tracks.is_empty():
        return entries.with_columns(tracking=pl.lit(False))
    spans = tracks.select(
        "source",
        tgid_of_track="tgid",
        track_start=pl.coalesce("start_ns", "end_ns"),
        track_end=pl.coalesce("end_ns", "start_ns"),
    )
    met = failed.join_where(
        spans,
        pl.col("track_start") <= pl.col("end_ns"),
        pl.col("track_end") >= pl.coalesce("start_ns", "end_ns"),
        suffix="_of_track",
    ).filter(
        pl.col("source") == pl.col("source_of_track"),
        (pl.col("tgid") == pl.col("tgid_of_track")).fill_null(True),
    )
    busy = met.select("source", "seq", tracking=pl.lit(True)).unique()
    return entries.join(busy, on=("source", "seq"), how="left").with_columns(
        pl.col("tracking").fill_null(False)
    )


def _failed_vmentry(steps: pl.DataFrame) -> pl.DataFrame:
    """Failed entries that a sufficient run of faults led to, or may have."""
    found = _episodes(steps, "failed_vmentry")
    enough = pl.col("n_faults_before") >= STEPPING_EPF_THRESHOLD
    return ZERO_STEPS.conform(found.filter(enough | ~pl.col("whole")))


def _emulated(steps: pl.DataFrame, emulated_exit_ns: int) -> pl.DataFrame:
    """Runs of exits that look like faults but came too fast to have entered."""
    fast = pl.col("write") & (pl.col("took_ns") <= emulated_exit_ns)
    run = no_progress_run(_of(steps.filter(fast), steps), standing())
    nth = pl.col("is_fault").cum_sum().over("run")
    # An entry's own page is what is asked for right after it.
    asks, asked = (pl.col(name).shift(-1).over("run") for name in ("installs", "gpa"))
    same_page = pl.when(asks).then(asked) == pl.col("page")
    looks = (nth > STEPPING_EPF_THRESHOLD) & pl.col("is_fault") & fast & same_page
    marked = run.with_columns(refused=looks.fill_null(False)).drop("run", "is_fault", "page")
    return ZERO_STEPS.conform(_episodes(marked, "emulated_ept_violation"))


def _episodes(steps: pl.DataFrame, form: str) -> pl.DataFrame:
    """Join refused entries of a vCPU that no sign of progress lies between.

    Args:
        steps: One row per entry or install of a page, by vCPU; ``refused`` marks the
            entries that an episode is made of.
        form: Which form the refusals are.
    """
    if not steps["refused"].any():
        return ZERO_STEPS.empty().with_columns(whole=pl.lit(None, pl.Boolean))
    mine = _of(steps.filter("refused"), steps).sort(*_VCPU, "when", "seq")
    run = no_progress_run(mine, standing())
    next_entry = pl.col("reason").is_not_null().reverse().cum_max().reverse().over(_VCPU)
    rows = run.with_columns(
        n_before=pl.col("is_fault").cum_sum().over("run"),
        enters_later=(next_entry.shift(-1).over(_VCPU)).fill_null(False),
        goes_on=pl.col("entry").reverse().cum_max().reverse().shift(-1).over(_VCPU),
    )
    refused = rows.filter("refused")
    inside = _emulated_inside(rows)
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
        enters_later=pl.col("enters_later").last(),
        goes_on=pl.col("goes_on").last(),
    )
    return _finished(found.join(inside, on=("source", "run"), how="left"), form)


def _emulated_inside(rows: pl.DataFrame) -> pl.DataFrame:
    """EPT violations between the first and the last refusal of each run."""
    so_far = pl.col("refused").cum_sum().over("run")
    total = pl.col("refused").sum().over("run")
    between = (so_far > 0) & (so_far < total) & pl.col("is_fault") & ~pl.col("refused")
    return rows.group_by("source", "run").agg(n_emulated=between.sum().cast(pl.UInt32))


def _finished(found: pl.DataFrame, form: str) -> pl.DataFrame:
    ended = (
        pl.when("enters_later")
        .then(pl.lit("entered"))
        .when(pl.col("goes_on").is_null())
        .then(pl.lit("cut"))
        .otherwise(pl.lit("left"))
    )
    likely = (pl.col("n_faults_before") >= STEPPING_EPF_THRESHOLD) & pl.col("enters_later")
    strength = {
        "busy_sept": pl.lit("proof"),
        "failed_vmentry": pl.when(likely).then(pl.lit("strong")).otherwise(pl.lit("weak")),
    }.get(form, pl.lit("weak"))
    return found.with_columns(
        form=pl.lit(form, pl.Enum(FORMS)),
        strength=strength.cast(pl.Enum(STRENGTHS)),
        ended=ended.cast(pl.Enum(ENDS)),
    )


def standing() -> list[int]:
    """Exit reasons that a vCPU can make without executing anything."""
    return [number for name in _STANDING if (number := exit_reason_number(name)) is not None]
