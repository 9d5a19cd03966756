"""A recipe as a bpftrace script, whose output reads like the kernel's own trace."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from tdxtrace.capture.probes import Fetch, Probe
from tdxtrace.capture.recipe import Recipe

# Thread, CPU and time as the kernel prints them (Linux kernel/trace/trace_output.c,
# trace_print_context), so that the output is an ftrace text; nsecs is CLOCK_MONOTONIC
# (bpf_ktime_get_ns).
_WHO: Final = '"%16s-%d [%03d] %llu.%09llu: '
_WHO_ARGS: Final = "comm, tid, cpu, nsecs / 1000000000, nsecs % 1000000000"
# KVM's records field by field, in the spelling of ``trace-cmd report -R``.  Fields: Linux
# 6.16 arch/x86/kvm/trace.h, include/trace/events/kvm.h.
_KVM: Final = {
    "kvm_entry": (("vcpu_id", "%u"), ("rip", "0x%llx")),
    "kvm_exit": (
        ("exit_reason", "%u"),
        ("guest_rip", "0x%llx"),
        ("isa", "%u"),
        ("info1", "0x%llx"),
        ("info2", "0x%llx"),
        ("intr_info", "0x%x"),
        ("error_code", "0x%x"),
        ("vcpu_id", "%u"),
    ),
    "kvm_page_fault": (
        ("vcpu_id", "%u"),
        ("guest_rip", "0x%llx"),
        ("fault_address", "0x%llx"),
        ("error_code", "0x%llx"),
    ),
    "kvm_userspace_exit": (("reason", "%u"), ("errno", "%d")),
}
_CASTS: Final = {"x64": "uint64", "s32": "int32"}


def script(recipe: Recipe, heading: list[str]) -> Iterator[str]:
    """Yield the lines of the script."""
    yield from (f"//{line[1:]}" for line in heading)
    yield "// run it: bpftrace -q -o trace.txt THIS; then: tdxtrace analyze log trace.txt"
    for probe in recipe.probes:
        yield from _probe(probe)
    for event in recipe.events:
        test = f" / args->{event.filter} /" if event.filter else ""
        fields = _KVM[event.event]
        shown = " ".join(f"{name}={form}" for name, form in fields)
        values = ", ".join(f"args->{name}" for name, _ in fields)
        yield f"tracepoint:{event.system}:{event.event}{test}"
        yield f'{{ printf({_WHO}{event.event}: {shown}\\n", {_WHO_ARGS}, {values}); }}'
    # What is kept per thread is no finding: it would be printed at the end.
    kept = sorted({name for probe in recipe.probes for name in _kept(probe)})
    if kept:
        yield f"END {{ {' '.join(f'clear({name});' for name in kept)} }}"


def _probe(probe: Probe) -> Iterator[str]:
    """An entry prints its arguments; a return those that it needs, kept since the entry."""
    side = "uretprobe" if probe.is_return else "uprobe"
    if not probe.spot:
        side = "kretprobe" if probe.is_return else "kprobe"
    place = f"{probe.spot.rpartition(':')[0]}:{probe.function}" if probe.spot else probe.function
    kept = _kept(probe)
    if kept:
        keeping = " ".join(f"{name}[tid] = arg{name[-1]};" for name in kept)
        yield f"{side.replace('ret', '')}:{place} {{ {keeping} }}"
    where = f"(0x0 <- {probe.function})" if probe.is_return else f"({probe.function}+0x0)"
    forms = " ".join(f"{f.name}={'%d' if f.type == 's32' else '0x%llx'}" for f in probe.fetches)
    values = ", ".join(_value(probe, fetch) for fetch in probe.fetches)
    known = f" / {kept[0]}[tid] /" if kept else ""
    yield f"{side}:{place}{known}"
    said = f'printf({_WHO}{probe.event}: {where} {forms}\\n", {_WHO_ARGS}, {values});'
    forget = "".join(f" delete({name}[tid]);" for name in kept)
    yield f"{{ {said}{forget} }}"


def _kept(probe: Probe) -> list[str]:
    """Maps for the arguments that a return fetches."""
    places = {f.place for f in probe.fetches if probe.is_return and f.kind != "result"}
    return [f"@{probe.function}_arg{place - 1}" for place in sorted(places)]


def _value(probe: Probe, fetch: Fetch) -> str:
    cast = _CASTS[fetch.type]
    if fetch.kind == "result":
        return "retval"
    held = f"@{probe.function}_arg{fetch.place - 1}[tid]" if probe.is_return else ""
    held = held or f"arg{fetch.place - 1}"
    if fetch.kind == "behind":
        return f"*({cast} *)({held} + {fetch.offset})"
    return f"({cast}){held}"
