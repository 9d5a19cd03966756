"""The function_graph tracer with funcgraph-retval, -retval-hex, -args, -abstime and -proc.

Transcribed from Linux 6.15 kernel/trace/trace_functions_graph.c (print_graph_abs_time,
print_graph_cpu, print_graph_proc, print_graph_duration, print_graph_retval) and
trace_output.c (print_function_args); no capture of our own shows it.
"""

from __future__ import annotations

from typing import Final

from tdxtrace.simulate.names import WRAPPERS
from tdxtrace.simulate.observe import Seen
from tdxtrace.simulate.recording import Lost, Recording, Rendered

_HEAD: Final = (
    "# tracer: function_graph",
    "#",
    "#     TIME        CPU  TASK/PID         DURATION                  FUNCTION CALLS",
    "#      |          |     |    |           |   |                     |   |   |   |",
)
_MARKS: Final = ((10**9, "$"), (10**8, "@"), (10**7, "*"), (10**6, "#"), (10**5, "!"), (10**4, "+"))
# print_graph_proc: TRACE_GRAPH_PROCINFO_LENGTH, and a name cut to seven characters.
_PROC_WIDTH: Final = 14
_COMM_CUT: Final = 7
_FUNCTIONS: Final = frozenset(name for name, _ in WRAPPERS.values())


def render(recording: Recording) -> Rendered:
    """Return the lines of ``trace``: only wrappers that the tracer can see."""
    lines: Rendered = [(line, None) for line in _HEAD]
    items = [
        item
        for item in recording.items
        if isinstance(item, Lost) or item.spec.function in _FUNCTIONS
    ]
    returns = _next_on_cpu(items)
    for i, item in enumerate(items):
        if isinstance(item, Lost):
            lines.append((f"CPU:{item.cpu} [LOST {item.n_events} EVENTS]", item))
        elif item.spec.kind == "entry":
            back = returns.get(i)
            lines.append((_entry(item, back, recording.n_cpus), item if back is None else back))
        elif i not in returns.values_seen:
            lines.append((_exit(item, None, recording.n_cpus), item))
    return lines


class _Pairs(dict[int, Seen]):
    """Return event of each entry that it follows at once on its CPU, by place of the entry."""

    def __init__(self) -> None:
        super().__init__()
        self.values_seen: set[int] = set()


def _next_on_cpu(items: list[Seen | Lost]) -> _Pairs:
    pairs = _Pairs()
    last: dict[int, int] = {}
    for i, item in enumerate(items):
        before = last.get(item.cpu)
        entry = items[before] if before is not None else None
        if (
            isinstance(item, Seen)
            and item.spec.kind == "return"
            and isinstance(entry, Seen)
            and before is not None
            and entry.spec.kind == "entry"
            and entry.calls == item.calls
        ):
            pairs[before] = item
            pairs.values_seen.add(i)
        last[item.cpu] = i
    return pairs


def _entry(seen: Seen, back: Seen | None, n_cpus: int) -> str:
    """A call: on one line with its duration if nothing came between, else opened here."""
    call = f"{seen.spec.function}({_arguments(seen)})"
    if back is None:
        return f"{_prologue(seen, n_cpus)}               |  {call} {{"
    took = _duration(back.ts_ns - seen.ts_ns)
    return f"{_prologue(seen, n_cpus)}{took}|  {call}; /* ret={back.values[0]:#x} */"


def _exit(seen: Seen, entry: Seen | None, n_cpus: int) -> str:
    took = _duration(seen.ts_ns - entry.ts_ns) if entry is not None else " " * 15
    note = f"/* {seen.spec.function} ret={seen.values[0]:#x} */"
    return f"{_prologue(seen, n_cpus)}{took}|  }} {note}"


def _arguments(seen: Seen) -> str:
    pairs = zip(seen.spec.fields, seen.values, strict=True)
    return ", ".join(
        f"{name}={word}" if kind == "s32" else f"{name}={word:#x}" for (name, kind), word in pairs
    )


def _prologue(seen: Seen, n_cpus: int) -> str:
    ns = seen.ts_ns
    task = f"{seen.comm[:_COMM_CUT]}-{seen.tid}"
    spare = max(0, _PROC_WIDTH - len(task))
    task = " " * (spare // 2) + task + " " * (spare - spare // 2)
    width = len(str(n_cpus - 1))
    stamp = f"{ns // 10**9:>5}.{ns % 10**9 // 1000:06}"
    return f"{stamp} |   {seen.cpu:>{width}}) {task} | "


def _duration(ns: int) -> str:
    mark = next((sign for least, sign in _MARKS if ns > least), " ")
    text = f"{ns // 1000}"
    if len(text) < 7:
        text += "." + f"{ns % 1000:03}"[: 7 - len(text)]
    return f"{mark} {text} us {' ' * (8 - len(text))}"
