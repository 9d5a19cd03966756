"""Checks of the kernel's tracing: tracefs, probes, BTF, events, clocks, buffers, leftovers."""

from __future__ import annotations

import gzip
import os
import re
from pathlib import Path
from typing import Final

from tdxtrace.capture import dynamic, symbols
from tdxtrace.capture.btf import open_btf
from tdxtrace.capture.host import Check, Host, may_write
from tdxtrace.capture.options import Detail
from tdxtrace.capture.probes import RATE, affordable_kb
from tdxtrace.capture.recipe import Kernel, RecipeOptions, offsets, recipe
from tdxtrace.errors import TdxtraceError

_MOUNT: Final = "mount -t tracefs nodev /sys/kernel/tracing"
_MEMORY: Final = re.compile(r"^MemAvailable:\s*(\d{1,15}) kB$", re.MULTILINE)
_WRAPPERS: Final = ("tdh_mem_page_aug", "tdh_mem_sept_add")


def tracefs(host: Host) -> Check:
    """Check that tracefs is mounted and instances can be created."""
    where = host.tracefs
    lost = "everything"
    if where is None:
        seen = host.read("proc/filesystems").text
        if seen is not None and not re.search(r"\btracefs$", seen, re.MULTILINE):
            return Check(
                "tracefs",
                "missing",
                "not in this kernel",
                lost,
                "needs CONFIG_TRACING in the kernel",
            )
        return Check(
            "tracefs", "missing", "not mounted, or not visible", lost, f"as root: {_MOUNT}"
        )
    shown = _shown(host, where)
    if not may_write(where / "instances") or not (where / "instances").is_dir():
        return Check("tracefs", "missing", f"{shown} is not writable", lost, "use sudo")
    return Check("tracefs", "ok", shown)


def wrappers_there(host: Host) -> Check:
    """Check that the kernel has the functions that issue SEAMCALLs."""
    known = symbols.of_host(host)
    if known.names is None:
        return Check(
            "wrappers", "unknown", "/proc/kallsyms shows nothing", "probes on SEAMCALLs", "use sudo"
        )
    names = sorted(n for n in known.names if known.may_probe(n))
    if all(name in names for name in _WRAPPERS):
        return Check("wrappers", "ok", f"{len(names)} functions, tdh_mem_page_aug among them")
    return Check(
        "wrappers",
        "missing",
        "no tdh_mem_page_aug in this kernel",
        "every SEAMCALL: there is no TDX host code to probe",
        "Linux 6.16 or later with CONFIG_INTEL_TDX_HOST and CONFIG_KVM_INTEL_TDX",
    )


def kprobes(host: Host) -> Check:
    """Check that kprobe events can be added."""
    lost = "all SEAMCALLs: only KVM's own events remain (--level stock)"
    remedy = "a kernel with CONFIG_KPROBE_EVENTS=y (every distribution's has it)"
    where = host.tracefs
    if where is None:
        return _by_config(host, "kprobes", "KPROBE_EVENTS", lost, remedy)
    if not (where / "kprobe_events").exists():
        return Check("kprobes", "missing", "no kprobe_events in tracefs", lost, remedy)
    if host.read("sys/kernel/debug/kprobes/enabled").line == "0":
        on = "echo 1 > /sys/kernel/debug/kprobes/enabled"
        return Check("kprobes", "missing", "switched off in debugfs", lost, on)
    if not may_write(where / "kprobe_events"):
        return Check("kprobes", "missing", "kprobe_events is not writable", lost, "use sudo")
    return Check("kprobes", "ok", "kprobe_events")


def return_arguments(host: Host) -> Check:
    """Check that return probes can fetch the arguments of the function."""
    seen = host.read_tracefs("README")
    lost = "ext_err1 and ext_err2, the status of TDH.VP.ENTER; the minimal level costs twice"
    if seen.text is None:
        return Check("return_arguments", "unknown", f"tracefs' README is {seen.why}", lost)
    if has_return_arguments(seen.text):
        return Check("return_arguments", "ok", "kernel return probes take $argN")
    return Check("return_arguments", "limited", "not in this kernel", lost, "Linux 6.9 or later")


def has_return_arguments(readme: str) -> bool:
    """Return whether tracefs' README lists $argN for return probes."""
    lines = (line.partition("kernel return probes support:")[2] for line in readme.splitlines())
    return any("$arg<N>" in line for line in lines)


def fprobes(host: Host) -> Check:
    """Check that fprobe events can be added, an alternative to kprobes."""
    lost = "nothing if kprobes work: they record the same calls"
    seen = host.read_tracefs("README")
    if seen.text is None:
        return Check("fprobes", "unknown", f"tracefs' README is {seen.why}", lost)
    if not re.search(r"^[^\S\n]*f\[", seen.text, re.MULTILINE) and "f[:" not in seen.text:
        return Check(
            "fprobes", "limited", "no f: events", lost, "CONFIG_FPROBE_EVENTS=y, Linux 6.5"
        )
    return Check("fprobes", "ok", "f: events")


def uprobes(host: Host) -> Check:
    """Check that programs can be probed, for --program and the tests of capture."""
    where = host.tracefs
    lost = "capture from a program that simulates a TDX host (--program)"
    if where is None:
        return _by_config(host, "uprobes", "UPROBE_EVENTS", lost, "CONFIG_UPROBE_EVENTS=y")
    if may_write(where / "uprobe_events"):
        return Check("uprobes", "ok", "uprobe_events")
    return Check("uprobes", "missing", "uprobe_events is missing or not writable", lost)


def blacklist(host: Host) -> Check:
    """List the functions of interest that kprobes refuse."""
    seen = host.read("sys/kernel/debug/kprobes/blacklist")
    known = symbols.of_host(host)
    refused = sorted(known.blacklisted)
    if seen.text is None:
        return Check(
            "blacklist",
            "note",
            f"not readable; noinstr in the source: {', '.join(refused)}",
            remedy="mount -t debugfs none /sys/kernel/debug",
        )
    listed = ", ".join(name for name in refused if known.has(name))
    return Check("blacklist", "note", listed or "none of the functions to probe")


def btf(host: Host) -> Check:
    """Check that BTF has the offset of TDH.VP.ENTER's status in struct vcpu_tdx."""
    lost = "the status of TDH.VP.ENTER: zero-step and TRACK look alike (exit reason -1)"
    paths = btf_paths(host)
    if not paths:
        return Check(
            "btf", "missing", "no /sys/kernel/btf/vmlinux", lost, "CONFIG_DEBUG_INFO_BTF=y"
        )
    try:
        places = offsets(open_btf(paths))
    except TdxtraceError as error:
        return Check("btf", "limited", str(error), lost)
    if places is None:
        return Check(
            "btf",
            "limited",
            "BTF without struct vcpu_tdx",
            lost,
            "load kvm_intel of a kernel with CONFIG_KVM_INTEL_TDX",
        )
    return Check("btf", "ok", f"vp_enter_ret at {places[0]}, exit_gpa at {places[1]} of vcpu_tdx")


def btf_paths(host: Host) -> list[Path]:
    """Return the BTF files of the kernel, and of kvm_intel if it is a module."""
    folder = host.root / "sys/kernel/btf"
    return [path for name in ("vmlinux", "kvm_intel") if (path := folder / name).exists()]


def kernel_of(host: Host) -> Kernel:
    """Return the running kernel with its symbols, types and support for return arguments."""
    readme = host.read_tracefs("README").text
    try:
        types = open_btf(btf_paths(host)) if btf_paths(host) else None
    except TdxtraceError:
        types = None
    return Kernel(
        host.release,
        symbols.of_host(host),
        types,
        None if readme is None else has_return_arguments(readme),
    )


def kvm_events(host: Host) -> Check:
    """Check for KVM's tracepoints."""
    where = host.tracefs
    lost = "entries and exits of vCPUs, page faults"
    if where is None:
        return Check("kvm_events", "unknown", "tracefs is not mounted", lost)
    missing = [e for e in ("kvm_entry", "kvm_exit") if not (where / "events/kvm" / e).is_dir()]
    if not missing:
        return Check("kvm_events", "ok", "kvm_entry, kvm_exit")
    return Check("kvm_events", "missing", f"no {', '.join(missing)}", lost, "modprobe kvm_intel")


def function_graph(host: Host) -> Check:
    """Check that function_graph prints return values, an alternative to return probes."""
    seen = host.read_tracefs("available_tracers")
    lost = "nothing if kprobes work; else a second way to see statuses"
    if seen.text is None:
        return Check("function_graph", "unknown", f"available_tracers is {seen.why}", lost)
    where = host.tracefs
    has = "function_graph" in seen.text.split()
    if has and where is not None and (where / "options/funcgraph-retval").exists():
        return Check("function_graph", "ok", "with return values")
    found = "without return values" if has else "not in this kernel"
    return Check(
        "function_graph", "limited", found, lost, "CONFIG_FUNCTION_GRAPH_RETVAL=y, Linux 6.5"
    )


def clock(host: Host) -> Check:
    """Check for a clock that is common to all CPUs and comparable with other recordings."""
    seen = host.read_tracefs("trace_clock")
    if seen.text is None:
        return Check("clock", "unknown", f"trace_clock is {seen.why}", "comparable times")
    if re.search(r"\bmono\b", seen.text):
        return Check("clock", "ok", f"mono; in use now: {seen.line}")
    return Check(
        "clock", "limited", seen.line, "times that other logs share", "Linux 3.17 or later"
    )


def buffer(host: Host) -> Check:
    """Check that memory suffices for the buffer size of the default rate."""
    cpus = n_cpus(host)
    made = recipe(kernel_of(host), RecipeOptions(Detail.full))
    size = affordable_kb(made.buffer_kb, cpus, available_kb(host))
    found = f"{size} KiB for each of {cpus} CPUs, for {RATE:,} events/s on the busiest"
    now = host.read_tracefs("buffer_size_kb").line
    found += f"; the top buffer has {now}" if now else ""
    if size < made.buffer_kb:
        lost = f"some of a burst: {made.buffer_kb} KiB each would be over a quarter of the memory"
        fix = "--buffer, or fewer events (--level minimal)"
        return Check("buffer", "limited", found, lost, fix)
    return Check("buffer", "ok", found)


def n_cpus(host: Host) -> int:
    """Return the number of CPUs with a ring buffer: possible CPUs, not only those online."""
    where = host.tracefs
    try:
        listed = [] if where is None else list((where / "per_cpu").glob("cpu[0-9]*"))
    except OSError:
        listed = []
    return len(listed) or os.cpu_count() or 1


def available_kb(host: Host) -> int | None:
    """Return the available memory in KiB; None if unknown."""
    found = _MEMORY.search(host.read("proc/meminfo").text or "")
    return int(found[1]) if found else None


def leftovers(host: Host) -> Check:
    """Check for instances and probes of recorders that no longer run."""
    where = host.tracefs
    if where is None:
        return Check("leftovers", "unknown", "tracefs is not mounted")
    found = dynamic.leftovers(where)
    if not found:
        return Check("leftovers", "ok", "none")
    return Check(
        "leftovers",
        "limited",
        f"of a killed tdxtrace: {', '.join(found)}",
        "memory of the buffers, time at every call that is still probed",
        "tdxtrace capture clean",
    )


def others(host: Host) -> Check:
    """List active probes and instances of other tools, which cost time; they are not changed."""
    where = host.tracefs
    if where is None:
        return Check("others", "unknown", "tracefs is not mounted")
    lines = dynamic.lines(where)
    other_probes = [line for line in lines if not dynamic.is_ours(line)]
    instances = [n for n in dynamic.instances(where) if not n.startswith(dynamic.PREFIX)]
    found = f"{len(other_probes)} probes and {len(instances)} instances of other tools"
    return Check("others", "note", found if other_probes or instances else "none")


def _by_config(host: Host, name: str, option: str, lost: str, remedy: str) -> Check:
    """Check the kernel configuration, if tracefs cannot be read."""
    text = host.read(f"boot/config-{host.release}").text
    if text is None:
        try:
            with gzip.open(host.root / "proc/config.gz", "rt", errors="replace") as file:
                text = file.read(16 << 20)
        except (OSError, EOFError, gzip.BadGzipFile):
            return Check(name, "unknown", "tracefs is not mounted", lost, f"as root: {_MOUNT}")
    if re.search(rf"^CONFIG_{option}=y$", text, re.MULTILINE):
        return Check(
            name, "limited", "built in, tracefs is not mounted", lost, f"as root: {_MOUNT}"
        )
    return Check(name, "missing", f"built without CONFIG_{option}", lost, remedy)


def _shown(host: Host, where: Path) -> str:
    return (
        "/" + str(where.relative_to(host.root)) if where.is_relative_to(host.root) else str(where)
    )
