"""Memory that this process can still allocate, and parsing and printing of sizes."""

from __future__ import annotations

import ctypes
import re
import resource
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from tdxtrace.errors import InputError, QueryError
from tdxtrace.tables.text import one_line

_SIZE: Final = re.compile(r"^(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[KMGT]?)(?:i?B)?$", re.IGNORECASE)
_UNITS: Final = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}


def parse_size(text: str) -> int:
    """Return the bytes of a size such as 800M or 2.5G (powers of 1024).

    Raises:
        QueryError: If it is not a size, or 0.

    Example:
        >>> parse_size("2.5G")
        2684354560
    """
    found = _SIZE.match(text.strip())
    n_bytes = int(float(found["number"]) * (1 << _UNITS[found["unit"].upper()])) if found else 0
    if not n_bytes:
        raise QueryError(f"not a size: '{one_line(text, 20)}'; write 800M or 2.5G")
    return n_bytes


def format_size(n_bytes: int) -> str:
    """Return a number of bytes as text in GiB, or in MiB below 1 GiB.

    Example:
        >>> format_size(2684354560)
        '2.5 GiB'
    """
    return f"{n_bytes / (1 << 30):.1f} GiB" if n_bytes >= 1 << 30 else f"{n_bytes >> 20} MiB"


def free_bytes(root: Path = Path("/")) -> int:
    """Return the number of bytes that this process can still allocate, by the strictest limit.

    Args:
        root: Folder that contains ``proc`` and ``sys``.

    Sources:
        MemAvailable: Linux Documentation/filesystems/proc.rst.  Limits of control groups, less
        the memory used, in which reclaimable page cache is not counted:
        Documentation/admin-guide/cgroup-v2.rst (memory.max, memory.current, memory.stat) and
        cgroup-v1/memory.rst.  RLIMIT_AS and RLIMIT_DATA: getrlimit(2), against VmSize and VmData.
    """
    limits = [*_available(root), *_cgroup_limits(root), *_process_limits(root)]
    return max(0, min(limits, default=1 << 62))


# Address space that polars, numba and OpenBLAS need: they reserve far more than they use, and with
# less OpenBLAS retries allocations forever (12 M events: 1.5 GB hangs, 1.7 GB ends with an error;
# python tests/bench/memory.py FILE --limit 1500M).
_MIN_ADDRESS_SPACE: Final = 2 << 30


def check_address_space() -> None:
    """Check that the limit of the address space (RLIMIT_AS) allows the libraries to load.

    Raises:
        InputError: If it does not.
    """
    soft = resource.getrlimit(resource.RLIMIT_AS)[0]
    if soft != resource.RLIM_INFINITY and soft < _MIN_ADDRESS_SPACE:
        raise InputError(
            f"the address space is limited to {format_size(soft)} (ulimit -v), and "
            f"{format_size(_MIN_ADDRESS_SPACE)} are needed; use a control group to limit memory"
        )


def trim_heap() -> None:
    """Return freed heap memory to the system, where the C library has malloc_trim(3).

    Otherwise the small blocks that a reader freed stay with the process: 470 MiB for 12 M events.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _available(root: Path) -> Iterator[int]:
    found = re.search(r"^MemAvailable:\s*(\d+) kB", _text(root / "proc/meminfo"), re.MULTILINE)
    if found:
        yield int(found[1]) << 10


def _cgroup_limits(root: Path) -> Iterator[int]:
    """Yield the bytes left in each control group of this process and in each parent group."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        # In a container the path may be the host's; the container's group is then the root.
        group_path = base / path.lstrip("/")
        for group in (group_path, *group_path.parents):
            limit, used = (_text(group / name).strip() for name in names)
            if limit.isdigit() and used.isdigit():
                yield int(limit) - int(used) + _reclaimable(_text(group / "memory.stat"))
            if group == base:
                break


def _reclaimable(stat: str) -> int:
    found = re.search(r"^(?:total_)?inactive_file (\d+)$", stat, re.MULTILINE)
    return int(found[1]) if found else 0


def _process_limits(root: Path) -> Iterator[int]:
    status = _text(root / "proc/self/status")
    for limit, name in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        soft = resource.getrlimit(limit)[0]
        found = re.search(rf"^{name}:\s*(\d+) kB", status, re.MULTILINE)
        if soft != resource.RLIM_INFINITY and found:
            yield soft - (int(found[1]) << 10)


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace")
    except OSError:
        return ""
