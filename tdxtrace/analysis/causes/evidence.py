"""Evidence on the busy attempts of one source: calls, candidate holders, losses, broken rules."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
import polars as pl

from tdxtrace.analysis import threads
from tdxtrace.analysis.arrays import Flags, Times
from tdxtrace.analysis.causes import broken_rules, generation
from tdxtrace.analysis.causes.candidates import ENTRY_NS, BusyAttempts, find_candidates
from tdxtrace.analysis.causes.conflicts import ALL_GENERATIONS, lock_type, locks_of_busy
from tdxtrace.analysis.causes.rule_evidence import RuleEvidence
from tdxtrace.analysis.threads import TD_OWNERS, VP_ENTER, LossWindows, infer_td
from tdxtrace.tables.events import SEAMCALLS
from tdxtrace.tables.formats import TRACE_DAT
from tdxtrace.tables.trace import Source, Trace, is_global_clock
from tdxtrace.tdx import word
from tdxtrace.tdx.wrappers import PAGES

_COLUMNS: Final = (
    *("source", "seq", "leaf", "tid", "tgid", "td_id", "vp_id", "gpa", "level", *PAGES),
    *("status", "start_ns", "end_ns", "cpu", "probe"),
)
# Statuses other than OPERAND_BUSY for a lock that was held, or a vCPU not yet tracked.
_OTHER_BUSY: Final = (word.TDX_PREVIOUS_TLB_EPOCH_BUSY, word.TDX_SYS_BUSY)
# Minimum number of calls of a CPU for a pause of it to be significant.
_MIN_CALLS_PER_CPU: Final = 100
_TRACE_CMD: Final = "trace-cmd report"
# The global lock of the TDH.SYS leaves has its own status code.
_SYS: Final = "SYS"


@dataclass(frozen=True)
class BusyEvidence:
    """Evidence of one source, computed on first use."""

    source: int
    busy: BusyAttempts
    losses: LossWindows
    clock: str = "unnamed"
    """Name of the clock, as in ``tables.trace.Source``."""
    marks_losses: bool = False
    """Whether the recording marks every loss of events, also at its ends."""

    @cached_property
    def lossy(self) -> pl.Series:
        """Whether events near each row of ``calls`` may be lost."""
        if not self.losses.any:
            return pl.Series(np.zeros(self.calls.height, np.bool_))
        begins, ends = self.calls["begins"].to_numpy(), self.calls["ends"].to_numpy()
        return pl.Series(self.may_miss(begins, ends))

    def may_miss(self, first: Times, last: Times) -> Flags:
        """Return whether events of any CPU may be lost in intervals from first to last (ns)."""
        slack = self.busy.slack_ns + 1
        anywhere = np.full(len(first), threads.NO_CPU, np.int64)
        return self.losses.overlap(anywhere, first - slack, last + slack)

    @property
    def calls(self) -> pl.DataFrame:
        """Calls of all threads (:func:`~.evidence.activity`)."""
        return self.busy.calls

    @cached_property
    def leaves(self) -> frozenset[int]:
        """Leaves of the recorded calls."""
        return frozenset(self.calls["leaf"].unique())

    @cached_property
    def candidates(self) -> pl.DataFrame:
        """Candidate holders, in every generation that the user allows."""
        return find_candidates(self.busy)

    @cached_property
    def mask(self) -> int:
        """Generations that the user and the trace allow."""
        return generation.possible_generations(self.busy, self.candidates, self.lossy)

    @cached_property
    def possible_holders(self) -> pl.DataFrame:
        """Candidate holders in the generations of ``mask``."""
        left = pl.col("mask") & pl.lit(self.mask, pl.UInt8)
        return self.candidates.with_columns(mask=left).filter(pl.col("mask") > 0)

    @cached_property
    def misses_holders(self) -> bool:
        """Whether too many busy attempts on the tree have no host call that can have held it."""
        return generation.misses_holders(self.busy, self.possible_holders, self.lossy)

    @cached_property
    def observed_interval(self) -> tuple[int, int]:
        """First and last ns of the interval in which every CPU certainly recorded."""
        if self.marks_losses:
            return self.calls.select(pl.col("begins").min(), pl.col("ends").max()).row(0)
        return observed_interval(self.calls)

    @cached_property
    def fully_observed(self) -> pl.Series:
        """Whether the absence of a candidate is evidence, for each row of ``calls``.

        False where events may be lost, and where a CPU is silent at an end of the trace for longer
        than its longest pause: its buffer may have been full, which the tracefs file ``trace`` does
        not report.  False everywhere if attempts on the tree have no candidate, because only
        host calls take the tree: calls are missing without a loss record, were not probed, or have
        timestamps of an unsynchronised clock.
        """
        if self.misses_holders:
            return pl.repeat(False, self.calls.height, eager=True)
        first, last = self.observed_interval
        inside = self.calls.select((pl.col("begins") >= first) & (pl.col("ends") <= last))
        return inside.to_series() & ~self.lossy

    @cached_property
    def broken(self) -> pl.DataFrame:
        """Calls that broke a rule, as rows of ``calls`` (columns of ``BROKEN_CALLS``)."""
        return broken_rules.find_broken_rules(
            RuleEvidence(
                calls=self.calls,
                attempts=self.busy.attempts,
                possible_holders=self.possible_holders,
                mask=self.mask,
                slack_ns=self.busy.slack_ns,
                entry_ns=self.busy.entry_ns,
                may_miss=self.may_miss,
                clock_is_global=self.clock_is_global,
            )
        )

    @property
    def clock_is_global(self) -> bool:
        """Whether all CPUs are known to share the clock."""
        return is_global_clock(self.clock)

    @property
    def times_absence(self) -> pl.Series:
        """Whether timestamps can prove that no other call overlapped, for each row of ``calls``.

        False for a call of at most two clock steps if the clock may differ between CPUs.
        """
        took = self.calls["ends"] - self.calls["begins"]
        measured = self.clock_is_global or not self.busy.slack_ns
        return (took > 2 * self.busy.slack_ns) | measured


def gather_evidence(
    trace: Trace, *, mask: int = ALL_GENERATIONS, entry_ns: int = ENTRY_NS
) -> Iterator[BusyEvidence]:
    """Yield the evidence of each source of a trace.

    Args:
        trace: The event tables, and the resolution of each source's clock.
        mask: Generations of the module to consider.
        entry_ns: Longest time in ns for which TDH.VP.ENTER holds locks that it releases before VM
            entry.
    """
    for number in trace.seamcalls["source"].unique().sort():
        seamcalls = trace.seamcalls.filter(pl.col("source") == number)
        entries = trace.vm_entries.filter(pl.col("source") == number)
        calls = activity(seamcalls, entries)
        sources = trace.provenance.sources
        step_ns, clock, marks_losses = 1, "unnamed", False
        if number < len(sources):
            step_ns, clock = sources[number].clock_resolution_ns, sources[number].clock
            marks_losses = _marks_losses(sources[number])
        slack_ns = step_ns if step_ns > 1 else 0
        busy = BusyAttempts(calls, _attempts(calls), slack_ns, mask, entry_ns)
        losses = LossWindows(trace.losses, int(number))
        yield BusyEvidence(int(number), busy, losses, clock, marks_losses)


def _marks_losses(source: Source) -> bool:
    """Return whether the recording tool drained the buffers and marked every loss.

    trace-cmd reads the pages of each CPU as they fill, and the kernel marks a page before which
    events were overwritten: Linux kernel/trace/ring_buffer.c, ring_buffer_read_page,
    RB_MISSED_EVENTS.  A CPU without events at the end recorded none, for example because its vCPU
    halted.  This does not hold if the user chose ``nooverwrite``, nor for perf, whose last loss
    record may not have fitted into the buffer.
    """
    return source.tool == _TRACE_CMD or source.format == TRACE_DAT.name


def observed_interval(calls: pl.DataFrame) -> tuple[int, int]:
    """Return the interval in which every CPU certainly recorded.

    A CPU that is silent at an end of the trace for longer than its longest pause may have had a
    full buffer, which ftrace does not report.

    Args:
        calls: cpu and ends (ns) of each call.

    Returns:
        First and last ns.
    """
    cpu, ends = calls["cpu"].to_numpy(), calls["ends"].to_numpy()
    order = np.argsort(ends, kind="stable")
    order = order[np.argsort(cpu[order], kind="stable")]
    cpu, ends = cpu[order], ends[order]
    began, over = int(ends.min()), int(ends.max())
    first, last = [began], [over]
    bounds = np.flatnonzero(cpu[1:] != cpu[:-1]) + 1
    for times in np.split(ends, bounds):
        if len(times) < _MIN_CALLS_PER_CPU:
            continue
        pause = np.diff(times).max()
        first += [int(times[0])] if times[0] - began > pause else []
        last += [int(times[-1])] if over - times[-1] > pause else []
    return max(first), min(last)


def _attempts(calls: pl.DataFrame) -> pl.DataFrame:
    """Return busy attempts, one row per lock that the status can mean; lock null if unknown."""
    code = word.status_code(pl.col("status"))
    others = pl.any_horizontal(code == other for other in _OTHER_BUSY)
    answers = (
        calls.lazy()
        .with_row_index("row")
        .filter((word.is_busy(pl.col("status")) | others), pl.col("end_ns").is_not_null())
        .select("row", "leaf", operand_id=word.low32(pl.col("status")), code=code)
        .collect()
    )
    named = answers.filter(pl.col("code") == word.TDX_OPERAND_BUSY)
    found = named.join(
        locks_of_busy(),
        on=["leaf", "operand_id"],
        how="left",
        maintain_order="left",
    )
    system = answers.filter(pl.col("code") == word.TDX_SYS_BUSY).with_columns(
        lock=pl.lit(_SYS, lock_type()), scope=pl.lit("module", pl.Categorical)
    )
    epoch = answers.filter(pl.col("code") == word.TDX_PREVIOUS_TLB_EPOCH_BUSY)
    return (
        pl.concat([found, system, epoch], how="diagonal")
        .with_columns(pl.col("mask").fill_null(ALL_GENERATIONS).cast(pl.UInt8))
        .sort("row", "sequence")
        .select("row", "leaf", "operand_id", "lock", "scope", "mask")
    )


def activity(seamcalls: pl.DataFrame, vm_entries: pl.DataFrame) -> pl.DataFrame:
    """Merge the SEAMCALLs and vCPU entries of one source into one table with time bounds.

    A call without a recorded entry is bounded by the thread's previous call, a call without a
    recorded return by its next call.  vCPUs whose TDH.VP.ENTER was not probed are represented
    by the ``vm_entries`` of KVM's own events.

    Args:
        seamcalls: The ``seamcalls`` rows of one source.
        vm_entries: Its ``vm_entries`` rows.

    Returns:
        One row per call or vCPU entry, in the order of ``seamcalls``, entries last: columns of
        ``seamcalls`` with td_id inferred where null, and begins and ends (Int64, ns: bounds
        where start_ns or end_ns is null), certain (Boolean: both were recorded), td_certain
        (Boolean: the call names its TD, or its thread or process has only one TD).  The status
        of an entry that KVM reports as failed is null.
    """
    calls = SEAMCALLS.with_optional(seamcalls).select(
        *_COLUMNS, returned=pl.col("status").is_not_null()
    )
    probed = calls.filter(pl.col("leaf") == VP_ENTER).select("tid").unique()
    entries = vm_entries.join(probed, on="tid", how="anti").select(
        "source",
        "seq",
        pl.lit(VP_ENTER, pl.UInt16).alias("leaf"),
        "tid",
        "tgid",
        *(pl.lit(None, calls.schema[c]).alias(c) for c in ("td_id", "vp_id", "gpa")),
        *(pl.lit(None, calls.schema[c]).alias(c) for c in ("level", *PAGES)),
        pl.col("exit_reason").cast(pl.UInt64).replace(0xFFFF_FFFF, None).alias("status"),
        "start_ns",
        "end_ns",
        "cpu",
        pl.lit(None, calls.schema["probe"]).alias("probe"),
        returned=pl.col("end_ns").is_not_null(),
    )
    merged = calls if entries.is_empty() else pl.concat([calls, entries])
    near = infer_td(merged, merged, TD_OWNERS[:2])
    named = near.with_columns(td_certain=pl.col("td_id").is_not_null())
    return _bounded(infer_td(named, merged))


def _bounded(calls: pl.DataFrame) -> pl.DataFrame:
    """Add begins, ends (ns) and certain, bounded by the neighbouring calls of the thread."""
    certain = pl.col("start_ns").is_not_null() & pl.col("end_ns").is_not_null()
    if not (calls["start_ns"].null_count() or calls["end_ns"].null_count()):
        return calls.with_columns(begins="start_ns", ends="end_ns", certain=certain)
    at, latest = pl.coalesce("start_ns", "end_ns"), pl.max_horizontal("start_ns", "end_ns")
    first, last = calls.select(first=at.min(), last=latest.max()).row(0)
    order = calls.select(pl.arg_sort_by("tid", at, "seq")).to_series()
    before = pl.coalesce("end_ns", "start_ns").shift().over("tid").fill_null(first)
    after = pl.coalesce("start_ns", "end_ns").shift(-1).over("tid").fill_null(last)
    # Few calls lack a bound: compute bounds only for those.
    open_ended = (
        calls.select("tid", "start_ns", "end_ns")[order]
        .with_columns(row=order, before=before, after=after)
        .filter(~certain)
        .select(
            "row",
            begins=pl.coalesce("start_ns", pl.min_horizontal("before", "end_ns")),
            ends=pl.coalesce("end_ns", pl.max_horizontal("after", "start_ns")),
        )
    )
    return calls.with_columns(
        begins=calls["start_ns"].clone().scatter(open_ended["row"], open_ended["begins"]),
        ends=calls["end_ns"].clone().scatter(open_ended["row"], open_ended["ends"]),
        certain=certain,
    )
