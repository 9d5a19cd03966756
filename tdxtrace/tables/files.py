"""Atomic writing of files and folders, and refusal to overwrite inputs."""

from __future__ import annotations

import os
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Final

from tdxtrace.errors import InputError
from tdxtrace.tables.text import one_line

# Linux include/uapi/linux/fcntl.h and fs.h: renameat2(2).
_AT_FDCWD: Final = -100
_RENAME_EXCHANGE: Final = 2

Id = tuple[int, int]
"""Device and inode of a file or folder."""
Inputs = Iterable[str | Path | None]
"""Files and folders that a command reads; ``-``: standard input, None: option not given."""


@contextmanager
def atomic_file(path: Path, *, force: bool, inputs: Inputs) -> Iterator[IO[bytes]]:
    """Open a temporary file that is renamed to ``path`` when it is complete.

    Args:
        path: The file; a pipe or a device is written to directly.
        force: Whether to replace an existing file.
        inputs: Inputs of the same command: see :func:`refuse_overwriting`.

    Raises:
        InputError: If it exists and ``force`` is not given, is an input, or cannot be written.
    """
    shown = one_line(str(path))
    if path.exists() and not path.is_file() and not path.is_dir():
        # A pipe or a device (/dev/null) is never replaced.
        try:
            with path.open("wb") as file:
                yield file
        except OSError as error:
            raise InputError(f"cannot write {shown}: {error.strerror}") from None
        return
    if path.exists() and not force:
        raise InputError(f"{shown} exists; use --force to overwrite")
    refuse_overwriting(path, inputs)
    temporary = _unused_name(path.parent)
    try:
        with temporary.open("xb") as file:
            yield file
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {shown}: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)


def _unused_name(folder: Path) -> Path:
    """Name for a temporary file; chosen before the file is made, so that it is always removed."""
    return folder / f".tdxtrace-{secrets.token_hex(8)}"


@contextmanager
def atomic_folder(folder: Path, *, force: bool, inputs: Inputs) -> Iterator[Path]:
    """Yield a temporary folder, whose files are moved into ``folder`` when all are complete.

    A new folder appears with all its files at once.  An existing folder keeps its other files; the
    new files are renamed into it one right after the other.

    Args:
        folder: The folder; it and missing parents are created.
        force: Whether to replace existing files.
        inputs: Inputs of the same command: see :func:`refuse_overwriting`.

    Raises:
        InputError: If a file exists and ``force`` is not given, is an input, or cannot be written.
    """
    shown, is_new = one_line(str(folder)), not os.path.lexists(folder)
    temporary = _unused_name(folder.parent if is_new else folder)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if is_new:
            temporary.rename(folder)
        else:
            _move_files(temporary, folder, force, inputs)
    except OSError as error:
        raise InputError(f"cannot write into {shown}: {error.strerror}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _move_files(temporary: Path, folder: Path, force: bool, inputs: Inputs) -> None:
    """Move files into a folder, after checking that each of them may be written.

    Raises:
        InputError: If one exists and ``force`` is not given, or is an input.
    """
    names = sorted(path.name for path in temporary.iterdir())
    for name in names:
        target = folder / name
        if target.exists() and not force:
            raise InputError(f"{one_line(str(target))} exists; use --force to overwrite")
        if target.is_dir():
            raise InputError(f"{one_line(str(target))} is a folder")
        refuse_overwriting(target, inputs)
    for name in names:
        (temporary / name).replace(folder / name)


def refuse_overwriting(target: Path, inputs: Inputs) -> None:
    """Raise an error if writing ``target`` would change an input of the same command.

    Files are compared by device and inode, so that links and other spellings of a path are
    recognised.

    Args:
        target: A file, or a folder that is replaced as a whole.
        inputs: Inputs of the command.

    Raises:
        InputError: If ``target`` is an input, exists within an input folder, or is a folder
            that contains an input.
    """
    target_id, *parent_ids = _ids(target)
    if target_id is None:
        return
    for name in inputs:
        if name is None:
            continue
        source = Path("/dev/stdin" if str(name) == "-" else name)
        # Replacing a folder also removes the links in it, so the folder of a link is compared too.
        source_id, *source_parent_ids = [*_ids(source), *_ids(source.parent)]
        if source_id is not None and (
            target_id in (source_id, *source_parent_ids) or source_id in parent_ids
        ):
            raise InputError(
                f"{one_line(str(target))} would overwrite the input {one_line(str(name))}; "
                "name another output"
            )


def _ids(path: Path) -> list[Id | None]:
    """Ids of the resolved path and of each parent folder; None: missing, a pipe or a device."""
    try:
        real = Path(os.path.realpath(path))
        return [_id(place) for place in (real, *real.parents)]
    except (OSError, ValueError):  # no working directory; a zero byte in the path
        return [None]


def _id(path: Path) -> Id | None:
    try:
        status = path.stat()
    except OSError:
        return None
    is_comparable = stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)
    return (status.st_dev, status.st_ino) if is_comparable else None


def rename_into_place(temporary: Path, target: Path) -> None:
    """Rename a file or folder to ``target``, then remove the old ``target``.

    ``target`` is the old or the new one at any time, also if the process is killed.  If the file
    system cannot exchange two names, ``target`` does not exist for a moment, while the old folder
    has the name of ``temporary`` with the suffix ``.old``.

    Args:
        temporary: The new file or folder, on the file system of ``target``.
        target: The new name.

    Raises:
        OSError: If it cannot be renamed; nothing was changed.
        InputError: If it was renamed, but the old one cannot be removed.
    """
    if not os.path.lexists(target) or not (temporary.is_dir() or target.is_dir()):
        temporary.replace(target)
        return
    if not _exchanged(temporary, target):
        old = temporary.with_name(temporary.name + ".old")
        target.rename(old)
        try:
            temporary.rename(target)
        except OSError:
            old.rename(target)
            raise
        old.rename(temporary)
    try:
        remove(temporary)
    except OSError as error:
        raise InputError(
            f"{one_line(str(target))} is written; the old one cannot be removed and is now "
            f"{one_line(str(temporary))}: {error.strerror}"
        ) from None


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with its contents.

    Raises:
        OSError: If it cannot be removed.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _exchanged(first: Path, second: Path) -> bool:
    """Exchange two names atomically; return whether the system supports it."""
    import ctypes  # noqa: PLC0415 - seldom needed

    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    names = os.fsencode(first), os.fsencode(second)
    return bool(rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0)
