"""Read-only view of a host's files in /proc, /sys and tracefs, and checks on them."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

STATES: Final = ("ok", "limited", "missing", "unknown", "note")
# Default mount point of tracefs, and that of older systems.  Linux
# Documentation/trace/ftrace.rst, "The File System".
TRACEFS: Final = "sys/kernel/tracing"
_OLD_TRACEFS: Final = "sys/kernel/debug/tracing"
# Limit for files read whole; the longest is kallsyms (some 15 MB).
_MAX_BYTES: Final = 64 << 20
_WHY: Final = {
    errno.ENOENT: "missing",
    errno.ENOTDIR: "missing",
    errno.EACCES: "not permitted",
    errno.EPERM: "not permitted",
}


@dataclass(frozen=True, slots=True)
class Check:
    """Result of one check of the host."""

    name: str
    state: str
    """One of STATES; limited: present with restrictions, unknown: could not be determined, note:
    for information only."""
    found: str
    """Finding, in a few words."""
    lost: str = ""
    """Impact if the check fails: what cannot be recorded or answered."""
    remedy: str = ""
    """How to fix it."""


@dataclass(frozen=True, slots=True)
class FileContent:
    """Content of a file, or the reason it could not be read."""

    text: str | None
    why: str = ""
    """``missing``, ``not permitted`` or the kernel's error text; "" if it was read."""

    @property
    def line(self) -> str:
        """First line; "" if it is empty or was not read."""
        return (self.text or "").strip().partition("\n")[0].strip()


@dataclass(frozen=True, slots=True)
class Host:
    """Host whose files are below ``root``, which may be a copy."""

    root: Path = Path("/")
    tracefs_at: Path | None = None
    """tracefs mount point given by the user; None: look it up."""

    def read(self, path: str | Path) -> FileContent:
        """Read a file; ``path`` is relative to ``root``."""
        return read(self.root / path)

    def exists(self, path: str | Path) -> bool:
        """Return whether the file exists and is visible to this process."""
        try:
            return (self.root / path).exists()
        except OSError:
            return False

    def names(self, path: str | Path) -> list[str]:
        """Return the names in a directory, sorted; empty if it cannot be read."""
        try:
            return sorted(os.listdir(self.root / path))  # noqa: PTH208 - names, not paths
        except OSError:
            return []

    @property
    def release(self) -> str:
        """Kernel release, such as "6.18.44-foo"; "" if unknown."""
        facts = self.read("proc/sys/kernel/osrelease").line
        return facts or (os.uname().release if self.root == Path("/") else "")

    @property
    def tracefs(self) -> Path | None:
        """Tracefs mount point; None if not mounted or not visible."""
        if self.tracefs_at is not None:
            return self.tracefs_at
        mounted = [
            fields[1].replace("\\040", " ")
            for line in (self.read("proc/self/mounts").text or "").splitlines()
            if len(fields := line.split()) > 2 and fields[2] == "tracefs"
        ]
        for place in (*mounted, f"/{TRACEFS}", f"/{_OLD_TRACEFS}"):
            found = self.root / place.lstrip("/")
            try:
                if (found / "trace_clock").exists():
                    return found
            except OSError:
                continue
        return None

    def read_tracefs(self, path: str) -> FileContent:
        """Read a file of tracefs; ``missing`` if tracefs is not mounted."""
        tracefs = self.tracefs
        return FileContent(None, "missing") if tracefs is None else read(tracefs / path)


def read(path: Path) -> FileContent:
    """Read a small file as text."""
    try:
        with path.open("rb") as file:
            return FileContent(file.read(_MAX_BYTES).decode("utf-8", "replace"))
    except OSError as error:
        return FileContent(None, _WHY.get(error.errno or 0, os.strerror(error.errno or 0)))


def may_write(path: Path) -> bool:
    """Return whether access(2) permits this process to write a file."""
    try:
        return os.access(path, os.W_OK)
    except OSError:
        return False
