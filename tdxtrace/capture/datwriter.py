"""Results of a recording: its provenance, and trace.dat for trace-cmd and KernelShark.

trace.dat has version 6, which all releases of these tools read: trace-cmd.dat.v6(5).  The pages of
one CPU after the other are appended, and the file of a CPU is removed after it is appended, so that
the disk need not hold two copies of the recording.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tdxtrace.capture import machine
from tdxtrace.capture.host import Host
from tdxtrace.capture.instance import LOST, Instance, page_bytes
from tdxtrace.capture.recipe import Recipe
from tdxtrace.capture.recording import PAGES
from tdxtrace.tables.files import rename_into_place

# Name of the file of an open vCPU: Linux virt/kvm/kvm_main.c, create_vcpu_fd.
_VCPU: Final = re.compile(r"anon_inode:kvm-vcpu:(?P<vcpu>\d{1,6})")
_MAGIC: Final = b"\x17\x08\x44tracing6\0"
# Option numbers: trace-cmd.dat.v6(5), OPTIONS.
_CPUSTAT, _TRACECLOCK, _UNAME, _VERSION = 2, 4, 5, 9
_LITTLE_ENDIAN: Final = 0
_LONG: Final = 8


def write_dat(folder: Path, target: Path, uname: str, version: str) -> None:
    """Join the pages in ``folder`` into the file ``target``.

    Args:
        folder: A finished recording.  Its pages are removed, all other files are kept.
        target: The file to write; it is replaced when the new file is complete.
        uname: System, host name, release and machine, as uname prints them.
        version: Name and version of the recorder.

    Raises:
        OSError: If the file cannot be written.  Pages that were appended are then in joined.dat in
            the folder, all other pages in their files.
    """
    cpus = sorted((folder / "per_cpu").glob("cpu*"), key=lambda path: int(path.name[3:]))
    page = page_bytes(_text(folder / "events/header_page").decode())
    sizes = [_size(path / PAGES) for path in cpus]
    head = _head(folder, page, uname, version, cpus)
    head += _table(len(head), sizes, _text(folder / "trace_clock").strip(), page)
    # Each CPU's file is removed after it is appended, so at most one is on the disk twice.
    if shutil.disk_usage(folder).free < len(head) + max(sizes, default=0):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    made = folder / "joined.dat"
    with made.open("wb", buffering=0) as file:
        file.write(head)
        for path, size in zip(cpus, sizes, strict=True):
            if size:
                _append(path / PAGES, file.fileno(), size)
                file.write(b"\0" * (-size % page))
                (path / PAGES).unlink()
    rename_into_place(made, target)


def _table(n_before: int, sizes: Sequence[int], clock: bytes, page: int) -> bytes:
    """Return the table of CPU data offsets, the clock, and padding to a page boundary."""
    n_bytes = 16 * len(sizes) + 8 + len(clock)
    at, table = _rounded(n_before + n_bytes, page), b""
    for size in sizes:
        table += struct.pack("<QQ", at, size)
        at += _rounded(size, page)
    made = table + struct.pack("<Q", len(clock)) + clock
    return made + b"\0" * (-(n_before + n_bytes) % page)


def _head(folder: Path, page: int, uname: str, version: str, cpus: list[Path]) -> bytes:
    """Return the file header up to the table of CPUs."""
    out = bytearray(_MAGIC + bytes([_LITTLE_ENDIAN, _LONG]) + struct.pack("<I", page))
    for name in ("header_page", "header_event"):
        text = _text(folder / "events" / name)
        out += name.encode() + b"\0" + struct.pack("<Q", len(text)) + text
    own = sorted((folder / "events/ftrace").glob("*/format"))
    out += struct.pack("<I", len(own)) + b"".join(map(_sized, own))
    systems = sorted(
        path for path in (folder / "events").iterdir() if path.is_dir() and path.name != "ftrace"
    )
    out += struct.pack("<I", len(systems))
    for system in systems:
        formats = sorted(system.glob("*/format"))
        out += system.name.encode() + b"\0" + struct.pack("<I", len(formats))
        out += b"".join(map(_sized, formats))
    # No kallsyms, no printk formats: the names of the probes replace the addresses.
    out += struct.pack("<II", 0, 0)
    names = _text(folder / "saved_cmdlines")
    out += struct.pack("<Q", len(names)) + names
    out += struct.pack("<I", len(cpus)) + b"options  \0"
    out += _option(_TRACECLOCK, _text(folder / "trace_clock") + b"\0")
    out += _option(_UNAME, uname.encode() + b"\0") + _option(_VERSION, version.encode() + b"\0")
    for path in cpus:
        stats = f"CPU: {path.name[3:]}\n".encode() + _text(path / "stats")
        out += _option(_CPUSTAT, stats + b"\0")
    return bytes(out + struct.pack("<H", 0) + b"flyrecord\0")


def _option(number: int, data: bytes) -> bytes:
    return struct.pack("<HI", number, len(data)) + data


def _sized(path: Path) -> bytes:
    text = _text(path)
    return struct.pack("<Q", len(text)) + text


def _text(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _rounded(at: int, page: int) -> int:
    return (at + page - 1) // page * page


def _append(source: Path, target: int, size: int) -> None:
    """Append a file with sendfile(2)."""
    fd = os.open(source, os.O_RDONLY)
    try:
        at = 0
        while at < size:
            done = os.sendfile(target, fd, at, size - at)
            if not done:
                raise OSError(5, "a file of pages became shorter")
            at += done
    finally:
        os.close(fd)


@dataclass(slots=True)
class VmObserver:
    """VMs that ran during the recording, by pid: vCPU numbers and thread names."""

    vms: dict[int, dict[str, Any]] = field(default_factory=dict)

    def observe(self, proc: Path = Path("/proc")) -> None:
        """Add every process that has vCPUs now, with its threads."""
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
