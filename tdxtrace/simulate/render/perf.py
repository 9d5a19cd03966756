"""``perf script``, as version 6.1 prints it.

Transcribed from what that version prints of files that it recorded: the name of the task
in 16 columns, the event in as many as its longest, stamps cut to microseconds.
"""

from __future__ import annotations

from dataclasses import dataclass

from tdxtrace.simulate.observe import Seen
from tdxtrace.simulate.recording import Recording, Rendered
from tdxtrace.simulate.render import words


@dataclass(frozen=True, slots=True)
class Options:
    """Options of ``perf script``."""

    nanoseconds: bool = False
    """--ns"""
    lost_events: bool = True
    """--show-lost-events: without it nothing tells of a loss."""
    process: bool = False
    """-F comm,pid,tid,cpu,time,event,trace: process and thread."""


def render(recording: Recording, options: Options) -> Rendered:
    """Return the lines of the script."""
    width = max((len(_name(seen)) for seen in recording.events()), default=0)
    lines: Rendered = []
    for item in recording.items:
        if isinstance(item, Seen):
            head = _head(item.comm, (item.tgid, item.tid), item.cpu, item.ts_ns, options)
            lines.append((f"{head}{_name(item):>{width}}: {words.numeric(item)}", item))
        elif options.lost_events:
            head = _head(item.comm, (item.tid, item.tid), item.cpu, item.ts_ns, options)
            lines.append((f"{head}PERF_RECORD_LOST lost {item.n_events}", item))
    return lines


def _name(seen: Seen) -> str:
    return f"{seen.spec.group}:{seen.spec.name}"


def _head(comm: str, ids: tuple[int, int], cpu: int, ts_ns: int, options: Options) -> str:
    task = f"{ids[0]:>5}/{ids[1]:<5}" if options.process else f"{ids[1]:>5}"
    if options.nanoseconds:
        stamp = f"{ts_ns // 10**9:>5}.{ts_ns % 10**9:09}"
    else:
        stamp = f"{ts_ns // 10**9:>5}.{ts_ns % 10**9 // 1000:06}"
    return f"{comm[:15]:>16} {task} [{cpu:03}] {stamp}: "
