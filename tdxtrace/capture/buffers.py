"""Size of the ring buffer such that nothing is lost while the reader is delayed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from tdxtrace.capture.probes import Probe

# Events per second on the busiest CPU.  A TD's vCPU that faults in memory makes a few
# SEAMCALLs per fault; the shortest exit and entry measured takes 3.9 us (TUM-DSE/CVM_eval
# benchmarks/vmexit/README.md), so about 250,000 entries per second and CPU is the most
# that a guest can cause, rarely reached.  A choice, not a measurement: --rate changes it.
RATE: Final = 250_000
# Longest delay of the reader in seconds, and the fill level at which it is woken
# (buffer_percent, 50: Linux Documentation/trace/ftrace.rst).
STALL_S: Final = 1.0
WAKE_SHARE: Final = 0.5
# kvm_exit, the longest of KVM's own events, takes 68 bytes (6.18 format file).
_STOCK_BYTES: Final = 68
_LEAST_KB: Final = 1 << 10
_MOST_KB: Final = 1 << 20


def bytes_per_event(probes: Iterable[Probe]) -> float:
    """Return the mean record size in bytes, assuming that all probes fire equally often."""
    sizes = [probe.n_bytes for probe in probes]
    return sum(sizes) / len(sizes) if sizes else _STOCK_BYTES


def size_kb(probes: Iterable[Probe], rate: int) -> int:
    """Return the buffer per CPU in KiB, a power of two.

    Args:
        probes: Probes that write into it.
        rate: Events per second on the busiest CPU.
    """
    needed = rate * bytes_per_event(probes) * STALL_S / (1 - WAKE_SHARE) / 1024
    size = _LEAST_KB
    while size < needed and size < _MOST_KB:
        size *= 2
    return size


def affordable_kb(size: int, n_cpus: int, available_kb: int | None) -> int:
    """Return ``size`` (KiB per CPU), or less if all CPUs took over a quarter of memory."""
    if available_kb is None:
        return size
    while size > _LEAST_KB and size * n_cpus * 4 > available_kb:
        size //= 2
    return size
