"""Text of the tracefs files ``trace`` and ``trace_pipe``, with options that change it.

Transcribed from Linux 6.18 kernel/trace/trace_output.c (trace_print_context,
trace_print_lat_context, trace_print_time, trace_find_mark) and trace.c (the headers).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from tdxtrace.simulate.record import symbols
from tdxtrace.simulate.record.recording import LostEvents, Recording, RenderedLines, TraceEvent
from tdxtrace.simulate.record.symbols import CLOCK_START_NS

# Marks of gaps longer than this many ns: trace_output.c, mark[].
_MARKS: Final = ((10**9, "$"), (10**8, "@"), (10**7, "*"), (10**6, "#"), (10**5, "!"), (10**4, "+"))
CLOCKS: Final = ("local", "global", "mono", "boot", "perf", "x86-tsc", "counter")
_INTEGER_CLOCKS: Final = ("x86-tsc", "counter")


@dataclass(frozen=True, slots=True)
class TracefsOptions:
    """Trace options, as set in tracefs."""

    tgid: bool = False
    irq_info: bool = True
    latency: bool = False
    verbose: bool = False
    pipe: bool = False
    clock: str = "mono"


def gap_mark(ns: int) -> str:
    """Return the mark of a gap or a duration: trace_output.c, trace_find_mark."""
    return next((mark for threshold_ns, mark in _MARKS if ns > threshold_ns), " ")


def render(recording: Recording, options: TracefsOptions) -> RenderedLines:
    """Return the lines of ``trace``, or of ``trace_pipe``."""
    lines: RenderedLines = []
    if not options.pipe:
        lines += [(line, None) for line in _head(recording, options)]
    events = recording.items
    for i, item in enumerate(events):
        if isinstance(item, LostEvents):
            # ``trace`` does not report overwritten events; only a consuming reader (trace_pipe)
            # does.
            if options.pipe:
                lines.append((_lost(item), item))
            continue
        lines.append((_line(item, i, _next_ns(events, i), options), item))
    return lines


def _next_ns(events: list[TraceEvent | LostEvents], i: int) -> int:
    return events[i + 1].ts_ns if i + 1 < len(events) else events[i].ts_ns


def _lost(lost: LostEvents) -> str:
    count = f"LOST {lost.n_events} EVENTS" if lost.is_counted else "LOST EVENTS"
    return f"CPU:{lost.cpu} [{count}]"


def _line(event: TraceEvent, index: int, next_ns: int, options: TracefsOptions) -> str:
    text = f"{event.spec.name}: {_symbolic(event)}"
    if options.latency:
        return _latency(event, index, next_ns, options) + text
    head = f"{event.comm[:15]:>16}-{event.tid:<7} "
    if options.tgid:
        head += f"({event.tgid:>7}) " if event.tgid else "(-------) "
    head += f"[{event.cpu:03}] "
    if options.irq_info:
        head += event.flags()
    return f"{head}{_time(event.ts_ns, options.clock)}: {text}"


def _symbolic(event: TraceEvent) -> str:
    """Return the text of an event: symbols for addresses, the caller left of the arrow.

    Linux kernel/trace/trace_kprobe.c, print_kprobe_event, print_kretprobe_event.
    """
    spec = event.spec
    if spec.text is not None:
        return spec.text(event.values)
    if spec.kind == "entry":
        where = symbols.entry_symbol(spec.function)
    else:
        caller = symbols.caller_symbol(spec.function)
        where = f"{caller} <- {symbols.function_symbol(spec.function)}"
    return f"({where})" + event.fields_text()


def _time(ts_ns: int, clock: str) -> str:
    if clock in _INTEGER_CLOCKS:
        # A 2.7 GHz TSC; for the clock counter any integer is valid.
        return f" {ts_ns * 27 // 10:>12}"
    us = (ts_ns + 500) // 1000
    return f"  {us // 1_000_000:>4}.{us % 1_000_000:06}"


def _latency(event: TraceEvent, index: int, next_ns: int, options: TracefsOptions) -> str:
    since_us = (event.ts_ns - CLOCK_START_NS + 500) // 1000
    gap_ns = next_ns - event.ts_ns
    if options.verbose:
        gap_us, timestamp = (gap_ns + 500) // 1000, (event.ts_ns + 500) // 1000 & 0xFFFF_FFFF
        return (
            f"{event.comm[:15]:>16} {event.tid:>7} {event.cpu:>3} 0 00000001 {index:08x} "
            f"[{timestamp:08x}] {since_us // 1000}.{since_us % 1000:03}ms "
            f"(+{gap_us // 1000}.{gap_us % 1000:03}ms): "
        )
    head = f"{event.comm[:8]:>8}-{event.tid:<7} {event.cpu:>3}{event.flags()}"
    return f"{head} {since_us:>4}us{gap_mark(gap_ns)}: "


def _head(recording: Recording, options: TracefsOptions) -> list[str]:
    kept, written = (n * recording.repeat for n in (len(recording.events()), recording.n_written))
    if options.latency:
        return _latency_head(recording, kept, written, options.verbose)
    lines = ["# tracer: nop", "#"]
    lines += [f"# entries-in-buffer/entries-written: {kept}/{written}   #P:{recording.n_cpus}", "#"]
    if not options.irq_info:
        return lines + list(_PLAIN_LEGEND_TGID if options.tgid else _PLAIN_LEGEND)
    # kernel/trace/trace.c, print_func_help_header_irq: indented by ten more columns with a TGID.
    indent = 40 if options.tgid else 30
    lines += ["#" + " " * (indent + max(0, 2 - i)) + line for i, line in enumerate(_LEGEND)]
    return lines + list(_TITLE_TGID if options.tgid else _TITLE)


_LEGEND: Final = (
    "_-----=> irqs-off/BH-disabled",
    "/ _----=> need-resched",
    "| / _---=> hardirq/softirq",
    "|| / _--=> preempt-depth",
    "||| / _-=> migrate-disable",
    "|||| /     delay",
)
_TITLE: Final = (
    "#           TASK-PID     CPU#  |||||  TIMESTAMP  FUNCTION",
    "#              | |         |   |||||     |         |",
)
_TITLE_TGID: Final = (
    "#           TASK-PID       TGID    CPU#  |||||  TIMESTAMP  FUNCTION",
    "#              | |           |       |   |||||     |         |",
)
_PLAIN_LEGEND: Final = (
    "#           TASK-PID     CPU#     TIMESTAMP  FUNCTION",
    "#              | |         |         |         |",
)
_PLAIN_LEGEND_TGID: Final = (
    "#           TASK-PID       TGID    CPU#     TIMESTAMP  FUNCTION",
    "#              | |           |       |         |         |",
)


def _latency_head(recording: Recording, kept: int, written: int, verbose: bool) -> list[str]:
    n_cpus = recording.n_cpus
    model = f"(M:PREEMPT(none) VP:0, KP:0, SP:0 HP:0 #P:{n_cpus})"
    lines = [
        "# tracer: nop",
        "#",
        f"# nop latency trace v1.1.5 on {recording.kernel}.0",
        "# --------------------------------------------------------------------",
        f"# latency: 0 us, #{kept}/{written}, CPU#0 | {model}",
        "#    -----------------",
        "#    | task: -0 (uid:0 nice:0 policy:0 rt_prio:0)",
        "#    -----------------",
        "#",
    ]
    return lines if verbose else lines + list(_LATENCY_LEGEND)


_LATENCY_LEGEND: Final = (
    "#                    _------=> CPU#            ",
    "#                   / _-----=> irqs-off/BH-disabled",
    "#                  | / _----=> need-resched    ",
    "#                  || / _---=> hardirq/softirq ",
    "#                  ||| / _--=> preempt-depth   ",
    "#                  |||| / _-=> migrate-disable ",
    "#                  ||||| /     delay           ",
    "#  cmd     pid     |||||| time  |   caller     ",
    "#     \\   /        ||||||  \\    |    /       ",
)
