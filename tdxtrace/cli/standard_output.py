"""Standard output that is written completely, or ends the command with one line of error."""

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
    """File descriptor 1, which raises write errors as InputError, not as OSError."""

    def write(self, data: ReadableBuffer, /) -> int:
        """Write some of ``data``; BufferedWriter calls again for the rest.

        Raises:
            BrokenPipeError: If the reader closed the pipe.
            InputError: If the write fails, for example on a full disk.
        """
        try:
            return super().write(data)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise InputError(f"cannot write standard output: {error.strerror}") from None


class _Text(io.TextIOWrapper):
    """Text stream on file descriptor 1."""

    def write(self, text: str, /) -> int:
        """Write ``text``.

        Raises:
            InputError: If the encoding lacks one of its characters.
        """
        try:
            return super().write(text)
        except UnicodeEncodeError as error:
            missing = ascii(error.object[error.start])
            raise InputError(
                f"the encoding {self.encoding} of standard output has no {missing}; "
                "set PYTHONIOENCODING=utf-8"
            ) from None


@contextmanager
def whole_output() -> Iterator[None]:
    """Replace ``sys.stdout`` while a command runs, and flush it at the end.

    With PYTHONUNBUFFERED, Python's own standard output drops the rest of a block after a partial
    write; without, it reports a full disk only after the exit status is decided.

    Raises:
        BrokenPipeError: If the reader closed the pipe.
        InputError: If standard output cannot be written completely.
    """
    if sys.stdout is None:
        # Descriptor 1 is closed (>&-): occupy it, or the next file that is opened would get it.
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
    """Discard buffered output, so that flushing at exit reports no error."""
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
