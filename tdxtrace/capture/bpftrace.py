"""Recipes as bpftrace scripts whose output has the format of a kernel trace."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from tdxtrace.capture.probes import Fetch, Probe
from tdxtrace.capture.recipe import Recipe

# Thread, process, CPU and time as the kernel prints them with record-tgid (Linux
# kernel/trace/trace_output.c, trace_print_context), so that the output is an ftrace text; nsecs
# is CLOCK_MONOTONIC (bpf_ktime_get_ns).
_LINE_PREFIX: Final = "%16s-%d (%7d) [%03d] %llu.%09llu: "
# Pages of bpftrace's buffer per CPU; the default of 64 holds some hundred lines (bpftrace(8)).
_BUFFER_PAGES: Final = "BPFTRACE_PERF_RB_PAGES=4096"
_NS: Final = 1_000_000_000
_NOW: Final = f"comm, tid, pid, cpu, nsecs / {_NS}, nsecs % {_NS}"
# Fields of KVM's events, printed in the format of ``trace-cmd report -R``.  Fields: Linux 6.16
# arch/x86/kvm/trace.h, include/trace/events/kvm.h.
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
    "kvm_pio": (
        ("rw", "%u"),
        ("port", "0x%x"),
        ("size", "%u"),
        ("count", "%u"),
        ("val", "0x%x"),
    ),
    "kvm_vm_set_mem_attributes": (("start", "0x%llx"), ("end", "0x%llx"), ("attr", "0x%llx")),
}
# Where the name of a field begins in a tracepoint's filter (Documentation/trace/events.rst).
_FIELD: Final = re.compile(r"\b(?=[a-z_])")
_CASTS: Final = {"x64": "uint64", "s32": "int32"}


def script(recipe: Recipe, heading: list[str]) -> Iterator[str]:
    """Yield the lines of the script.

    The entry and return of a call are printed together when it returns: bpftrace prints the output
    of one CPU after that of another, and a thread may migrate between entry and return.
    """
    yield from (f"//{line[1:]}" for line in heading)
    yield "// calls that do not return are not recorded; if bpftrace reports lost events, the trace"
    yield "// has gaps that are not marked: use more pages, or another dialect"
    yield f"// run it: {_BUFFER_PAGES} bpftrace -q -o trace.txt THIS"
    yield "// then: tdxtrace analyze log trace.txt"
    maps: list[str] = []
    for function in dict.fromkeys(probe.function for probe in recipe.probes):
        sides = {p.is_return: p for p in recipe.probes if p.function == function}
        call = _Call(sides.get(False), sides[True])
        maps += call.maps
        yield from call.lines()
    for event in recipe.events:
        test = f" / {_FIELD.sub('args->', event.filter)} /" if event.filter else ""
        fields = _KVM[event.event]
        event_format = " ".join(f"{name}={form}" for name, form in fields)
        values = ", ".join(f"args->{name}" for name, _ in fields)
        yield f"tracepoint:{event.system}:{event.event}{test}"
        yield f'{{ printf("{_LINE_PREFIX}{event.event}: {event_format}\\n", {_NOW}, {values}); }}'
    # bpftrace prints all maps at the end; these hold calls in progress, not results.
    if maps:
        yield f"END {{ {' '.join(f'clear({name});' for name in maps)} }}"


@dataclass(frozen=True, slots=True)
class _Call:
    """Probes of a function: its entry stores values, its return prints them."""

    entry: Probe | None
    return_probe: Probe

    def lines(self) -> Iterator[str]:
        """Yield the lines of both probes."""
        place, saved = self._place(), self._saved_values()
        side = ("uprobe", "uretprobe") if self.return_probe.location else ("kprobe", "kretprobe")
        if saved:
            saving = " ".join(f"{self._map(name)}[tid] = {value};" for name, value in saved.items())
            yield f"{side[0]}:{place} {{ {saving} }}"
        known = f" / {self._map(next(iter(saved)))}[tid] /" if saved else ""
        yield f"{side[1]}:{place}{known}"
        deleting = "".join(f" delete({name}[tid]);" for name in self.maps)
        form, values = self._text()
        yield f'{{ printf("{form}", {", ".join(values)});{deleting} }}'

    @property
    def maps(self) -> list[str]:
        """Names of the maps that keep values per thread from entry to return."""
        return [self._map(name) for name in self._saved_values()]

    def _place(self) -> str:
        path = self.return_probe.location.rpartition(":")[0]
        return f"{path}:{self.return_probe.function}" if path else self.return_probe.function

    def _map(self, name: str) -> str:
        return f"@{self.return_probe.function}_{name}"

    def _saved_values(self) -> dict[str, str]:
        """Return map names and the values stored in them; the first value is never zero."""
        saved: dict[str, str] = {}
        if self.entry is not None:
            saved |= {"when": "nsecs", "on": "cpu"}
            saved |= {
                fetch.name: _value(fetch, f"arg{fetch.place - 1}") for fetch in self.entry.fetches
            }
        for fetch in self.return_probe.fetches:
            if fetch.kind != "result":
                saved[f"arg{fetch.place - 1}"] = f"arg{fetch.place - 1}"
        return saved

    def _text(self) -> tuple[str, list[str]]:
        """Return format string and values that the return prints."""
        function, form, values = self.return_probe.function, "", []
        if self.entry is not None:
            when, on = f"{self._map('when')}[tid]", f"{self._map('on')}[tid]"
            form += f"{_LINE_PREFIX}{self.entry.event}: ({function}+0x0){_forms(self.entry)}\\n"
            values += ["comm", "tid", "pid", on, f"{when} / {_NS}", f"{when} % {_NS}"]
            values += [f"{self._map(fetch.name)}[tid]" for fetch in self.entry.fetches]
        form += f"{_LINE_PREFIX}{self.return_probe.event}: (0x0 <- {function})"
        form += f"{_forms(self.return_probe)}\\n"
        values.append(_NOW)
        for fetch in self.return_probe.fetches:
            argument = f"{self._map(f'arg{fetch.place - 1}')}[tid]"
            values.append("retval" if fetch.kind == "result" else _value(fetch, argument))
        return form, values


def _forms(probe: Probe) -> str:
    return "".join(f" {f.name}={'%d' if f.type == 's32' else '0x%llx'}" for f in probe.fetches)


def _value(fetch: Fetch, argument: str) -> str:
    """Return the bpftrace expression of a fetch; ``argument`` is the function's argument."""
    cast = _CASTS[fetch.type]
    if fetch.kind == "memory":
        return f"*({cast} *)({argument} + {fetch.offset})"
    return f"({cast}){argument}"
