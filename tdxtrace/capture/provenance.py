"""Provenance of a recording: kernel, module, clock, probes, losses, VMs and their vCPUs."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tdxtrace.capture import machine
from tdxtrace.capture.host import Host
from tdxtrace.capture.instance import LOST, Instance
from tdxtrace.capture.recipe import Recipe

# What an open vCPU is called: Linux virt/kvm/kvm_main.c, create_vcpu_fd.
_VCPU: Final = re.compile(r"anon_inode:kvm-vcpu:(?P<vcpu>\d{1,6})")


@dataclass(slots=True)
class VmObserver:
    """VMs seen during the recording, by pid: vCPU numbers and thread names."""

    vms: dict[int, dict[str, Any]] = field(default_factory=dict)

    def observe(self, proc: Path = Path("/proc")) -> None:
        """Record every process that has vCPUs now, with its threads."""
        for pid, vcpus in _processes(proc):
            facts = self.vms.setdefault(pid, {"vcpus": [], "threads": {}})
            facts["vcpus"] = sorted({*facts["vcpus"], *vcpus})
            for tid, comm in _threads(proc / str(pid)):
                facts["threads"][str(tid)] = comm


def provenance(
    host: Host, recipe: Recipe, instance: Instance, buffer_kb: int, vm_observer: VmObserver
) -> dict[str, Any]:
    """Return the content of capture.json; counters are the kernel's, per CPU."""
    from tdxtrace import __version__  # noqa: PLC0415 - the package imports the readers

    stats = {str(cpu): instance.stats(cpu) for cpu in instance.cpus()}
    module = machine.tdx_module(host)
    return {
        "tdxtrace": __version__,
        "kernel": host.release,
        "tdx_module": module.found if module.state == "ok" else None,
        "clock": recipe.clock,
        "level_base": recipe.level_base,
        "buffer_kb_per_cpu": buffer_kb,
        "probes": [probe.line for probe in recipe.probes],
        "events": [{"name": e.name, "filter": e.filter} for e in recipe.events],
        "not_answered": list(recipe.cannot),
        "notes": list(recipe.notes),
        "vms": vm_observer.vms,
        "cpus": stats,
        "lost_events": sum(one.get(key, 0) for one in stats.values() for key in LOST),
        "read_events": sum(one.get("read events", 0) for one in stats.values()),
    }


def _processes(proc: Path) -> Iterator[tuple[int, list[int]]]:
    """Yield processes with open vCPUs, and the numbers of these."""
    for pid in _numbers(proc):
        found = []
        for fd in _names(proc / str(pid) / "fd"):
            try:
                link = str((proc / str(pid) / "fd" / fd).readlink())
            except OSError:
                continue
            match = _VCPU.match(link)
            if match:
                found.append(int(match["vcpu"]))
        if found:
            yield pid, found


def _threads(process: Path) -> Iterator[tuple[int, str]]:
    for tid in _numbers(process / "task"):
        try:
            yield tid, (process / "task" / str(tid) / "comm").read_text("utf-8", "replace").strip()
        except OSError:
            continue


def _numbers(folder: Path) -> list[int]:
    return sorted(int(name) for name in _names(folder) if name.isdigit())


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)  # noqa: PTH208 - names, not paths
    except OSError:
        return []
