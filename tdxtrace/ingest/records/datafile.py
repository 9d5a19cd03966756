"""The bytes of a recording at any place: of a file, or of what a pipe or a codec gives."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tdxtrace.errors import InputError
from tdxtrace.tables.text import one_line

Bytes = NDArray[np.uint8]

# xz packs trace data 50 times, zeros 7,000 times: beyond this ratio and size it is
# no recording but a bomb.
_MAX_RATIO: Final = 1000
_FREE_BYTES: Final = 256 << 20


@dataclass(slots=True)
class DataFile:
    """A recording that can be read from at any place."""

    descriptor: int
    size: int
    shown: str
    """Its name, safe to show."""

    def read(self, at: int, n_bytes: int) -> bytes:
        """Return up to ``n_bytes`` bytes from ``at``: fewer where the file ends before.

        Raises:
            InputError: If the system cannot read it.
        """
        wanted = max(0, min(n_bytes, self.size - at)) if at >= 0 else 0
        parts: list[bytes] = []
        while wanted:
            part = self._pread(wanted, at)
            if not part:
                break
            parts.append(part)
            wanted -= len(part)
            at += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def array(self, at: int, n_bytes: int) -> Bytes:
        """The same as an array of bytes that may be written."""
        wanted = max(0, min(n_bytes, self.size - at)) if at >= 0 else 0
        made = np.empty(wanted, np.uint8)
        return made[: self.fill(at, made)]

    def fill(self, at: int, into: Bytes) -> int:
        """Read bytes from ``at`` into an array; return how many: fewer where the file ends."""
        done = 0
        wanted = max(0, min(len(into), self.size - at)) if at >= 0 else 0
        while done < wanted:
            n = self._preadv(into.data[done:wanted], at + done)
            if not n:
                break
            done += n
        return done

    def _pread(self, n_bytes: int, at: int) -> bytes:
        try:
            return os.pread(self.descriptor, n_bytes, at)
        except OSError as error:
            raise InputError(f"cannot read {self.shown}: {error.strerror}") from None

    def _preadv(self, into: memoryview, at: int) -> int:
        try:
            return os.preadv(self.descriptor, [into], at)
        except OSError as error:
            raise InputError(f"cannot read {self.shown}: {error.strerror}") from None

    def close(self) -> None:
        """Close the file."""
        os.close(self.descriptor)


def open_file(path: str) -> DataFile:
    """Open a plain file.

    Raises:
        InputError: If it cannot be opened.
    """
    shown = one_line(path)
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"cannot read {shown}: {error.strerror}") from None
    return DataFile(descriptor, os.fstat(descriptor).st_size, shown)


def spool(chunks: Iterator[bytes], path: str, stored_size: int | None) -> DataFile:
    """Keep what a pipe or a codec gives in a temporary file without a name.

    Args:
        chunks: The bytes, in order.
        path: Where they come from.
        stored_size: Bytes of the input before it is unpacked, if known.

    Raises:
        InputError: If they unpack to absurdly many, or there is no room for them.
    """
    shown = one_line(path)
    bound = None if stored_size is None else _FREE_BYTES + _MAX_RATIO * stored_size
    size = 0
    with tempfile.TemporaryFile(prefix="tdxtrace-") as file:
        try:
            for chunk in chunks:
                size += len(chunk)
                if bound is not None and size > bound:
                    raise InputError(f"{shown} unpacks to more than {_MAX_RATIO} times its size")
                file.write(chunk)
            file.flush()
        except OSError as error:
            raise InputError(f"cannot unpack {shown}: {error.strerror}") from None
        return DataFile(os.dup(file.fileno()), size, shown)
