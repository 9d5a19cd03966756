"""What a tracer on the host records of a run: the events its probes make."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Final

from tdxtrace.simulate import kvm_events, names
from tdxtrace.simulate.arguments import Words, td_number
from tdxtrace.simulate.engine import Run
from tdxtrace.simulate.journal import Event
from tdxtrace.simulate.names import CLOCK_START_NS, VCPU_RUN, WRAPPERS
from tdxtrace.simulate.specs import Fields, Spec
from tdxtrace.simulate.state import Call
from tdxtrace.simulate.words import LEAF

PROBES: Final = ("wrappers", "retargs", "seamcall", "stock")

# Probes fire a little before the call begins and a little after it ends.
_BEFORE_NS: Final = 90
_AFTER_NS: Final = 60
_INSIDE_NS: Final = 25

# SEAMCALLs with outputs go through __seamcall_ret, the others through __seamcall: Linux
# arch/x86/virt/vmx/tdx/tdx.c, seamcall_ret() and seamcall().
_WITH_OUTPUT: Final = frozenset(
    [
        "TDH.MEM.PAGE.ADD",
        "TDH.MEM.SEPT.ADD",
        "TDH.MEM.PAGE.AUG",
        "TDH.MEM.RANGE.BLOCK",
        "TDH.MEM.RANGE.UNBLOCK",
        "TDH.MEM.PAGE.REMOVE",
        "TDH.MEM.PAGE.DEMOTE",
        "TDH.MR.EXTEND",
        "TDH.MNG.INIT",
        "TDH.PHYMEM.PAGE.RECLAIM",
    ]
)


@dataclass(slots=True)
class Seen:
    """One event as it lies in the tracer's buffer."""

    ts_ns: int
    cpu: int
    tid: int
    tgid: int
    comm: str
    irq: bool
    spec: Spec
    values: tuple[int, ...]
    calls: tuple[Call, ...] = ()
    """SEAMCALLs that a return event stands for, or an entry event begins."""


@dataclass(frozen=True, slots=True)
class Capture:
    """What was probed."""

    probes: str = "wrappers"
    """wrappers: entry and return of each tdh_*; retargs: returns with arguments; seamcall:
    __seamcall and __seamcall_ret; stock: KVM's own tracepoints and nothing else."""
    vp_enter: bool = True
    """Whether tdx_vcpu_run is probed for the status of TDH.VP.ENTER."""
    kvm: bool = True
    """Whether KVM's tracepoints are recorded."""
    arguments: bool = True
    """Whether the probes fetch arguments (td, gpa, level); without, only statuses."""


class Observer:
    """Turns calls of a run into events."""

    def __init__(self, run: Run, capture: Capture) -> None:
        self.run = run
        self.capture = capture
        self.level_base = 1 if run.scenario.kernel.startswith("7") else 0
        self._specs: dict[tuple[str, str], Spec] = {}
        self._words = Words(self.level_base)

    def events(self) -> list[Seen]:
        """Every event of the run in the order of the clock, stamped with the trace's time."""
        found: list[Seen] = []
        calls = self.run.journal.calls
        entries = [call for call in calls if call.leaf == "TDH.VP.ENTER"]
        others = sorted((c for c in calls if c.wrapper), key=lambda c: c.wrapper)
        for _, inside in groupby(others, key=lambda c: c.wrapper):
            found.extend(self._call(tuple(inside)))
        for call in entries:
            found.extend(self._entry(call))
        for call in self.run.inside:
            found.extend(self._entry(call))
        if self.capture.kvm:
            found.extend(self._event(event) for event in self.run.journal.events if _traced(event))
        # Buffers are per CPU and merged by stamp; of equal stamps the lowest CPU's goes
        # first, in the kernel (__find_next_entry) as in trace-cmd.
        found.sort(key=lambda seen: (seen.ts_ns, seen.cpu))
        end_ns = CLOCK_START_NS + self.run.end_ns
        return [seen for seen in found if seen.ts_ns <= end_ns]

    def _call(self, calls: tuple[Call, ...]) -> Iterator[Seen]:
        probes = self.capture.probes
        if probes == "stock":
            return
        if probes == "seamcall":
            for call in calls:
                yield from self._seamcall(call)
            return
        first, last = calls[0], calls[-1]
        function, arguments = WRAPPERS[first.leaf]
        if not self.capture.arguments:
            arguments = ()
        if probes == "wrappers":
            spec = self._spec("entry", f"{function}_enter", function, _typed(arguments))
            yield self._seen(first, first.start_ns, spec, self._words.of(first, arguments), calls)
            spec = self._spec("return", f"{function}_exit", function, _STATUS)
            yield self._seen(last, last.end_ns, spec, (last.status,), calls)
            return
        outputs = ("ext1", "ext2") if function in _EXTENDED and arguments else ()
        fields = (*_STATUS, *_typed(arguments), *((name, "x64") for name in outputs))
        values = (last.status, *self._words.of(last, arguments), last.out_rcx, last.out_rdx)
        spec = self._spec("return", f"{function}_done", function, fields)
        yield self._seen(last, last.end_ns, spec, values[: len(fields)], calls)

    def _seamcall(self, call: Call) -> Iterator[Seen]:
        with_output = call.leaf in _WITH_OUTPUT
        function = "__seamcall_ret" if with_output else "__seamcall"
        fn = LEAF[call.leaf] | call.version << 16
        registers = self._words.registers(call) if self.capture.arguments else ()
        inputs: Fields = (("fn", "x64"), *((r, "x64") for r in _REGISTERS[: len(registers)]))
        start, end = call.start_ns + _INSIDE_NS, call.end_ns - _INSIDE_NS
        if with_output:
            spec = self._spec("entry", "sc_ret_in", function, inputs)
            yield self._seen(call, start, spec, (fn, *registers), (call,))
            outputs = (call.out_rcx, call.out_rdx, 0)[: len(registers)]
            values = (call.status, fn, *outputs)
        else:
            values = (call.status, fn, *registers)
        name = "sc_ret" if with_output else "sc"
        spec = self._spec("return", name, function, (*_STATUS, *inputs))
        yield self._seen(call, end, spec, values, (call,))

    def _entry(self, call: Call) -> Iterator[Seen]:
        """The events of one TDH.VP.ENTER; of one still inside, only those of its start."""
        vcpu = call.page
        vp = names.vcpu_address(td_number(call), vcpu)
        probed = self.capture.vp_enter and self.capture.probes != "stock"
        if probed:
            spec = self._spec("entry", "vpenter_in", VCPU_RUN, (("vp", "x64"),))
            yield self._seen(call, call.start_ns - _BEFORE_NS, spec, (vp,), (call,))
        if self.capture.kvm:
            entered = (vcpu, 0, 0, 0, 0)
            yield self._seen(call, call.start_ns, kvm_events.KVM_ENTRY, entered, ())
        if not call.end_ns:
            return
        if self.capture.kvm:
            yield self._seen(call, call.end_ns, *kvm_events.exit_of(call, vcpu), ())
        if probed:
            fields = (("status", "x64"), ("gpa", "x64"), ("vp", "x64"), ("fast", "u32"))
            spec = self._spec("return", "vpenter", VCPU_RUN, fields)
            left = (call.status, call.out_r8, vp, 0)
            yield self._seen(call, call.end_ns + _AFTER_NS, spec, left, (call,))

    def _event(self, event: Event) -> Seen:
        spec, values = kvm_events.event_of(event)
        thread = event.thread
        stamp = CLOCK_START_NS + event.ts_ns
        return Seen(stamp, event.cpu, thread.tid, thread.tgid, thread.comm, False, spec, values)

    def _seen(
        self, call: Call, ts_ns: int, spec: Spec, values: tuple[int, ...], calls: tuple[Call, ...]
    ) -> Seen:
        thread = call.thread
        assert thread is not None
        return Seen(
            CLOCK_START_NS + ts_ns,
            call.cpu,
            thread.tid,
            thread.tgid,
            thread.comm,
            call.in_irq,
            spec,
            values,
            calls,
        )

    def _spec(self, kind: str, name: str, function: str, fields: Fields) -> Spec:
        spec = self._specs.get((kind, name))
        if spec is None:
            spec = self._specs[kind, name] = Spec("tdx", name, kind, fields, function)
        return spec


_STATUS: Final = (("ret", "x64"),)
_REGISTERS: Final = ("rcx", "rdx", "r8")
# Wrappers whose two last arguments are where RCX and RDX of the answer go.
_EXTENDED: Final = frozenset(WRAPPERS[leaf][0] for leaf in _WITH_OUTPUT if ".MEM." in leaf)
_TYPES: Final = {"level": "s32", "hkid": "u64", "resume": "u8"}


def _typed(arguments: tuple[str, ...]) -> Fields:
    return tuple((name, _TYPES.get(name, "x64")) for name in arguments)


def _traced(event: Event) -> bool:
    return event.name != "dmesg"
