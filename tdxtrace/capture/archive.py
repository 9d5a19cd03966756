"""Pack the recorder into one executable file: ``python -m tdxtrace.capture.archive``.

The file, ``tdxtrace-record.pyz``, contains the recorder and pyelftools; it is a zipapp (Python's
documentation, library/zipapp) and needs only Python 3.11 or later.
"""

from __future__ import annotations

import sys
import tempfile
import zipapp
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from shutil import copytree, ignore_patterns
from typing import BinaryIO, Final, cast

from tdxtrace.errors import InputError
from tdxtrace.tables.files import atomic_file
from tdxtrace.tables.text import one_line

# Modules that ``tdxtrace.capture.program`` imports, as paths below the package.
_PARTS: Final = (
    *("__init__.py", "errors.py", "capture"),
    *("tables/__init__.py", "tables/attempt_cells.py", "tables/files.py", "tables/text.py"),
    *("tables/temporary.py", "tables/times.py"),
    *("tdx/__init__.py", "tdx/facts.py", "tdx/firmware.py", "tdx/releases.py", "tdx/wrappers.py"),
    "tdx/data",
)
_NAME: Final = "tdxtrace-record.pyz"


def write_archive(target: Path, *, force: bool = False) -> int:
    """Write the recorder as one executable file; return its size in bytes.

    Args:
        target: The file.
        force: Whether to replace an existing one.

    Raises:
        InputError: If it exists and may not be replaced, or cannot be written.
    """
    with tempfile.TemporaryDirectory(prefix="tdxtrace-") as folder:
        root = Path(folder)
        _copy(Path(__file__).parents[1], root / "tdxtrace", _PARTS)
        elftools = find_spec("elftools")
        assert elftools is not None
        assert elftools.origin is not None
        _copy(Path(elftools.origin).parent, root / "elftools", (".",))
        with atomic_file(target, force=force, inputs=()) as file:
            zipapp.create_archive(
                root,
                cast("BinaryIO", file),
                interpreter="/usr/bin/env python3",
                main="tdxtrace.capture.program:main",
                compressed=True,
            )
    mode = target.stat().st_mode
    target.chmod(mode | (mode & 0o444) >> 2)
    return target.stat().st_size


def _copy(source: Path, target: Path, parts: Sequence[str]) -> None:
    for part in parts:
        if (source / part).is_dir():
            ignored = ignore_patterns("__pycache__")
            copytree(source / part, target / part, ignore=ignored, dirs_exist_ok=True)
        else:
            (target / part).parent.mkdir(parents=True, exist_ok=True)
            (target / part).write_bytes((source / part).read_bytes())


def main(words: Sequence[str]) -> int:
    """Write the archive to the path that the command line names; return the exit status."""
    if len(words) > 1 or any(word.startswith("-") for word in words):
        print(f"usage: python -m tdxtrace.capture.archive [{_NAME}]", file=sys.stderr)
        return 2
    target = Path(words[0] if words else _NAME)
    try:
        size = write_archive(target)
    except InputError as error:
        print(f"tdxtrace: {error}", file=sys.stderr)
        return 1
    print(
        f"wrote {one_line(str(target))}, {size / 1e6:.1f} MB; on the host: ./{target.name} doctor"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
