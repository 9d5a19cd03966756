"""Distributions of durations, with units, ranges and sources.

Every field of ``Durations`` is a ``Duration`` in nanoseconds and may be set in a scenario's
``[times]`` as four numbers (low, median, 99th percentile, high).  If no public source gives a
number, the comment is "not public": the default is then a guess of the right order of magnitude,
chosen so that sums agree with public figures (``sample_traces/README.md``).
"""
# ruff: noqa: RUF009 - the defaults are frozen, as every Duration is

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Duration:
    """The distribution of a duration by four quantiles, in integer ns.

    The quantile function is linear between them, but quadratic from the median to ``p99``: a mode
    near the median and a tail to the right, as is typical of latencies; no public source gives
    the shape of any of them.

    Raises:
        ValueError: If they are negative or do not ascend.
    """

    low: int
    median: int
    p99: int
    high: int

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.median <= self.p99 <= self.high:
            raise ValueError(
                f"not a duration: {self.low}, {self.median}, {self.p99}, {self.high}; "
                "times are not negative and grow from low over median and p99 to high"
            )


def fixed(ns: int) -> Duration:
    """Return a constant duration."""
    return Duration(ns, ns, ns, ns)


def _us(low: float, median: float, p99: float, high: float) -> Duration:
    return Duration(*(int(us * 1000) for us in (low, median, p99, high)))


@dataclass(frozen=True, slots=True)
class Durations:
    """Durations of the module, of KVM, of guests and of the machine."""

    # A failed SEAMCALL costs at least 2000 cycles, 0.74 us at 2.7 GHz: S. Christopherson,
    # 2024-09-10, "would be surprised if less", not measured.  Half in, half out.
    into_module: Duration = _us(0.30, 0.36, 0.60, 2.0)
    out_of_module: Duration = _us(0.32, 0.38, 0.65, 2.5)
    # The work of a leaf while it holds its locks: not public.  AUG is the remainder of
    # the 8 us of a whole private fault on a quiet host (Dstack PR 1220, Granite Rapids).
    aug: Duration = _us(1.2, 1.7, 3.2, 9.0)
    sept_add: Duration = _us(1.3, 1.9, 3.5, 9.0)
    page_add: Duration = _us(1.6, 2.2, 4.0, 10.0)
    extend: Duration = _us(0.8, 1.0, 1.8, 5.0)
    # BLOCK, TRACK, kick and REMOVE together: 10.2 us per page at 4 vCPUs (the same mails).
    block: Duration = _us(0.8, 1.2, 2.2, 6.0)
    track: Duration = _us(0.2, 0.3, 0.7, 2.5)
    remove: Duration = _us(1.0, 1.5, 2.6, 7.0)
    # 4.5 to 5.1 us per page reclaimed at teardown (A. Hunter, TERMINATE_VM, 2025): two
    # calls, RECLAIM and WBINVD, and the clearing of the page.
    reclaim: Duration = _us(0.7, 1.0, 1.8, 5.0)
    wbinvd: Duration = _us(0.8, 1.1, 2.2, 6.0)
    clear_page: Duration = _us(0.6, 0.9, 1.6, 4.0)
    demote: Duration = _us(8.0, 12.0, 25.0, 60.0)
    promote: Duration = _us(10.0, 15.0, 30.0, 80.0)
    flush: Duration = _us(0.5, 0.8, 2.0, 6.0)
    manage: Duration = _us(1.0, 2.0, 6.0, 20.0)
    # One pass of TDH.PHYMEM.CACHE.WB before it looks for interrupts: not public.
    cache_wb_pass: Duration = _us(200, 400, 900, 2000)
    # SEAMLDR.INSTALL on one CPU: Intel's documentation shows 28 to 44 ms on early silicon; a
    # choice of the model, shorter, so that runs stay short.
    install: Duration = _us(150, 250, 600, 2000)
    # TDH.VP.ENTER: locks to epoch released ("a few instructions"), the gate and the
    # restoring of the guest's state, and the exit.  Together with KVM's own part
    # 3.85 us: a CPUID that goes through KVM and back (TUM-DSE/CVM_eval, vmexit README).
    epoch_window: Duration = _us(0.03, 0.06, 0.12, 0.4)
    enter_guest: Duration = _us(0.60, 0.75, 1.2, 4.0)
    leave_guest: Duration = _us(0.55, 0.70, 1.2, 4.0)
    # KVM: from an exit to the next entry, to the TDP MMU, one turn of the local retry
    # loop, between two calls of a retry loop in the wrapper.  Not public.
    handle_exit: Duration = _us(0.14, 0.20, 0.6, 5.0)
    before_entry: Duration = _us(0.16, 0.22, 0.5, 4.0)
    handle_fault: Duration = _us(0.8, 1.1, 2.6, 20.0)
    # A return of tdx_vcpu_run that does not enter because wait_for_sept_zap is set.
    held_off: Duration = _us(0.05, 0.08, 0.2, 2.0)
    local_turn: Duration = _us(0.5, 0.7, 1.6, 10.0)
    wrapper_turn: Duration = _us(0.02, 0.04, 0.10, 0.5)
    zap_step: Duration = _us(0.15, 0.25, 0.8, 5.0)
    # A kick: one IPI and its delivery.  Orders of magnitude only: 50 k to 200 k cycles at
    # worst for all vCPUs of a large VM (intel-staging/pKVM-IA 83, not TDX).
    send_ipi: Duration = _us(0.10, 0.15, 0.35, 1.5)
    ipi_flight: Duration = _us(0.6, 0.9, 2.5, 15.0)
    # To the VMM and back, and the work of the VMM itself.  Not public.
    userspace: Duration = _us(4.0, 9.0, 45.0, 400.0)
    convert: Duration = _us(3.0, 6.0, 30.0, 300.0)
    # Guest: one TDCALL that stays in the module (0.65 us: CPUID answered inside,
    # TUM-DSE/CVM_eval), of which a page's zeroing on ACCEPT is extra; #VE; interrupts.
    tdcall: Duration = _us(0.55, 0.65, 0.9, 3.0)
    zero_page: Duration = _us(0.10, 0.14, 0.3, 1.5)
    attr: Duration = _us(0.10, 0.15, 0.3, 1.0)
    handle_ve: Duration = _us(0.8, 1.2, 3.0, 20.0)
    guest_interrupt: Duration = _us(1.0, 2.5, 12.0, 80.0)
    guest_pause: Duration = _us(0.10, 0.20, 0.5, 2.0)
    # The machine: a time slice (EEVDF base slice, Linux 6.16 kernel/sched/fair.c:
    # 0.7 ms times 1 + log2 of the CPUs), a context switch.
    slice: Duration = fixed(2_800_000)
    switch: Duration = _us(0.8, 1.3, 4.0, 30.0)
    entry_probe: Duration = _us(0.02, 0.04, 0.10, 1.0)


def durations_from(given: Mapping[str, list[int]]) -> Durations:
    """Return the default durations, with those of a scenario replaced.

    Args:
        given: Four numbers of ns (low, median, 99th percentile, high) by field name.

    Raises:
        ValueError: If a name is unknown or its four numbers are not a distribution.
    """
    known = {field.name for field in dataclasses.fields(Durations)}
    if not isinstance(given, Mapping):
        raise ValueError("times is no table; write [times] and below it name = four numbers")
    changes = {}
    for name, numbers in given.items():
        if name not in known:
            raise ValueError(f"no such time: {name!r}; there are: {', '.join(sorted(known))}")
        if (
            not isinstance(numbers, list)
            or len(numbers) != 4
            or not all(isinstance(n, int) for n in numbers)
        ):
            raise ValueError(
                f"time {name!r} takes four whole numbers of ns: low, median, p99, high"
            )
        changes[name] = Duration(*numbers)
    return dataclasses.replace(Durations(), **changes)
