"""Runs of the command-line program within this process."""

from __future__ import annotations

import io
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tdxtrace.cli import main

SAMPLES = Path(__file__).parents[2] / "sample_traces"
SAMPLE_FILES = sorted(path for path in SAMPLES.iterdir() if ".txt" in path.name)
# Escape character, which must never reach a terminal from a file.
ESC = "\x1b"


@dataclass(frozen=True, slots=True)
class Done:
    """Exit status and output of a run."""

    status: int
    stdout: bytes
    stderr: str

    @property
    def text(self) -> str:
        """Standard output as text."""
        return self.stdout.decode()

    @property
    def lines(self) -> list[str]:
        """Its lines."""
        return self.text.splitlines()


class _Pipe(io.TextIOWrapper):
    """A standard stream that is not a terminal."""

    def __init__(self, data: bytes = b"") -> None:
        self.bytes = io.BytesIO(data)
        super().__init__(self.bytes, "utf-8", write_through=True)


class _Terminal(_Pipe):
    """A standard stream that is a terminal."""

    def isatty(self) -> bool:
        return True


@contextmanager
def _handlers_kept() -> Iterator[None]:
    """Leave the handlers of signals as they were: the program's are for a process of its own."""
    numbers = signal.SIGTERM, signal.SIGHUP
    before = [signal.getsignal(number) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def tdxtrace(
    *words: str | Path, stdin: bytes = b"", columns: int | None = None, height: int = 24
) -> Done:
    """Run ``tdxtrace`` with these arguments.

    Args:
        words: The arguments.
        stdin: Contents of standard input.
        columns: Width of the terminal (COLUMNS), which shows no colours; None: a pipe.
        height: Height of the terminal (LINES).
    """
    out, err = _Pipe() if columns is None else _Terminal(), _Pipe()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["tdxtrace", *map(str, words)])
        for name, stream in (("stdout", out), ("stderr", err), ("stdin", _Pipe(stdin))):
            patch.setattr(sys, name, stream)
        patch.setenv("COLUMNS", str(columns or 80))
        patch.setenv("LINES", str(height))
        patch.setenv("NO_COLOR", "1")
        for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
            patch.delenv(name, raising=False)
        with _handlers_kept(), pytest.raises(SystemExit) as left:
            main()
    code = left.value.code
    status = code if isinstance(code, int) else 0 if code is None else 1
    return Done(status, out.bytes.getvalue(), err.bytes.getvalue().decode())


def answered(
    *words: str | Path, stdin: bytes = b"", columns: int | None = None, height: int = 24
) -> Done:
    """Run it; assert status 0 and an empty standard error."""
    done = tdxtrace(*words, stdin=stdin, columns=columns, height=height)
    assert (done.status, done.stderr) == (0, "")
    return done


def refused(status: int, *words: str | Path, stdin: bytes = b"") -> str:
    """Run it; assert the status, no output, and one line on standard error, which is returned."""
    done = tdxtrace(*words, stdin=stdin)
    assert done.status == status, done.stderr
    assert done.stdout == b""
    (line,) = done.stderr.splitlines()
    assert done.stderr.endswith("\n")
    assert line.startswith("tdxtrace: ")
    assert line.isprintable()
    assert "Traceback" not in line
    return line.removeprefix("tdxtrace: ")
