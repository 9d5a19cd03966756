"""Everything that is known about the busy attempts of one source, found once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
import polars as pl

from tdxtrace.analysis import gaps
from tdxtrace.analysis.causes import broken_rules, generation
from tdxtrace.analysis.causes.activity import activity
from tdxtrace.analysis.causes.candidates import ENTRY_NS, Question, candidates
from tdxtrace.analysis.causes.conflicts import EVERY, locks_of_busy
from tdxtrace.tables.trace import Trace
from tdxtrace.tdx import word

# Answers that say that something was held, or somebody in the way.
_OTHER_BUSY: Final = (word.TDX_PREVIOUS_TLB_EPOCH_BUSY, word.TDX_SYS_BUSY)
# Calls of a CPU before its silence means something.
_TALKATIVE: Final = 100
# The global lock of the TDH.SYS leaves answers with a code of its own.
_SYS: Final = "SYS"


@dataclass(frozen=True)
class Scene:
    """One source: what its threads did, who was busy, who could have held it."""

    source: int
    asked: Question
    lossy: pl.Series
    """For each row of ``done``, whether events near it may be lost."""

    @property
    def done(self) -> pl.DataFrame:
        """What the threads did (:func:`~.activity.activity`)."""
        return self.asked.done

    @cached_property
    def everyone(self) -> pl.DataFrame:
        """Candidate holders, under every generation that the user leaves."""
        return candidates(self.asked)

    @cached_property
    def mask(self) -> int:
        """Generations that the user and the trace leave."""
        return generation.possible(self.asked, self.everyone, self.lossy)

    @cached_property
    def fitting(self) -> pl.DataFrame:
        """Candidate holders under the generations that are left."""
        left = pl.col("mask") & pl.lit(self.mask, pl.UInt8)
        return self.everyone.with_columns(mask=left).filter(pl.col("mask") > 0)

    @cached_property
    def in_sight(self) -> pl.Series:
        """For each row of ``done``, whether what is told by leaving out all others may be told.

        Not where events may be lost, nor while a CPU is silent at an end of the trace for
        longer than ever between: its buffer may have been full, which ftrace does not tell.
        And nowhere in a trace in which attempts at the tree met nobody, because only calls
        of the host take it: calls are lost without a word, were not probed, or carry stamps
        of a clock that is apart from the others.
        """
        if generation.misses_holders(self.asked, self.fitting, self.lossy):
            return pl.repeat(False, self.done.height, eager=True)
        first, last = spoken(self.done)
        inside = self.done.select((pl.col("begins") >= first) & (pl.col("ends") <= last))
        return inside.to_series() & ~self.lossy

    @cached_property
    def broken(self) -> pl.DataFrame:
        """Rules that were broken, by row of ``done``."""
        return broken_rules.broken(self.asked, self.fitting, self.lossy)


def scenes(trace: Trace, *, mask: int = EVERY, entry_ns: int = ENTRY_NS) -> Iterator[Scene]:
    """Look at each source of a trace.

    Args:
        trace: The event tables, and the resolution of each source's clock.
        mask: Generations of the module to consider.
        entry_ns: Longest time for which TDH.VP.ENTER holds what it drops before VM entry.
    """
    for number in trace.seamcalls["source"].unique().sort():
        calls = trace.seamcalls.filter(pl.col("source") == number)
        entries = trace.vm_entries.filter(pl.col("source") == number)
        done = activity(calls, entries)
        sources = trace.provenance.sources
        step_ns = sources[number].clock_resolution_ns if number < len(sources) else 1
        slack_ns = step_ns if step_ns > 1 else 0
        asked = Question(done, _attempts(done), slack_ns, mask, entry_ns)
        yield Scene(int(number), asked, _lossy(done, trace.losses, int(number), slack_ns))


def spoken(done: pl.DataFrame) -> tuple[int, int]:
    """Find the part of a trace in which no CPU has fallen silent for good, or is yet to speak.

    A CPU that at an end of the trace is silent for longer than ever between may have had
    no room for its events: ftrace does not tell what a full buffer kept out.

    Args:
        done: What the threads did: cpu and ends (ns) of each call.

    Returns:
        From when until when (ns).
    """
    at = pl.col("ends")
    by_cpu = (
        done.lazy()
        .select("cpu", "ends")
        .sort("cpu", "ends")
        .group_by("cpu")
        .agg(first=at.min(), last=at.max(), pause=at.diff().max(), n=pl.len())
        .filter(pl.col("n") >= _TALKATIVE)
        .collect()
    )
    began, over = done.select(began=at.min(), over=at.max()).row(0)
    late = by_cpu.filter(pl.col("first") - began > pl.col("pause"))["first"]
    early = by_cpu.filter(over - pl.col("last") > pl.col("pause"))["last"]
    return max([began, *late]), min([over, *early])


def _attempts(done: pl.DataFrame) -> pl.DataFrame:
    """Busy attempts, one row per lock that the answer can mean; lock is null if none is known."""
    code = word.status_code(pl.col("status"))
    others = pl.any_horizontal(code == other for other in _OTHER_BUSY)
    busy = (
        done.lazy()
        .with_row_index("row")
        .filter((word.is_busy(pl.col("status")) | others), pl.col("end_ns").is_not_null())
        .select("row", "leaf", operand_id=word.low32(pl.col("status")), code=code)
        .collect()
    )
    named = busy.filter(pl.col("code") == word.TDX_OPERAND_BUSY)
    found = named.join(
        locks_of_busy(),
        on=["leaf", "operand_id"],
        how="left",
        maintain_order="left",
    )
    system = busy.filter(pl.col("code") == word.TDX_SYS_BUSY).with_columns(
        lock=pl.lit(_SYS), scope=pl.lit("module")
    )
    epoch = busy.filter(pl.col("code") == word.TDX_PREVIOUS_TLB_EPOCH_BUSY)
    return (
        pl.concat([found, system, epoch], how="diagonal")
        .with_columns(pl.col("mask").fill_null(EVERY).cast(pl.UInt8))
        .sort("row", "sequence")
        .select("row", "leaf", "operand_id", "lock", "scope", "mask")
    )


def _lossy(done: pl.DataFrame, losses: pl.DataFrame, source: int, slack_ns: int) -> pl.Series:
    windows = gaps.Windows(losses, source)
    if not windows.any:
        return pl.Series(np.zeros(done.height, np.bool_))
    anywhere = np.full(done.height, gaps.NO_CPU, np.int64)
    begins, ends = done["begins"].to_numpy(), done["ends"].to_numpy()
    return pl.Series(windows.overlap(anywhere, begins - slack_ns - 1, ends + slack_ns + 1))
