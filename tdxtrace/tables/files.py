"""A file that appears under its name only when all of it is written."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from tdxtrace.errors import InputError
from tdxtrace.tables.text import one_line


@contextmanager
def whole_file(path: Path, force: bool) -> Iterator[IO[bytes]]:
    """Open a file that appears under its name only when all of it is written.

    Raises:
        InputError: If it exists and ``force`` is not given, or cannot be written.
    """
    shown = one_line(str(path))
    if path.exists() and not path.is_file() and not path.is_dir():
        # A pipe or a device (/dev/null) is written to, never replaced.
        with _opened(path) as file:
            yield file
        return
    if path.exists() and not force:
        raise InputError(f"{shown} exists; say --force to overwrite it")
    made: Path | None = None
    try:
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=".tdxtrace-", delete=False
        ) as file:
            made = Path(file.name)
            yield file
        made.chmod(0o666 & ~_umask())
        made.replace(path)
        made = None
    except OSError as error:
        raise InputError(f"cannot write {shown}: {error.strerror}") from None
    finally:
        if made is not None:
            made.unlink(missing_ok=True)


def _opened(path: Path) -> IO[bytes]:
    try:
        return path.open("wb")
    except OSError as error:
        raise InputError(f"cannot write {one_line(str(path))}: {error.strerror}") from None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
