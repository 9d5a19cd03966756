"""Text of the function_graph tracer with funcgraph-retval, -retval-hex, -args, -abstime, -proc.

Transcribed from Linux 6.15 kernel/trace/trace_functions_graph.c (print_graph_abs_time,
print_graph_cpu, print_graph_proc, print_graph_duration, print_graph_retval) and
trace_output.c (print_function_args); not verified on a real capture.
"""

from __future__ import annotations

from typing import Final

from tdxtrace.simulate.record.recording import LostEvents, Recording, RenderedLines, TraceEvent
from tdxtrace.simulate.record.symbols import WRAPPERS
from tdxtrace.simulate.record.tracefs import gap_mark

_HEAD: Final = (
    "# tracer: function_graph",
    "#",
    "#     TIME        CPU  TASK/PID         DURATION                  FUNCTION CALLS",
    "#      |          |     |    |           |   |                     |   |   |   |",
)
# print_graph_proc: TRACE_GRAPH_PROCINFO_LENGTH, and names truncated to seven characters.
_PROC_WIDTH: Final = 14
_COMM_CUT: Final = 7
_FUNCTIONS: Final = frozenset(name for name, _ in WRAPPERS.values())


def render(recording: Recording) -> RenderedLines:
    """Return the lines of ``trace``; only wrappers are traced."""
    lines: RenderedLines = [(line, None) for line in _HEAD]
    items = [
        item
        for item in recording.items
        if isinstance(item, LostEvents) or item.spec.function in _FUNCTIONS
    ]
    returns = _match_returns(items)
    for i, item in enumerate(items):
        if isinstance(item, LostEvents):
            lines.append((f"CPU:{item.cpu} [LOST {item.n_events} EVENTS]", item))
        elif item.spec.kind == "entry":
            returned = returns.get(i)
            lines.append(
                (_entry(item, returned, recording.n_cpus), item if returned is None else returned)
            )
        elif i not in returns.indexes:
            lines.append((_exit(item, recording.n_cpus), item))
    return lines


class _ReturnOfEntry(dict[int, TraceEvent]):
    """Return events by the index of their entry, if they are the next event on that CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.indexes: set[int] = set()


def _match_returns(items: list[TraceEvent | LostEvents]) -> _ReturnOfEntry:
    pairs = _ReturnOfEntry()
    last: dict[int, int] = {}
    for i, item in enumerate(items):
        before = last.get(item.cpu)
        entry = items[before] if before is not None else None
        if (
            isinstance(item, TraceEvent)
            and item.spec.kind == "return"
            and isinstance(entry, TraceEvent)
            and before is not None
            and entry.spec.kind == "entry"
            and entry.calls == item.calls
        ):
            pairs[before] = item
            pairs.indexes.add(i)
        last[item.cpu] = i
    return pairs


def _entry(event: TraceEvent, returned: TraceEvent | None, n_cpus: int) -> str:
    """Return one line for a call and its return if they are adjacent, else an opening line."""
    call = f"{event.spec.function}({_arguments(event)})"
    if returned is None:
        return f"{_prologue(event, n_cpus)}               |  {call} {{"
    took = _duration(returned.ts_ns - event.ts_ns)
    return f"{_prologue(event, n_cpus)}{took}|  {call}; /* ret={returned.values[0]:#x} */"


def _exit(event: TraceEvent, n_cpus: int) -> str:
    note = f"/* {event.spec.function} ret={event.values[0]:#x} */"
    return f"{_prologue(event, n_cpus)}               |  }} {note}"


def _arguments(event: TraceEvent) -> str:
    pairs = zip(event.spec.fields, event.values, strict=True)
    return ", ".join(
        f"{name}={word}" if kind == "s32" else f"{name}={word:#x}" for (name, kind), word in pairs
    )


def _prologue(event: TraceEvent, n_cpus: int) -> str:
    ns = event.ts_ns
    task = f"{event.comm[:_COMM_CUT]}-{event.tid}"
    padding = max(0, _PROC_WIDTH - len(task))
    task = " " * (padding // 2) + task + " " * (padding - padding // 2)
    width = len(str(n_cpus - 1))
    timestamp = f"{ns // 10**9:>5}.{ns % 10**9 // 1000:06}"
    return f"{timestamp} |   {event.cpu:>{width}}) {task} | "


def _duration(ns: int) -> str:
    text = f"{ns // 1000}"
    if len(text) < 7:
        text += "." + f"{ns % 1000:03}"[: 7 - len(text)]
    return f"{gap_mark(ns)} {text} us {' ' * (8 - len(text))}"
