"""Fake hosts as folders: the files of /proc and /sys that describe a kernel's tracing."""

from __future__ import annotations

import struct
from pathlib import Path

from tdxtrace.capture.host import Host

WRAPPERS = (
    "tdh_mem_page_add",
    "tdh_mem_page_aug",
    "tdh_mem_sept_add",
    "tdh_mem_range_block",
    "tdh_mem_track",
    "tdh_mem_page_remove",
    "tdh_vp_enter",
    "__seamcall",
    "__seamcall_ret",
    "__seamcall_saved_ret",
)
README = """  dynamic_events\t\t- Create/append/remove/show the generic dynamic events
\t    f[:[<group>/][<event>]] <func-name>[%return] [<args>]
\t     kernel return probes support: $retval, $arg<N>, $comm
"""


def kallsyms(*names: str) -> str:
    """The text of /proc/kallsyms, with zero addresses as an unprivileged user sees it."""
    kernel = "".join(f"{0:016x} T {name}\n" for name in names)
    return f"{0:016x} D fixed_percpu_data\n{kernel}{0:016x} t tdx_vcpu_run\t[kvm_intel]\n"


def write(root: Path, files: dict[str, str]) -> None:
    """Write files below ``root``; a name that ends in a slash is a folder."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            path.mkdir(exist_ok=True)
        else:
            path.write_text(text)


def tdx_host(root: Path, release: str = "6.18.3-generic") -> Host:
    """A TDX host with all features for tracing."""
    tracefs = "sys/kernel/tracing"
    write(
        root,
        {
            "proc/sys/kernel/osrelease": release + "\n",
            "proc/self/status": "CapEff:\t000001ffffffffff\n",
            "proc/self/mounts": "tracefs /sys/kernel/tracing tracefs rw 0 0\n",
            "proc/cpuinfo": "flags\t\t: fpu tdx_host_platform vme\n",
            "proc/kallsyms": kallsyms(*WRAPPERS),
            "proc/meminfo": "MemTotal: 9 kB\nMemAvailable:   268435456 kB\n",
            "sys/kernel/security/lockdown": "none [integrity] confidentiality\n",
            "sys/module/kvm_intel/parameters/tdx": "Y\n",
            "sys/devices/faux/tdx_host/version": "1.5.06\n",
            "sys/kernel/debug/kprobes/enabled": "1\n",
            "sys/kernel/debug/kprobes/blacklist": "0x0-0x0\ttdh_vp_enter\n",
            f"{tracefs}/trace_clock": "[local] global mono boot\n",
            f"{tracefs}/README": README,
            f"{tracefs}/kprobe_events": "",
            f"{tracefs}/uprobe_events": "",
            f"{tracefs}/dynamic_events": "",
            f"{tracefs}/available_tracers": "function_graph function nop\n",
            f"{tracefs}/options/funcgraph-retval": "0\n",
            f"{tracefs}/buffer_size_kb": "7 (expanded: 1408)\n",
            f"{tracefs}/instances/": "",
            f"{tracefs}/per_cpu/cpu0/": "",
            f"{tracefs}/per_cpu/cpu1/": "",
            f"{tracefs}/events/kvm/kvm_entry/": "",
            f"{tracefs}/events/kvm/kvm_exit/": "",
        },
    )
    return Host(root)


def made(types: bytes, strings: bytes) -> bytes:
    """BTF data with these types and strings."""
    head = struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(types), len(types), len(strings))
    return head + types + strings


def structure(name: int, size: int, *members: tuple[int, int, int]) -> bytes:
    """BTF of a struct: its name, size in bytes, and (name, type, bit offset) of each member."""
    body = b"".join(struct.pack("<III", *member) for member in members)
    return struct.pack("<III", name, 4 << 24 | len(members), size) + body


def vcpu_types(folder: Path) -> Path:
    """Types of a kernel with KVM built in: vp_enter_ret at 256, exit_gpa at 128, vcpu_id at 64."""
    names = b"\0kvm_vcpu\0vcpu_id\0vcpu_tdx\0vp_enter_ret\0exit_gpa\0"
    at = {name: names.index(name + b"\0") for name in names.strip(b"\0").split(b"\0")}
    vcpu = structure(at[b"kvm_vcpu"], 100, (at[b"vcpu_id"], 0, 64 * 8))
    tdx = structure(
        at[b"vcpu_tdx"], 300, (at[b"exit_gpa"], 0, 128 * 8), (at[b"vp_enter_ret"], 0, 256 * 8)
    )
    path = folder / "vmlinux.btf"
    path.write_bytes(made(vcpu + tdx, names))
    return path
