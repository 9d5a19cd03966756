"""The program, run in this process as a shell would run it."""

from __future__ import annotations

import io
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tdxtrace.cli import main

SAMPLES = Path(__file__).parents[2] / "sample_traces"
SAMPLE_FILES = sorted(path for path in SAMPLES.iterdir() if ".txt" in path.name)
# What no terminal may get from a file: it would move the cursor, or colour what follows.
ESC = "\x1b"


@dataclass(frozen=True, slots=True)
class Done:
    """What a run left behind."""

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
    """Standard output that is no terminal."""

    def __init__(self, data: bytes = b"") -> None:
        self.bytes = io.BytesIO(data)
        super().__init__(self.bytes, "utf-8", write_through=True)


def tdxtrace(*words: str | Path, stdin: bytes = b"", columns: int = 80, height: int = 24) -> Done:
    """Run ``tdxtrace`` with these words.

    Args:
        words: What stands behind the program's name.
        stdin: What it reads from standard input.
        columns: Width of the terminal, as the shell tells.
        height: Its height.
    """
    out, err = _Pipe(), _Pipe()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["tdxtrace", *map(str, words)])
        for name, stream in (("stdout", out), ("stderr", err), ("stdin", _Pipe(stdin))):
            patch.setattr(sys, name, stream)
        patch.setenv("COLUMNS", str(columns))
        patch.setenv("LINES", str(height))
        for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
            patch.delenv(name, raising=False)
        with pytest.raises(SystemExit) as left:
            main()
    code = left.value.code
    status = code if isinstance(code, int) else 0 if code is None else 1
    return Done(status, out.bytes.getvalue(), err.bytes.getvalue().decode())


def answered(*words: str | Path, stdin: bytes = b"", columns: int = 80, height: int = 24) -> Done:
    """Run it and see that it answered, without a word on standard error."""
    done = tdxtrace(*words, stdin=stdin, columns=columns, height=height)
    assert (done.status, done.stderr) == (0, "")
    return done


def refused(status: int, *words: str | Path, stdin: bytes = b"") -> str:
    """Run it and see that it refused, in one clear line on standard error and no other."""
    done = tdxtrace(*words, stdin=stdin)
    assert done.status == status, done.stderr
    assert done.stdout == b""
    (line,) = done.stderr.splitlines()
    assert done.stderr.endswith("\n")
    assert line.startswith("tdxtrace: ")
    assert line.isprintable()
    assert "Traceback" not in line
    return line.removeprefix("tdxtrace: ")
