"""Comparison of the clocks of a trace and of a kernel log."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from tdxtrace.tables.text import one_line
from tdxtrace.tables.trace import Source

# printk stamps with local_clock() (Linux kernel/printk/printk.c, vprintk_store); so do ftrace's
# clocks local and global (kernel/trace/trace_clock.c: sched_clock) and perf's own
# (kernel/events/core.c, perf_event_clock), which "perf" of ftrace reads too.  CLOCK_MONOTONIC is
# steered by NTP and begins elsewhere: it differs by more than any call takes.
_PRINTK: Final = "printk"
_SAME: Final = ("local", "global", "perf", "perf_clock", "local_clock", "sched_clock")
# Neither ftrace nor perf names the clock in its text; the default of both is the kernel's own
# (Documentation/trace/ftrace.rst, trace_clock; perf-record(1), -k).
_DEFAULT: Final = "unnamed"


@dataclass(frozen=True, slots=True)
class Agreement:
    """Whether the times of two inputs can be compared, and why."""

    comparable: bool
    reason: str


def agreement(trace: Source, log: Source) -> Agreement:
    """Return whether the times of a trace and of a kernel log can be compared.

    Args:
        trace: An input with events.
        log: An input with kernel messages.
    """
    if log.clock != _PRINTK:
        return Agreement(
            False,
            f"the log's clock is {log.clock!r}; take it with dmesg without -T, "
            "or journalctl -k -o json",
        )
    if trace.clock in _SAME:
        return Agreement(True, f"the trace's clock {trace.clock!r} is the one that printk reads")
    if trace.clock == _DEFAULT:
        return Agreement(
            True, "the trace does not name its clock; taken for the default, which printk reads too"
        )
    return Agreement(
        False,
        f"the trace's clock is {one_line(trace.clock, 20)!r}, printk's is the local one; "
        "record with the clock local (trace-cmd -C local)",
    )


def starts_ns(sources: tuple[Source, ...]) -> list[int]:
    """Return the first timestamp of each input with events, in ns; of each log if there is none."""
    traces = [s for s in sources if not s.is_log]
    return [s.first_ns for s in traces or sources if s.first_ns is not None]
