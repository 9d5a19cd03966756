"""How much memory this process can still take, and sizes as users write them."""

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
        QueryError: If it is none, or 0.

    Example:
        >>> parse_size("2.5G")
        2684354560
    """
    found = _SIZE.match(text.strip())
    n_bytes = int(float(found["number"]) * (1 << _UNITS[found["unit"].upper()])) if found else 0
    if not n_bytes:
        raise QueryError(f"not a size: '{one_line(text, 20)}'; write 800M or 2.5G")
    return n_bytes


def shown_size(n_bytes: int) -> str:
    """Return bytes as GiB, or as MiB below one.

    Example:
        >>> shown_size(2684354560)
        '2.5 GiB'
    """
    return f"{n_bytes / (1 << 30):.1f} GiB" if n_bytes >= 1 << 30 else f"{n_bytes >> 20} MiB"


def free_bytes(root: Path = Path("/")) -> int:
    """Return how many bytes this process can still take, by the strictest limit.

    Args:
        root: Where ``proc`` and ``sys`` are.

    Sources:
        MemAvailable: Linux Documentation/filesystems/proc.rst.  Limits of control groups, less
        what is used, page cache that can be given back not counted:
        Documentation/admin-guide/cgroup-v2.rst (memory.max, memory.current, memory.stat) and
        cgroup-v1/memory.rst.  RLIMIT_AS and RLIMIT_DATA: getrlimit(2), against VmSize and VmData.
    """
    limits = [*_available(root), *_of_cgroups(root), *_of_process(root)]
    return max(0, min(limits, default=1 << 62))


# Address space with which polars, numba and OpenBLAS load and run: they reserve far more than they
# use, and with less OpenBLAS asks for memory for ever (12 M events: 1.5 GB hangs, 1.7 GB fails in
# one line; python tests/bench/memory.py FILE --limit 1500M).
_LEAST_ADDRESS_SPACE: Final = 2 << 30


def check_address_space() -> None:
    """Check that the address space is not limited to less than libraries take to load.

    Raises:
        InputError: If it is.
    """
    soft = resource.getrlimit(resource.RLIMIT_AS)[0]
    if soft != resource.RLIM_INFINITY and soft < _LEAST_ADDRESS_SPACE:
        raise InputError(
            f"the address space is limited to {shown_size(soft)} (ulimit -v), and "
            f"{shown_size(_LEAST_ADDRESS_SPACE)} are needed; use a control group to limit memory"
        )


def give_back() -> None:
    """Return memory that was freed to the system, where the C library can (malloc_trim(3)).

    What a reader leaves in small pieces stays with the process else: 470 MiB of 12 M events.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _available(root: Path) -> Iterator[int]:
    found = re.search(r"^MemAvailable:\s*(\d+) kB", _text(root / "proc/meminfo"), re.MULTILINE)
    if found:
        yield int(found[1]) << 10


def _of_cgroups(root: Path) -> Iterator[int]:
    """What is left in the control groups of this process and in those around them."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        # In a container the path may be that of the host: its group is then the root.
        place = base / path.lstrip("/")
        for group in (place, *place.parents):
            limit, used = (_text(group / name).strip() for name in names)
            if limit.isdigit() and used.isdigit():
                yield int(limit) - int(used) + _reclaimable(_text(group / "memory.stat"))
            if group == base:
                break


def _reclaimable(stat: str) -> int:
    found = re.search(r"^(?:total_)?inactive_file (\d+)$", stat, re.MULTILINE)
    return int(found[1]) if found else 0


def _of_process(root: Path) -> Iterator[int]:
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
