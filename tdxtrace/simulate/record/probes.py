"""Events that a tracer on the host records of a run: one for each hit of a probe."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Final

from tdxtrace.simulate.engine import Run
from tdxtrace.simulate.journal import KernelEvent
from tdxtrace.simulate.module.abi import LEAF, LOADER_BIT, LOADER_LEAF
from tdxtrace.simulate.module.state import Call
from tdxtrace.simulate.record import capture_probes, symbols, tracepoints
from tdxtrace.simulate.record.capture_probes import CAPTURES, VCPU_RUN_RETURN
from tdxtrace.simulate.record.recording import TraceEvent
from tdxtrace.simulate.record.symbols import (
    CLOCK_START_NS,
    PFN_FROM_7_2,
    VCPU_RUN,
    WITH_OUTPUT,
    WRAPPERS,
)
from tdxtrace.simulate.record.tracepoints import EventSpec, Fields
from tdxtrace.simulate.tables import rows

Values = tuple[int, ...]


def td_number(call: Call) -> int:
    """Return the number of the VM of a call."""
    assert call.td is not None
    return call.td.number


class CallArguments:
    """Arguments and registers of calls, as probes fetch them.

    Args:
        level_base: Number of the 4K level in the kernel's wrappers: 0 up to Linux 7.1, then 1.
    """

    def __init__(self, level_base: int) -> None:
        self._level_base = level_base

    def of(self, call: Call, arguments: tuple[str, ...]) -> Values:
        """Return the named arguments of the wrapper that made ``call``."""
        return tuple(self._argument(call, name) for name in arguments)

    def _argument(self, call: Call, name: str) -> int:
        if name == "td":
            return symbols.td_address(td_number(call))
        if name == "vp":
            assert call.vcpu is not None
            return symbols.vp_address(td_number(call), call.vcpu.number)
        if name == "pfn":
            return call.page >> 12
        if name.startswith("page"):
            page = _page(call, name.partition("_")[2])
            as_pfn = self._level_base and call.leaf in PFN_FROM_7_2
            return page >> 12 if as_pfn else symbols.struct_page(page)
        if name == "level":
            return call.level + self._level_base
        return call.gpa if name == "gpa" else call.operand

    def registers(self, call: Call) -> tuple[int, int, int]:
        """Return RCX, RDX and R8 as the kernel loads them."""
        values = dict.fromkeys(_REGISTERS, 0)
        for register, role in _ROLES.get(call.leaf, ()):
            values[register] |= _operand(call, role)
        rcx, rdx, r8 = values.values()
        return rcx, rdx, r8


def _operand(call: Call, role: str) -> int:
    """Return the value of a register with this role in data/operands.csv."""
    if role.startswith("page"):
        return _page(call, role.partition(" ")[2])
    if role == "td":
        return symbols.control_page(td_number(call)) if call.td is not None else 0
    if role == "vcpu":
        assert call.vcpu is not None
        return symbols.control_page(td_number(call), call.vcpu.number)
    return {"gpa": call.gpa, "level": call.level}.get(role, call.operand)


def _page(call: Call, number: str) -> int:
    """Return the first page of a call (number ""), or its second, third, ... page."""
    return call.further_pages[int(number) - 2] if number else call.page


PROBES: Final = ("wrappers", "retargs", "seamcall", "stock", *CAPTURES)

# Time between a probe and the start or end of the call.
_BEFORE_NS: Final = 90
_AFTER_NS: Final = 60
_INSIDE_NS: Final = 25

_STATUS: Final = (("ret", "x64"),)
_REGISTERS: Final = ("rcx", "rdx", "r8")
_ROLES: Final = {
    leaf: tuple((row["register"].lower(), row["role"]) for row in operands)
    for leaf, operands in groupby(rows("operands"), key=itemgetter("leaf"))
}
# Wrappers whose last two arguments are pointers to which RCX and RDX are written.
_EXTENDED: Final = frozenset(WRAPPERS[leaf][0] for leaf in WITH_OUTPUT if ".MEM." in leaf)
_TYPES: Final = {"level": "s32", "hkid": "u64", "resume": "u8"}


@dataclass(frozen=True, slots=True)
class Capture:
    """Options of a recording: the probes."""

    probes: str = "wrappers"
    """wrappers: entry and return of each tdh_*; retargs: returns with arguments; seamcall:
    __seamcall and __seamcall_ret; stock: only KVM's own tracepoints; capture, capture-minimal,
    capture-seamcalls: the probes of ``tdxtrace capture`` (capture_probes)."""
    vp_enter: bool = True
    """Whether tdx_vcpu_run is probed for the status of TDH.VP.ENTER."""
    kvm: bool = True
    """Whether KVM's tracepoints are recorded."""
    arguments: bool = True
    """Whether the probes fetch arguments (td, gpa, level) or only statuses."""


def _level_base(kernel: str) -> int:
    """Return the number of the 4K level: 0 before Linux 7.2, then 1 (4487492b92a4, pg_level)."""
    major, minor = kernel.split(".")
    return 1 if (int(major), int(minor)) >= (7, 2) else 0


class ProbeRecorder:
    """Recorder of the events that a run causes with these options."""

    def __init__(self, run: Run, capture: Capture) -> None:
        self.run = run
        self.capture = capture
        self.level_base = _level_base(run.scenario.kernel)
        self._specs: dict[tuple[str, str], EventSpec] = {}
        self._arguments = CallArguments(self.level_base)
        self._is_capture = capture.probes in CAPTURES
        self._wrappers = (
            capture_probes.wrapper_probes(capture.probes, self.level_base)
            if self._is_capture
            else {}
        )
        self._seamcalls = capture_probes.seamcall_probes(capture.probes)

    def specs(self) -> list[EventSpec]:
        """Return all kinds of events that ``tdxtrace capture`` records."""
        probed = [*self._wrappers.values(), *self._seamcalls.values()]
        specs = [
            spec for call in probed for spec in (call.entry, call.return_probe) if spec is not None
        ]
        return [*specs, VCPU_RUN_RETURN, *capture_probes.kvm_events(self.capture.probes)]

    def events(self) -> list[TraceEvent]:
        """Return all events of the run, sorted by timestamp (ns of the trace's clock)."""
        recorded: list[TraceEvent] = []
        calls = self.run.journal.calls
        entries = [call for call in calls if call.leaf == "TDH.VP.ENTER"]
        others = sorted((c for c in calls if c.wrapper_call), key=lambda c: c.wrapper_call)
        for _, inside in groupby(others, key=lambda c: c.wrapper_call):
            recorded.extend(self._call(tuple(inside)))
        for call in entries:
            recorded.extend(self._entry(call))
        for call in self.run.unfinished_entries:
            recorded.extend(self._entry(call))
        for call in self.run.journal.loader_calls:
            recorded.extend(self._loader_call(call))
        for call in self.run.journal.stale_returns:
            recorded.extend(self._stale_return(call))
        if self.capture.kvm:
            traced = (event for event in self.run.journal.events if event.name != "dmesg")
            recorded.extend(map(self._kernel_event, traced))
        if self._is_capture:
            known = set(self.specs())
            recorded = [
                event
                for event in recorded
                if event.spec in known and capture_probes.passes_filter(event.spec, event.values)
            ]
        # Buffers are per CPU and merged by timestamp; at equal timestamps the lowest CPU comes
        # first, both in the kernel (__find_next_entry) and in trace-cmd.
        recorded.sort(key=lambda event: (event.ts_ns, event.cpu))
        end_ns = CLOCK_START_NS + self.run.end_ns
        return [event for event in recorded if event.ts_ns <= end_ns]

    def _call(self, calls: tuple[Call, ...]) -> Iterator[TraceEvent]:
        probes = self.capture.probes
        if probes == "stock":
            return
        if probes == "seamcall":
            for call in calls:
                yield from self._seamcall(call)
            return
        first, last = calls[0], calls[-1]
        if self._is_capture:
            yield from self._captured(calls)
            return
        if first.leaf not in WRAPPERS:
            # Called through __seamcall without a wrapper that could be probed.
            return
        function, arguments = WRAPPERS[first.leaf]
        if not self.capture.arguments:
            arguments = ()
        if probes == "wrappers":
            spec = self._spec("entry", f"{function}_enter", function, _typed(arguments))
            values = self._arguments.of(first, arguments)
            yield self._event(first, first.start_ns, spec, values, calls)
            spec = self._spec("return", f"{function}_exit", function, _STATUS)
            yield self._event(last, last.end_ns, spec, (last.status,), calls)
            return
        outputs = ("ext1", "ext2") if function in _EXTENDED and arguments else ()
        fields = (*_STATUS, *_typed(arguments), *((name, "x64") for name in outputs))
        values = (last.status, *self._arguments.of(last, arguments), last.out_rcx, last.out_rdx)
        spec = self._spec("return", f"{function}_done", function, fields)
        yield self._event(last, last.end_ns, spec, values[: len(fields)], calls)

    def _captured(self, calls: tuple[Call, ...]) -> Iterator[TraceEvent]:
        """Yield the events of a wrapper call and of its SEAMCALLs, as capture records them."""
        first, last = calls[0], calls[-1]
        # If SEAMCALLs are probed too, the calls belong to their events, not to the wrapper's.
        named = () if self._seamcalls else calls
        for call in calls:
            function = "__seamcall_ret" if call.leaf in WITH_OUTPUT else "__seamcall"
            if inner := self._seamcalls.get(function):
                assert inner.entry is not None
                values = (LEAF[call.leaf] | call.version << 16, *self._arguments.registers(call))
                start, end = call.start_ns + _INSIDE_NS, call.end_ns - _INSIDE_NS
                yield self._event(call, start, inner.entry, values, (call,))
                yield self._event(call, end, inner.return_probe, (call.status,), (call,))
        probed = self._wrappers.get(first.leaf)
        if probed is None:
            return
        request = self._arguments.of(first, probed.arguments)
        if probed.entry is None:
            yield self._event(
                last, last.end_ns, probed.return_probe, (last.status, *request), named
            )
            return
        yield self._event(first, first.start_ns, probed.entry, request, named)
        answer = (last.status, last.out_rcx, last.out_rdx)[: len(probed.return_probe.fields)]
        yield self._event(last, last.end_ns, probed.return_probe, answer, named)

    def _seamcall(self, call: Call) -> Iterator[TraceEvent]:
        with_output = call.leaf in WITH_OUTPUT
        function = "__seamcall_ret" if with_output else "__seamcall"
        fn = LEAF[call.leaf] | call.version << 16
        registers = self._arguments.registers(call) if self.capture.arguments else ()
        inputs: Fields = (("fn", "x64"), *((r, "x64") for r in _REGISTERS[: len(registers)]))
        start, end = call.start_ns + _INSIDE_NS, call.end_ns - _INSIDE_NS
        if with_output:
            spec = self._spec("entry", "sc_ret_in", function, inputs)
            yield self._event(call, start, spec, (fn, *registers), (call,))
            outputs = (call.out_rcx, call.out_rdx, 0)[: len(registers)]
            values = (call.status, fn, *outputs)
        else:
            values = (call.status, fn, *registers)
        name = "sc_ret" if with_output else "sc"
        spec = self._spec("return", name, function, (*_STATUS, *inputs))
        yield self._event(call, end, spec, values, (call,))

    def _loader_call(self, call: Call) -> Iterator[TraceEvent]:
        """Yield the events of a call of the P-SEAMLDR: those of __seamcall, without a wrapper."""
        fn = LOADER_BIT | LOADER_LEAF[call.leaf]
        values = (fn, *(0 for _ in _REGISTERS))
        if inner := self._seamcalls.get("__seamcall"):
            assert inner.entry is not None
            yield self._event(call, call.start_ns, inner.entry, values, ())
            yield self._event(call, call.end_ns, inner.return_probe, (call.status,), ())
        elif self.capture.probes == "seamcall":
            inputs = (("fn", "x64"), *((r, "x64") for r in _REGISTERS))
            inputs = inputs if self.capture.arguments else inputs[:1]
            spec = self._spec("return", "sc", "__seamcall", (*_STATUS, *inputs))
            returned = (call.status, *values)[: len(spec.fields)]
            yield self._event(call, call.end_ns, spec, returned, ())

    def _entry(self, call: Call) -> Iterator[TraceEvent]:
        """Yield the events of one TDH.VP.ENTER; if unfinished, only those of its start."""
        vcpu = call.page
        vp = symbols.vcpu_address(td_number(call), vcpu)
        probed = self.capture.vp_enter and self.capture.probes != "stock"
        if probed and not self._is_capture:
            spec = self._spec("entry", "vpenter_in", VCPU_RUN, (("vp", "x64"),))
            yield self._event(call, call.start_ns - _BEFORE_NS, spec, (vp,), (call,))
        if self.capture.kvm:
            fields = (vcpu, 0, 0, 0, 0)
            yield self._event(call, call.start_ns, tracepoints.KVM_ENTRY, fields, ())
        if not call.end_ns:
            return
        if self.capture.kvm:
            yield self._event(call, call.end_ns, *tracepoints.kvm_exit(call, vcpu), (call,))
        if probed and self._is_capture:
            fetched = (call.status, call.out_r8, vcpu)
            yield self._event(call, call.end_ns + _AFTER_NS, VCPU_RUN_RETURN, fetched, (call,))
        elif probed:
            types = (("status", "x64"), ("gpa", "x64"), ("vp", "x64"), ("fast", "u32"))
            spec = self._spec("return", "vpenter", VCPU_RUN, types)
            values = (call.status, call.out_r8, vp, 0)
            yield self._event(call, call.end_ns + _AFTER_NS, spec, values, (call,))

    def _stale_return(self, call: Call) -> Iterator[TraceEvent]:
        """Yield the events of a tdx_vcpu_run without TDH.VP.ENTER: its probes, not KVM's events."""
        own = (event for event in self._entry(call) if event.spec.group != "kvm")
        for event in own:
            event.calls = ()
            yield event

    def _kernel_event(self, event: KernelEvent) -> TraceEvent:
        spec, values = tracepoints.kvm_event(event)
        t, ts_ns = event.thread, CLOCK_START_NS + event.ts_ns
        return TraceEvent(ts_ns, event.cpu, t.tid, t.tgid, t.comm, False, spec, values)

    def _event(
        self, call: Call, at_ns: int, spec: EventSpec, values: Values, calls: tuple[Call, ...]
    ) -> TraceEvent:
        assert call.thread is not None
        t, ts_ns = call.thread, CLOCK_START_NS + at_ns
        return TraceEvent(ts_ns, call.cpu, t.tid, t.tgid, t.comm, call.in_irq, spec, values, calls)

    def _spec(self, kind: str, name: str, function: str, fields: Fields) -> EventSpec:
        spec = self._specs.get((kind, name))
        if spec is None:
            spec = self._specs[kind, name] = EventSpec("tdx", name, kind, fields, function)
        return spec


def _typed(arguments: tuple[str, ...]) -> Fields:
    return tuple((name, _TYPES.get(name, "x64")) for name in arguments)
