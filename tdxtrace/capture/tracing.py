"""The tracing of this kernel: tracefs, probes, types, events, clocks, buffers, leftovers."""

from __future__ import annotations

import gzip
import os
import re
from pathlib import Path
from typing import Final

from tdxtrace.capture import buffers, dynamic, symbols
from tdxtrace.capture.btf import open_btf
from tdxtrace.capture.checks import Check
from tdxtrace.capture.host import Host, may_write
from tdxtrace.capture.options import Detail
from tdxtrace.capture.recipe import Kernel, Wish, offsets, recipe
from tdxtrace.errors import TdxtraceError

_MOUNT: Final = "mount -t tracefs nodev /sys/kernel/tracing"
_MEMORY: Final = re.compile(r"^MemAvailable:\s*(\d{1,15}) kB$", re.MULTILINE)
_WRAPPERS: Final = ("tdh_mem_page_aug", "tdh_mem_sept_add")


def tracefs(host: Host) -> Check:
    """Whether there is a tracefs that takes instances of ours."""
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
            "tracefs", "missing", "not mounted, or not to be seen", lost, f"as root: {_MOUNT}"
        )
    shown = _shown(host, where)
    if not may_write(where / "instances") or not (where / "instances").is_dir():
        return Check("tracefs", "missing", f"{shown} is not ours to write", lost, "use sudo")
    return Check("tracefs", "ok", shown)


def wrappers_there(host: Host) -> Check:
    """Whether the kernel has the functions that issue SEAMCALLs."""
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
    """Whether kprobe events can be made."""
    lost = "SEAMCALLs, all of them: only KVM's own events remain (--level stock)"
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
        return Check("kprobes", "missing", "kprobe_events may not be written", lost, "use sudo")
    return Check("kprobes", "ok", "kprobe_events")


def return_arguments(host: Host) -> Check:
    """Whether a return probe may fetch what the function was entered with."""
    seen = host.traced("README")
    lost = "ext_err1 and ext_err2, the status of TDH.VP.ENTER; the minimal level costs twice"
    if seen.text is None:
        return Check("return_arguments", "unknown", f"tracefs' README is {seen.why}", lost)
    if has_return_arguments(seen.text):
        return Check("return_arguments", "ok", "kernel return probes take $argN")
    return Check("return_arguments", "limited", "not in this kernel", lost, "Linux 6.9 or later")


def has_return_arguments(readme: str) -> bool:
    """Whether tracefs' README names $argN among what return probes support."""
    return bool(re.search(r"kernel return probes support:.*\$arg<N>", readme))


def fprobes(host: Host) -> Check:
    """Whether fprobe events can be made; kprobes do as well."""
    lost = "nothing where kprobes are there: they see the same calls"
    seen = host.traced("README")
    if seen.text is None:
        return Check("fprobes", "unknown", f"tracefs' README is {seen.why}", lost)
    if not re.search(r"^[^\S\n]*f\[", seen.text, re.MULTILINE) and "f[:" not in seen.text:
        return Check(
            "fprobes", "limited", "no f: events", lost, "CONFIG_FPROBE_EVENTS=y, Linux 6.5"
        )
    return Check("fprobes", "ok", "f: events")


def uprobes(host: Host) -> Check:
    """Whether programs can be probed: the way in which tdxtrace tests its own capture."""
    where = host.tracefs
    lost = "capture from a program that stands in for a TDX host (--program)"
    if where is None:
        return _by_config(host, "uprobes", "UPROBE_EVENTS", lost, "CONFIG_UPROBE_EVENTS=y")
    if may_write(where / "uprobe_events"):
        return Check("uprobes", "ok", "uprobe_events")
    return Check("uprobes", "missing", "uprobe_events is not there or not ours to write", lost)


def blacklist(host: Host) -> Check:
    """Which of our functions kprobes refuse."""
    seen = host.read("sys/kernel/debug/kprobes/blacklist")
    known = symbols.of_host(host)
    refused = sorted(known.blacklisted)
    if seen.text is None:
        return Check(
            "blacklist",
            "note",
            f"not to be seen; noinstr in the source: {', '.join(refused)}",
            remedy="mount -t debugfs none /sys/kernel/debug",
        )
    ours = [name for name in refused if known.has(name)]
    return Check("blacklist", "note", ", ".join(ours) if ours else "none of our functions")


def btf(host: Host) -> Check:
    """Whether the place of TDH.VP.ENTER's status in struct vcpu_tdx can be found."""
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
            "BTF is there, without struct vcpu_tdx",
            lost,
            "load kvm_intel of a kernel with CONFIG_KVM_INTEL_TDX",
        )
    return Check("btf", "ok", f"vp_enter_ret at {places[0]}, exit_gpa at {places[1]} of vcpu_tdx")


def btf_paths(host: Host) -> list[Path]:
    """The running kernel's types, and those of kvm_intel if it is a module."""
    folder = host.root / "sys/kernel/btf"
    return [path for name in ("vmlinux", "kvm_intel") if (path := folder / name).exists()]


def kernel_of(host: Host) -> Kernel:
    """What the running kernel says of itself, for a recipe."""
    readme = host.traced("README").text
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
    """Whether KVM's own tracepoints are there."""
    where = host.tracefs
    lost = "entries and exits of vCPUs, page faults"
    if where is None:
        return Check("kvm_events", "unknown", "tracefs is not mounted", lost)
    missing = [e for e in ("kvm_entry", "kvm_exit") if not (where / "events/kvm" / e).is_dir()]
    if not missing:
        return Check("kvm_events", "ok", "kvm_entry, kvm_exit")
    return Check("kvm_events", "missing", f"no {', '.join(missing)}", lost, "modprobe kvm_intel")


def function_graph(host: Host) -> Check:
    """Whether function_graph prints return values: another way to see wrappers return."""
    seen = host.traced("available_tracers")
    lost = "nothing where kprobes are there; else a second way to see statuses"
    if seen.text is None:
        return Check("function_graph", "unknown", f"available_tracers is {seen.why}", lost)
    where = host.tracefs
    has = "function_graph" in seen.text.split()
    if has and where is not None and (where / "options/funcgraph-retval").exists():
        return Check("function_graph", "ok", "with return values")
    said = "without return values" if has else "not in this kernel"
    return Check(
        "function_graph", "limited", said, lost, "CONFIG_FUNCTION_GRAPH_RETVAL=y, Linux 6.5"
    )


def clock(host: Host) -> Check:
    """Whether there is a clock that all CPUs share and others can be held against."""
    seen = host.traced("trace_clock")
    if seen.text is None:
        return Check("clock", "unknown", f"trace_clock is {seen.why}", "comparable times")
    if re.search(r"\bmono\b", seen.text):
        return Check("clock", "ok", f"mono; in use now: {seen.line}")
    return Check(
        "clock", "limited", seen.line, "times that other logs share", "Linux 3.17 or later"
    )


def buffer(host: Host) -> Check:
    """Which buffer the recommended rate needs, and whether memory allows it."""
    cpus = n_cpus(host)
    made = recipe(kernel_of(host), Wish(Detail.full))
    size = buffers.affordable_kb(made.buffer_kb, cpus, available_kb(host))
    said = f"{size} KiB for each of {cpus} CPUs, for {buffers.RATE:,} events/s on the busiest"
    now = host.traced("buffer_size_kb").line
    said += f"; the top buffer has {now}" if now else ""
    if size < made.buffer_kb:
        lost = f"some of a burst: {made.buffer_kb} KiB each would be over a quarter of the memory"
        return Check("buffer", "limited", said, lost, "--buffer, or fewer events (--level minimal)")
    return Check("buffer", "ok", said)


def n_cpus(host: Host) -> int:
    """CPUs that have a ring buffer: the possible ones, not just those online."""
    where = host.tracefs
    try:
        listed = [] if where is None else list((where / "per_cpu").glob("cpu[0-9]*"))
    except OSError:
        listed = []
    return len(listed) or os.cpu_count() or 1


def available_kb(host: Host) -> int | None:
    """Memory that can be had, in KiB; None where it is not told."""
    found = _MEMORY.search(host.read("proc/meminfo").text or "")
    return int(found[1]) if found else None


def leftovers(host: Host) -> Check:
    """Instances and probes of ours whose recorder is gone."""
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
    """Who else traces: left alone, but they cost time and may explain it."""
    where = host.tracefs
    if where is None:
        return Check("others", "unknown", "tracefs is not mounted")
    lines = dynamic.lines(where)
    theirs = [line for line in lines if not dynamic.is_ours(line)]
    instances = [n for n in dynamic.instances(where) if not n.startswith(dynamic.PREFIX)]
    said = f"{len(theirs)} probes and {len(instances)} instances of others"
    return Check("others", "note", said if theirs or instances else "none")


def _by_config(host: Host, name: str, option: str, lost: str, remedy: str) -> Check:
    """What the kernel was built with, where tracefs cannot be asked."""
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
