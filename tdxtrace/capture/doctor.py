"""Checks of what can be captured on a host, with the impact and fix of each failed check."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from tdxtrace.capture import machine, tracing
from tdxtrace.capture.host import STATES, Check, Host

_CHECKS: Final[tuple[Callable[[Host], Check], ...]] = (
    machine.kernel,
    machine.privilege,
    machine.lockdown,
    machine.cpu,
    machine.kvm_intel,
    machine.tdx_module,
    tracing.tracefs,
    tracing.wrappers_there,
    tracing.kprobes,
    tracing.return_arguments,
    tracing.fprobes,
    tracing.uprobes,
    tracing.blacklist,
    tracing.btf,
    tracing.kvm_events,
    tracing.function_graph,
    tracing.clock,
    tracing.buffer,
    tracing.leftovers,
    tracing.others,
    machine.tools,
)

_SUMMARY: Final = {
    "full": "This host can be captured in full: tdxtrace capture record -o trace.dat",
    "stock": "Only KVM's own events: tdxtrace capture record --level stock -o trace.dat",
    "program": "Only programs can be captured (--program), not this kernel's SEAMCALLs.",
    "nothing": "Nothing can be captured here.",
}


@dataclass(frozen=True, slots=True)
class Verdict:
    """Conclusion from all checks."""

    can: str
    """``full``, ``stock`` (KVM's own events), ``program`` (uprobes only) or ``nothing``."""
    why: str
    checks: tuple[Check, ...]

    @property
    def sentence(self) -> str:
        """What can be recorded here, with the command."""
        return _SUMMARY[self.can]

    def to_dict(self) -> dict[str, Any]:
        """The verdict as plain data, for JSON."""
        return dataclasses.asdict(self)


def examine(host: Host) -> Verdict:
    """Check the host without changing anything.

    Returns:
        Every check, prerequisites first, and the conclusion. A state that could not be determined
        is ``unknown``, never ``ok`` or ``missing``.
    """
    checks = tuple(check(host) for check in _CHECKS)
    return _verdict(checks)


def _verdict(checks: tuple[Check, ...]) -> Verdict:
    state = {check.name: check.state for check in checks}
    assert set(state.values()) <= set(STATES)
    for name in ("root", "tracefs"):
        if state[name] in ("missing", "unknown"):
            found = next(check for check in checks if check.name == name)
            return Verdict("nothing", f"{name}: {found.found}; {found.remedy}", checks)
    if state["wrappers"] == "ok" and state["kprobes"] == "ok":
        return Verdict("full", "the wrappers can be probed", checks)
    missing = [name for name in ("wrappers", "kprobes") if state[name] != "ok"]
    if state["kvm_events"] == "ok":
        why = f"KVM's own events only; for SEAMCALLs: {' and '.join(missing)}"
        return Verdict("stock", why, checks)
    if state["uprobes"] == "ok":
        return Verdict("program", "only programs can be probed, not this kernel", checks)
    return Verdict("nothing", f"neither probes nor KVM's events: {', '.join(missing)}", checks)
