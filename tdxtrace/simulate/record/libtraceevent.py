"""Text of ``trace-cmd report`` and ``perf script``, which both use libtraceevent.

Transcribed from the output of trace-cmd 3.1.6 with libtraceevent 1.7.1 and of perf 6.1 for files
that they recorded; trace-cmd with and without libtraceevent's KVM plugin, which prints kvm_entry
and kvm_exit in another format with half of the fields.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from tdxtrace.simulate.module.abi import EXIT_TDCALL
from tdxtrace.simulate.record import symbols
from tdxtrace.simulate.record.recording import LostEvents, Recording, RenderedLines, TraceEvent
from tdxtrace.simulate.record.tracepoints import (
    EXIT_REASONS,
    KVM_ENTRY,
    KVM_EXIT,
    KVM_USERSPACE_EXIT,
    field_text,
)


def _numeric(event: TraceEvent) -> str:
    """Return the text of an event: addresses in hex without 0x, the function left of the arrow.

    The print format is "(%lx)" or "(%lx <- %lx)", __probe_func first.
    """
    spec = event.spec
    if spec is KVM_USERSPACE_EXIT and event.values[1] < 0:
        # libtraceevent 1.7.1 treats errno as unsigned and does not recognise errors.
        return "reason KVM_EXIT_UNKNOWN (0)"
    if spec.text is not None:
        return spec.text(event.values)
    address = symbols.function_address(spec.function)
    if spec.kind == "entry":
        return f"({address:x})" + event.fields_text()
    return f"({address:x} <- {symbols.caller_address(spec.function):x})" + event.fields_text()


# plugin_kvm.c of libtraceevent 1.7.1, _VMX, has all of these names except TDCALL.
_PLUGIN_REASONS: Final = {k: name for k, name in EXIT_REASONS.items() if k != EXIT_TDCALL}


@dataclass(frozen=True, slots=True)
class TraceCmdOptions:
    """Options of ``trace-cmd report``, and the instance the file was recorded in."""

    nanoseconds: bool = False
    """-t"""
    raw: bool = False
    """-R"""
    plugin: bool = True
    """False: -N"""
    flags: bool = False
    """Whether the flags column is printed, as by trace-cmd 3.2.1 and later."""
    instance: str = ""


def trace_cmd_report(recording: Recording, options: TraceCmdOptions) -> RenderedLines:
    """Return the lines of ``trace-cmd report``."""
    lines: RenderedLines = [(f"cpus={recording.n_cpus}", None)]
    prefix = f"{options.instance}: " if options.instance else ""
    after_loss = False
    for item in recording.items:
        if isinstance(item, LostEvents):
            lines.append((prefix + _lost(item), item))
            after_loss = True
            continue
        # trace-cmd omits the instance's name on the line after a loss.
        lines.append(((prefix if not after_loss else "") + _line(item, options), item))
        after_loss = False
    return lines


def _lost(lost: LostEvents) -> str:
    count = f"{lost.n_events} " if lost.is_counted else ""
    return f"CPU:{lost.cpu} [{count}EVENTS DROPPED]"


def _line(event: TraceEvent, options: TraceCmdOptions) -> str:
    task = f"{event.comm[:15]:>16}-{event.tid:<5}"
    flags = f"{event.flags()} " if options.flags else ""
    name = f"{event.spec.name}:"
    body = _raw(event) if options.raw else _text(event, options.plugin)
    return f"{task} [{event.cpu:03}] {flags}{_time(event.ts_ns, options)}: {name:<21} {body}"


def _time(ts_ns: int, options: TraceCmdOptions) -> str:
    if options.nanoseconds:
        return f"{ts_ns // 10**9:>5}.{ts_ns % 10**9:09}"
    us = (ts_ns + 500) // 1000
    return f"{us // 10**6:>5}.{us % 10**6:06}"


def _text(event: TraceEvent, plugin: bool) -> str:
    if plugin and event.spec is KVM_EXIT:
        reason, rip, _, info1, info2, *_ = event.values
        name = _PLUGIN_REASONS.get(reason, f"UNKNOWN ({reason})")
        return f"reason {name} rip {rip:#x} info {info1:x} {info2:x}"
    if plugin and event.spec is KVM_ENTRY:
        vcpu, rip, *_ = event.values
        return f" vcpu {vcpu} rip {rip:#x}"
    return _numeric(event)


def _raw(event: TraceEvent) -> str:
    """Fields by name, each formatted as in the event's own print format."""
    spec = event.spec
    parts = []
    if spec.kind == "entry":
        parts.append(f" __probe_ip={symbols.function_address(spec.function):x}")
    elif spec.kind == "return":
        parts.append(f" __probe_func={symbols.function_address(spec.function):x}")
        parts.append(f" __probe_ret_ip={symbols.caller_address(spec.function):x}")
    for (name, kind), value in zip(spec.fields, event.values, strict=True):
        template = _RAW_FORMATS.get(name) if spec.kind == "tracepoint" else None
        if spec.name == "kvm_page_fault" and name == "error_code":
            template = "{:#x}"
        parts.append(f" {name}={template.format(value) if template else field_text(kind, value)}")
    return "".join(parts)


_RAW_FORMATS: Final = {
    "rip": "{:#x}",
    "guest_rip": "{:#x}",
    "info1": "0x{:016x}",
    "info2": "0x{:016x}",
    "requests": "0x{:016x}",
    "fault_address": "0x{:016x}",
    "intr_info": "0x{:08x}",
    "error_code": "0x{:08x}",
}


@dataclass(frozen=True, slots=True)
class PerfOptions:
    """Options of ``perf script``."""

    nanoseconds: bool = False
    """--ns"""
    lost_events: bool = True
    """--show-lost-events; without it no loss is printed."""
    process: bool = False
    """-F comm,pid,tid,cpu,time,event,trace: process and thread."""


def perf_script(recording: Recording, options: PerfOptions) -> RenderedLines:
    """Return the lines of ``perf script``.

    The task's name has 16 columns, the event as many as the longest name; timestamps are truncated
    to microseconds.
    """
    width = max((len(_perf_name(event)) for event in recording.events()), default=0)
    lines: RenderedLines = []
    for item in recording.items:
        if isinstance(item, TraceEvent):
            head = _perf_head(item.comm, (item.tgid, item.tid), item.cpu, item.ts_ns, options)
            lines.append((f"{head}{_perf_name(item):>{width}}: {_numeric(item)}", item))
        elif options.lost_events:
            head = _perf_head(item.comm, (item.tid, item.tid), item.cpu, item.ts_ns, options)
            lines.append((f"{head}PERF_RECORD_LOST lost {item.n_events}", item))
    return lines


def _perf_name(event: TraceEvent) -> str:
    return f"{event.spec.group}:{event.spec.name}"


def _perf_head(comm: str, ids: tuple[int, int], cpu: int, ts_ns: int, options: PerfOptions) -> str:
    task = f"{ids[0]:>5}/{ids[1]:<5}" if options.process else f"{ids[1]:>5}"
    if options.nanoseconds:
        stamp = f"{ts_ns // 10**9:>5}.{ts_ns % 10**9:09}"
    else:
        stamp = f"{ts_ns // 10**9:>5}.{ts_ns % 10**9 // 1000:06}"
    return f"{comm[:15]:>16} {task} [{cpu:03}] {stamp}: "
