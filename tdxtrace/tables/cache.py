"""Where converted traces are kept for the next time, and which one belongs to an input."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tdxtrace.tables.catalog import SCHEMA_VERSION

# Read from either end of a file to know it again: a recording is never changed in
# its middle alone without its time of change telling.
_BLOCK_BYTES: Final = 1 << 16


def cache_folder() -> Path:
    """Return the user's cache folder for tdxtrace.

    Sources:
        XDG Base Directory Specification: XDG_CACHE_HOME, else ~/.cache.
    """
    home = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(home) if home.startswith("/") else Path.home() / ".cache"
    return base / "tdxtrace"


def cached(paths: Sequence[str | Path], words: Sequence[object]) -> Path | None:
    """Return the folder in which these inputs, converted in this way, are or would be.

    A file is known by its path, size, time of change, first and last bytes.

    Args:
        paths: The inputs.
        words: Everything else that the conversion depends on.

    Returns:
        The folder; None if an input is no plain file and cannot be known again.
    """
    found = hashlib.sha256(repr((SCHEMA_VERSION, *words)).encode())
    for path in paths:
        known = _identity(Path(path))
        if known is None:
            return None
        found.update(known)
    return cache_folder() / found.hexdigest()[:32]


def _identity(path: Path) -> bytes | None:
    try:
        if not path.is_file():
            return None
        facts = path.stat()
        with path.open("rb") as file:
            first = file.read(_BLOCK_BYTES)
            file.seek(max(0, facts.st_size - _BLOCK_BYTES))
            last = file.read(_BLOCK_BYTES)
    except OSError:
        return None
    name = f"{path.resolve()}\0{facts.st_size}\0{facts.st_mtime_ns}\0".encode(
        "utf-8", "surrogateescape"
    )
    return hashlib.sha256(name + first + last).digest()
