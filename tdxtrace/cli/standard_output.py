"""Standard output that is written whole, or fails in one line."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, TextIO

from tdxtrace.errors import InputError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_STDOUT: Final = 1


class _Descriptor(io.FileIO):
    """Descriptor 1; what cannot be written is an error of the user's, not of the program."""

    def write(self, data: ReadableBuffer, /) -> int:
        """Write some of ``data``; BufferedWriter calls again for the rest.

        Raises:
            BrokenPipeError: If the reader closed the pipe.
            InputError: If nothing more can be written, as on a full disk.
        """
        try:
            return super().write(data)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise InputError(f"cannot write standard output: {error.strerror}") from None


class _Text(io.TextIOWrapper):
    """Text for descriptor 1, in the encoding of the terminal."""

    def write(self, text: str, /) -> int:
        """Write ``text``.

        Raises:
            InputError: If the encoding lacks one of its characters.
        """
        try:
            return super().write(text)
        except UnicodeEncodeError as error:
            lacking = ascii(error.object[error.start])
            raise InputError(
                f"the encoding {self.encoding} of standard output has no {lacking}; "
                "set PYTHONIOENCODING=utf-8"
            ) from None


@contextmanager
def whole_output() -> Iterator[None]:
    """Replace ``sys.stdout`` while a command runs, and flush it at the end.

    With PYTHONUNBUFFERED, Python's own standard output drops the rest where the system wrote a
    part of a block; without, it reports a full disk when the status is decided already.

    Raises:
        BrokenPipeError: If the reader closed the pipe.
        InputError: If standard output cannot be written whole.
    """
    if sys.stdout is None:
        # Closed (>&-): the next file that is opened would take its number.
        os.dup2(os.open(os.devnull, os.O_RDONLY), _STDOUT)
        sys.stdout = _text("utf-8", "strict", by_line=False)
    elif _is_descriptor(sys.stdout):
        own = sys.stdout
        own.flush()
        by_line = own.isatty() or getattr(own, "write_through", False)
        sys.stdout = _text(own.encoding, own.errors, by_line=by_line)
    try:
        yield
    finally:
        sys.stdout.flush()


def abandon_output() -> None:
    """Send what is still buffered nowhere, so that the end of the process reports no error."""
    if isinstance(sys.stdout, _Text):
        os.dup2(os.open(os.devnull, os.O_WRONLY), _STDOUT)


def _text(encoding: str, errors: str | None, *, by_line: bool) -> _Text:
    buffer = io.BufferedWriter(_Descriptor(_STDOUT, "w", closefd=False))
    return _Text(buffer, encoding, errors, line_buffering=by_line)


def _is_descriptor(stream: TextIO) -> bool:
    try:
        return stream.fileno() == _STDOUT
    except OSError:
        return False
