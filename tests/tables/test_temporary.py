"""Temporary folders are removed however a process ends, and never while it runs."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tdxtrace.errors import InputError
from tdxtrace.tables.temporary import TemporaryFolder, remove_abandoned

_MAKE = """
import sys, time
from pathlib import Path
from tdxtrace.tables.temporary import TemporaryFolder
folder = TemporaryFolder(Path(sys.argv[1]))
print(folder.path, flush=True)
time.sleep(60)
"""


@contextmanager
def _started(parent: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A process that has a temporary folder, and the folder."""
    words = [sys.executable, "-c", _MAKE, str(parent)]
    pipe, silent = subprocess.PIPE, subprocess.DEVNULL
    with subprocess.Popen(words, stdout=pipe, stderr=silent, text=True) as process:
        assert process.stdout is not None
        yield process, Path(process.stdout.readline().strip())
        process.kill()


def test_a_folder_is_removed_with_its_owner(tmp_path: Path) -> None:
    folder = TemporaryFolder(tmp_path)
    assert folder.path.stat().st_mode & 0o777 == 0o700
    del folder
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_folder_is_removed_by_a_signal_that_ends_the_process(
    number: signal.Signals, tmp_path: Path
) -> None:
    with _started(tmp_path) as (process, folder):
        assert folder.is_dir()
        process.send_signal(number)
        assert process.wait(60) == -number
    assert not list(tmp_path.iterdir())


def test_folders_of_killed_processes_are_removed_and_of_running_ones_kept(tmp_path: Path) -> None:
    with _started(tmp_path) as (_, folder):
        remove_abandoned(tmp_path)
        assert folder.is_dir()
    assert folder.is_dir()
    mine = TemporaryFolder(tmp_path)
    assert list(tmp_path.iterdir()) == [mine.path]


def test_a_folder_whose_lock_is_held_is_kept(tmp_path: Path) -> None:
    """Of another container, say, that shares the disk."""
    folder = tmp_path / "tdxtrace-store-1-999999999-abc"
    folder.mkdir()
    remove_abandoned(tmp_path)  # without a lock file it is not what this program makes
    lock = os.open(folder / "owner", os.O_CREAT | os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    remove_abandoned(tmp_path)
    assert folder.is_dir()
    os.close(lock)
    remove_abandoned(tmp_path)
    assert not folder.exists()


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "owner").touch()
    (tmp_path / "tdxtrace-store-1-999999999-abc").symlink_to(own)
    remove_abandoned(tmp_path)
    assert (own / "owner").exists()


def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"cannot write temporary tables in .*none: .*; set TMPDIR"
    ):
        TemporaryFolder(tmp_path / "none")
