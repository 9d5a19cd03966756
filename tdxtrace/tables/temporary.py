"""Temporary folders on disk, for tables that do not fit in memory.

A folder goes away with the object that holds it, at the end of the process, at SIGTERM and at
SIGHUP.  What a process left that was killed is removed when the next one makes a folder.
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
    """A folder for this process alone, named by its number and start time.

    Its file ``owner`` is locked (flock) as long as the process lives, which other containers that
    share the disk see too, though they do not see the process.

    Args:
        parent: Where to make it: TMPDIR where that is set, else /var/tmp, which is on a disk where
            /tmp may be in memory (file-hierarchy(7)).

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
            # It gets the name by which others look for it once it is locked.
            own = f"tdxtrace-store-{pid}-{_start_time(pid)}-{made.name.rpartition('-')[2]}"
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
    """Return where temporary folders are made."""
    told = os.environ.get("TMPDIR")
    if told:
        return Path(told)
    usual = Path("/var/tmp")
    return usual if os.access(usual, os.W_OK | os.X_OK) else Path(tempfile.gettempdir())


def remove_abandoned(parent: Path) -> None:
    """Remove folders of this user whose process has ended."""
    for path in _folders_in(parent):
        with suppress(OSError):
            if _is_abandoned(path):
                shutil.rmtree(path, ignore_errors=True)


def _folders_in(parent: Path) -> Iterator[Path]:
    with suppress(OSError), os.scandir(parent) as entries:
        yield from (Path(entry.path) for entry in entries if _NAME.match(entry.name))


def _is_abandoned(path: Path) -> bool:
    """Whether a folder is of this user, its process is gone, and nobody holds its lock."""
    facts, found = path.lstat(), _NAME.match(path.name)
    if found is None or not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.geteuid():
        return False
    if _start_time(int(found["pid"])) == int(found["start"]):
        return False
    lock = os.open(path / _LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(lock)
    return True


def _start_time(pid: int) -> int:
    """When a process started, in ticks since the system did; 0: there is no such process.

    Sources:
        proc_pid_stat(5), starttime, the 22nd field; the second is in brackets and may hold any
        characters.
    """
    try:
        facts = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace")
    except OSError:
        return 0
    return int(facts.rpartition(")")[2].split()[19])


def _remove(path: Path, lock: int, pid: int) -> None:
    """Remove a folder, unless this process is a copy (fork) of the one that made it."""
    if os.getpid() == pid:
        shutil.rmtree(path, ignore_errors=True)
        with suppress(OSError):
            os.close(lock)


def _end_with_signals() -> None:
    """Let signals that end the process remove its folders first, where nobody handles them."""
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
