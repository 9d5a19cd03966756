"""Temporary folders on disk, for tables that do not fit in memory.

A folder is removed with the object that owns it, at the end of the process, at SIGTERM and at
SIGHUP.  Folders of killed processes are removed when the next process makes a folder.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import signal
import stat
import tempfile
import threading
import weakref
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Final

from tdxtrace.errors import InputError
from tdxtrace.tables.text import one_line

_NAME: Final = re.compile(r"^tdxtrace-store-(?P<pid>\d+)-(?P<start>\d+)-")
_LOCK: Final = "owner"


class TemporaryFolder:
    """A folder for this process alone; its name contains the PID and start time of the process.

    Its file ``owner`` is locked (flock) while the process lives, so that processes in other
    containers on the same disk, which cannot see this process, do not remove the folder.

    Args:
        parent: Parent folder; default: TMPDIR if set, else /var/tmp, as /tmp may be in memory
            (file-hierarchy(7)).

    Raises:
        InputError: If it cannot be made.
    """

    def __init__(self, parent: Path | None = None) -> None:
        parent = parent or disk_folder()
        remove_abandoned(parent)
        pid = os.getpid()
        try:
            made = Path(tempfile.mkdtemp(prefix=".tdxtrace-", dir=parent))
            lock = os.open(made / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            fcntl.flock(lock, fcntl.LOCK_EX)
            # Other processes look for this name; the folder gets it when its lock is held.
            own = f"tdxtrace-store-{pid}-{start_time(pid)}-{made.name.rpartition('-')[2]}"
            self.path = made.rename(parent / own)
        except OSError as error:
            shown = one_line(str(parent))
            raise InputError(
                f"cannot write temporary tables in {shown}: {error.strerror}; set TMPDIR"
            ) from None
        _end_with_signals()
        self.remove = weakref.finalize(self, _remove, self.path, lock, pid)
        _FOLDERS.add(self)


_FOLDERS: Final[weakref.WeakSet[TemporaryFolder]] = weakref.WeakSet()


def disk_folder() -> Path:
    """Return the parent folder of temporary folders: TMPDIR, /var/tmp or Python's default."""
    configured = os.environ.get("TMPDIR")
    if configured:
        return Path(configured)
    usual = Path("/var/tmp")
    return usual if os.access(usual, os.W_OK | os.X_OK) else Path(tempfile.gettempdir())


def remove_abandoned(parent: Path) -> None:
    """Remove temporary folders of this user whose process has ended."""
    for path in _folders_in(parent):
        with suppress(OSError):
            if _is_abandoned(path):
                shutil.rmtree(path, ignore_errors=True)


def _folders_in(parent: Path) -> Iterator[Path]:
    with suppress(OSError), os.scandir(parent) as entries:
        yield from (Path(entry.path) for entry in entries if _NAME.match(entry.name))


def _is_abandoned(path: Path) -> bool:
    """Return whether a folder belongs to this user, its process ended, and its lock is free."""
    facts, found = path.lstat(), _NAME.match(path.name)
    if found is None or not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.geteuid():
        return False
    if start_time(int(found["pid"])) == int(found["start"]):
        return False
    lock = os.open(path / _LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(lock)
    return True


def start_time(pid: int) -> int:
    """Return the start time of a process in clock ticks since boot; 0: no such process.

    Sources:
        proc_pid_stat(5), starttime, the 22nd field; the second field is in parentheses and may
        contain any characters.
    """
    try:
        facts = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace")
    except OSError:
        return 0
    return int(facts.rpartition(")")[2].split()[19])


def _remove(path: Path, lock: int, pid: int) -> None:
    """Remove a folder, unless this process was forked from the one that made it."""
    if os.getpid() == pid:
        shutil.rmtree(path, ignore_errors=True)
        with suppress(OSError):
            os.close(lock)


def _end_with_signals() -> None:
    """Install handlers that remove the folders at SIGTERM and SIGHUP, unless handlers are set."""
    if threading.current_thread() is not threading.main_thread():
        return
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _end)


def _end(number: int, _frame: FrameType | None) -> None:
    for folder in list(_FOLDERS):
        folder.remove()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
