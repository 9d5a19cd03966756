"""``trace-cmd report``, as version 3.1.6 with libtraceevent 1.7.1 prints it.

Transcribed from what these versions print of files that they recorded, with and without
libtraceevent's KVM plugin, which rewrites kvm_entry and kvm_exit and leaves out half.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from tdxtrace.simulate import names
from tdxtrace.simulate.kvm_events import KVM_ENTRY, KVM_EXIT
from tdxtrace.simulate.observe import Seen
from tdxtrace.simulate.recording import Lost, Recording, Rendered
from tdxtrace.simulate.render import words

# plugin_kvm.c of libtraceevent 1.7.1, _VMX: reasons it has a name for, of those here.
_PLUGIN_REASONS: Final = {
    0: "EXCEPTION_NMI",
    1: "EXTERNAL_INTERRUPT",
    10: "CPUID",
    12: "HLT",
    30: "IO_INSTRUCTION",
    32: "MSR_WRITE",
    48: "EPT_VIOLATION",
}


@dataclass(frozen=True, slots=True)
class Options:
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


def render(recording: Recording, options: Options) -> Rendered:
    """Return the lines of the report."""
    lines: Rendered = [(f"cpus={recording.n_cpus}", None)]
    prefix = f"{options.instance}: " if options.instance else ""
    after_loss = False
    for item in recording.items:
        if isinstance(item, Lost):
            lines.append((prefix + _lost(item), item))
            after_loss = True
            continue
        # trace-cmd forgets the instance's name on the line after a loss.
        lines.append(((prefix if not after_loss else "") + _line(item, options), item))
        after_loss = False
    return lines


def _lost(lost: Lost) -> str:
    count = f"{lost.n_events} " if lost.is_counted else ""
    return f"CPU:{lost.cpu} [{count}EVENTS DROPPED]"


def _line(seen: Seen, options: Options) -> str:
    task = f"{seen.comm[:15]:>16}-{seen.tid:<5}"
    flags = f"{words.flags(seen)} " if options.flags else ""
    name = f"{seen.spec.name}:"
    body = _raw(seen) if options.raw else _text(seen, options.plugin)
    return f"{task} [{seen.cpu:03}] {flags}{_time(seen.ts_ns, options)}: {name:<21} {body}"


def _time(ts_ns: int, options: Options) -> str:
    if options.nanoseconds:
        return f"{ts_ns // 10**9:>5}.{ts_ns % 10**9:09}"
    us = (ts_ns + 500) // 1000
    return f"{us // 10**6:>5}.{us % 10**6:06}"


def _text(seen: Seen, plugin: bool) -> str:
    if plugin and seen.spec is KVM_EXIT:
        reason, rip, _, info1, info2, *_ = seen.values
        name = _PLUGIN_REASONS.get(reason, f"UNKNOWN ({reason})")
        return f"reason {name} rip {rip:#x} info {info1:x} {info2:x}"
    if plugin and seen.spec is KVM_ENTRY:
        vcpu, rip, *_ = seen.values
        return f" vcpu {vcpu} rip {rip:#x}"
    return words.numeric(seen)


def _raw(seen: Seen) -> str:
    """Fields by name, each in the format that the event's own print format gives it."""
    spec = seen.spec
    parts = []
    if spec.kind == "entry":
        parts.append(f" __probe_ip={names.function_address(spec.function):x}")
    elif spec.kind == "return":
        parts.append(f" __probe_func={names.function_address(spec.function):x}")
        parts.append(f" __probe_ret_ip={names.caller_address(spec.function):x}")
    for (name, kind), word in zip(spec.fields, seen.values, strict=True):
        form = _RAW_FORMATS.get(name) if spec.kind == "tracepoint" else None
        if spec.name == "kvm_page_fault" and name == "error_code":
            form = "{:#x}"
        parts.append(f" {name}={form.format(word) if form else words.value(kind, word)}")
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
