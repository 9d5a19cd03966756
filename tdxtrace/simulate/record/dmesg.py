"""The kernel log: KVM's messages about failed calls, rate-limited.

Formats: Linux 6.16 arch/x86/kvm/vmx/tdx.c, pr_tdx_error*; 6.19 TDX_BUG_ON*; policy seed-loop:
P. Bonzini, 2024-09-10.  Rate limit: lib/ratelimit.c, 10 messages in 5 seconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from tdxtrace.simulate.engine import Run
from tdxtrace.simulate.journal import KernelEvent
from tdxtrace.simulate.record.symbols import CLOCK_START_NS, WRAPPERS, caller_symbol

_INTERVAL_NS: Final = 5_000_000_000
_BURST: Final = 10
_WITH_REGISTERS: Final = (".MEM.PAGE.", ".MEM.SEPT.", ".MEM.RANGE.")
_BEFORE_6_19: Final = ("6.16", "6.18")


def render(run: Run) -> list[str]:
    """Return the lines of ``dmesg`` for a run."""
    events = sorted((e for e in run.journal.events if e.name == "dmesg"), key=lambda e: e.ts_ns)
    return [line for event in _rate_limited(events) for line in _lines(run, event)]


def _rate_limited(events: list[KernelEvent]) -> Iterator[KernelEvent]:
    """Yield at most ten messages of a kind in five seconds, then the number suppressed."""
    began: dict[object, int] = {}
    printed: dict[object, int] = {}
    suppressed: dict[object, int] = {}
    for event in events:
        kind = event.fields[0]
        if kind not in began or event.ts_ns - began[kind] >= _INTERVAL_NS:
            if suppressed.get(kind):
                yield event._replace(fields=("suppressed", kind, suppressed[kind]))
            began[kind], printed[kind], suppressed[kind] = event.ts_ns, 0, 0
        if printed[kind] >= _BURST:
            suppressed[kind] += 1
            continue
        printed[kind] += 1
        yield event


def _lines(run: Run, event: KernelEvent) -> Iterator[str]:
    us = (CLOCK_START_NS + event.ts_ns) // 1000
    timestamp = f"[{us // 10**6:>5}.{us % 10**6:06}] "
    kind, *rest = event.fields
    if kind == "failed":
        leaf, status = str(rest[0]), int(str(rest[1]))
        yield from (timestamp + line for line in _failure(run, event, leaf, status))
    elif kind == "exceeded":
        yield f"{timestamp}kvm_intel: Exceeded {rest[0]} retries for S-EPT operation"
    elif kind == "crashing":
        yield f"{timestamp}kvm_intel: Crashing due to lock contention in the TDX module"
    elif kind == "suppressed":
        function = _FUNCTIONS.get(str(rest[0]), "pr_tdx_error")
        yield f"{timestamp}{function}: {rest[1]} callbacks suppressed"
    else:
        status = int(str(rest[1]))
        yield f"{timestamp}kvm_intel: kvm [{rest[0]}]: TD vp_enter_ret {status:#x}"


_FUNCTIONS: Final = {"vp_enter_ret": "tdx_handle_exit", "exceeded": "tdx_seamcall_sept"}


def _failure(run: Run, event: KernelEvent, leaf: str, status: int) -> Iterator[str]:
    name = leaf.replace(".", "_")
    registers = ""
    if any(part in leaf for part in _WITH_REGISTERS):
        rcx, rdx = _registers(run, event, leaf)
        is_new = run.scenario.kernel not in _BEFORE_6_19
        labels = ("entry", "level_state") if is_new else ("rcx", "rdx")
        registers = f", {labels[0]} {rcx:#x}, {labels[1]} {rdx:#x}"
    # KVM_BUG_ON prints a warning once per place in the code.
    where = caller_symbol(WRAPPERS[leaf][0])
    yield "------------[ cut here ]------------"
    warned = f"WARNING: CPU: {event.cpu} PID: {event.thread.tid}"
    yield f"{warned} at arch/x86/kvm/vmx/tdx.c:1494 {where}"
    yield f"kvm_intel: SEAMCALL {name} failed: {status:#x}{registers}"


def _registers(run: Run, event: KernelEvent, leaf: str) -> tuple[int, int]:
    """Return RCX and RDX of the failed call: the thread's last call of the leaf until then."""
    for call in reversed(run.journal.calls):
        matches = call.leaf == leaf and call.thread is event.thread
        if matches and call.end_ns <= event.ts_ns + 1:
            return call.out_rcx, call.out_rdx
    return 0, 0
