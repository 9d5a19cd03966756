"""What a host says of itself: its small files, read without changing anything."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

# Where tracefs is mounted by default, and where older systems have it.  Linux
# Documentation/trace/ftrace.rst, "The File System".
TRACEFS: Final = "sys/kernel/tracing"
_OLD_TRACEFS: Final = "sys/kernel/debug/tracing"
# A file of /proc or tracefs that is read whole; kallsyms is the longest (some 15 MB).
_MAX_BYTES: Final = 64 << 20
_WHY: Final = {
    errno.ENOENT: "missing",
    errno.ENOTDIR: "missing",
    errno.EACCES: "not permitted",
    errno.EPERM: "not permitted",
}


@dataclass(frozen=True, slots=True)
class Reading:
    """What a file said, or why it said nothing."""

    text: str | None
    why: str = ""
    """``missing``, ``not permitted`` or the kernel's words; "" if it was read."""

    @property
    def line(self) -> str:
        """Its first line; "" if there is none."""
        return (self.text or "").strip().partition("\n")[0].strip()


@dataclass(frozen=True, slots=True)
class Host:
    """A machine as seen through its files; ``root`` may be a copy of them."""

    root: Path = Path("/")
    tracefs_at: Path | None = None
    """Where tracefs is, if the user says so."""

    def read(self, path: str | Path) -> Reading:
        """Read a file named from the root, without its leading slash."""
        return read(self.root / path)

    def exists(self, path: str | Path) -> bool:
        """Whether there is such a file, as far as may be seen."""
        try:
            return (self.root / path).exists()
        except OSError:
            return False

    def names(self, path: str | Path) -> list[str]:
        """The names in a folder, sorted; none where it cannot be read."""
        try:
            return sorted(os.listdir(self.root / path))  # noqa: PTH208 - names, not paths
        except OSError:
            return []

    @property
    def release(self) -> str:
        """The kernel's release, such as "6.18.44-foo"; "" if it is not to be had."""
        told = self.read("proc/sys/kernel/osrelease").line
        return told or (os.uname().release if self.root == Path("/") else "")

    @property
    def tracefs(self) -> Path | None:
        """Where tracefs is mounted; None if it is not, or may not be seen."""
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

    def traced(self, path: str) -> Reading:
        """Read a file of tracefs; ``missing`` where tracefs is not mounted."""
        where = self.tracefs
        return Reading(None, "missing") if where is None else read(where / path)


def read(path: Path) -> Reading:
    """Read a small file as text."""
    try:
        with path.open("rb") as file:
            return Reading(file.read(_MAX_BYTES).decode("utf-8", "replace"))
    except OSError as error:
        return Reading(None, _WHY.get(error.errno or 0, os.strerror(error.errno or 0)))


def may_write(path: Path) -> bool:
    """Whether this process may write a file, as the kernel's mode bits say."""
    try:
        return os.access(path, os.W_OK)
    except OSError:
        return False
