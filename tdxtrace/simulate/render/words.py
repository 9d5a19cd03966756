"""The text of one event, which the tools share but for how they print addresses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from tdxtrace.simulate import names
from tdxtrace.simulate.kvm_events import KVM_USERSPACE_EXIT
from tdxtrace.simulate.observe import Seen

_U64: Final = (1 << 64) - 1


def symbolic(seen: Seen) -> str:
    """An event's text as the kernel prints it: symbols, and the caller left of the arrow.

    Linux kernel/trace/trace_kprobe.c, print_kprobe_event, print_kretprobe_event.
    """
    spec = seen.spec
    if spec.text is not None:
        return spec.text(seen.values)
    if spec.kind == "entry":
        where = names.entry_symbol(spec.function)
    else:
        caller = names.caller_symbol(spec.function)
        where = f"{caller} <- {names.function_symbol(spec.function)}"
    return f"({where})" + _pairs(seen)


def numeric(seen: Seen) -> str:
    """An event's text as libtraceevent prints it: bare hex, and the function left of the arrow.

    Its print format is "(%lx)" or "(%lx <- %lx)", __probe_func first.
    """
    spec = seen.spec
    if spec is KVM_USERSPACE_EXIT and seen.values[1] < 0:
        # It takes errno for unsigned, so that no error is one: libtraceevent 1.7.1.
        return "reason KVM_EXIT_UNKNOWN (0)"
    if spec.text is not None:
        return spec.text(seen.values)
    address = names.function_address(spec.function)
    if spec.kind == "entry":
        return f"({address:x})" + _pairs(seen)
    return f"({address:x} <- {names.caller_address(spec.function):x})" + _pairs(seen)


def _pairs(seen: Seen) -> str:
    return "".join(
        f" {name}={value(kind, word)}"
        for (name, kind), word in zip(seen.spec.fields, seen.values, strict=True)
    )


def value(kind: str, word: int) -> str:
    """A fetched argument: kernel/trace/trace_probe.c, DEFINE_BASIC_PRINT_TYPE_FUNC."""
    if kind == "x64":
        return f"{word & _U64:#x}"
    return str(word)


def flags(seen: Seen) -> str:
    """irqs-off, need-resched, context, preempt depth, migrate-disable, as printed."""
    if seen.irq:
        return "d.h1."
    if seen.spec.name in ("kvm_entry", "kvm_exit"):
        return "d..1."
    # Fault and zap paths hold mmu_lock, a spinning lock: preemption is off.
    in_lock = seen.spec.function.startswith(("tdh_mem_", "__seamcall"))
    return "...1." if in_lock else "....."


Text = Callable[[Seen], str]
