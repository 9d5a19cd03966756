"""Failed output is one line and exit status 1, and leaves no file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.running import SAMPLES

_TRACE = str(SAMPLES / "zerostep.txt")
# Each prints by another path: through rich, and as text.
_PATHS = [("decode", "0x8000020000000092"), ("--help",)]
# Bytes that a file may have at most: less than a pipe or a buffer holds of each output.
_FILE_SIZE = 10_000


def run(
    words: tuple[str, ...], unbuffered: str = "", limit: int | None = None, **given: object
) -> subprocess.CompletedProcess[str]:
    """Run the program in a process; its files may have ``limit`` bytes."""
    code = (
        "import resource, sys\n"
        f"limit = {limit}\n"
        "if limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))\n"
        "from tdxtrace.cli import main\nmain()\n"
    )
    return subprocess.run(  # type: ignore[call-overload, no-any-return]
        [sys.executable, "-c", code, *words],
        env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
        **given,
    )


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    """What a run that failed said: one line, of the program."""
    assert done.returncode == 1, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("tdxtrace: ")
    return line.removeprefix("tdxtrace: ")


@pytest.mark.parametrize("words", _PATHS, ids=lambda words: words[0].strip("-"))
@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
def test_a_full_disk_is_one_line(words: tuple[str, ...], unbuffered: str) -> None:
    with Path("/dev/full").open("w") as full:
        said = one_line(run(words, unbuffered, stdout=full))
    assert said == "cannot write standard output: No space left on device"


def test_a_file_that_takes_a_part_of_a_block_is_one_line(tmp_path: Path) -> None:
    words = ("events", _TRACE, "--format", "csv")
    with (tmp_path / "out").open("w") as file:
        said = one_line(run(words, "1", _FILE_SIZE, stdout=file))
    assert said == "cannot write standard output: File too large"
    assert (tmp_path / "out").stat().st_size == _FILE_SIZE


@pytest.mark.parametrize(
    "words",
    [
        ("events", _TRACE, "--format", "parquet", "-o"),
        ("simulate", "quiet", "--duration", "5ms", "-o"),
        ("export", _TRACE, "--perfetto"),
        ("convert", _TRACE, "-o"),
    ],
    ids=lambda words: words[0],
)
def test_no_part_of_a_file_keeps_its_name(words: tuple[str, ...], tmp_path: Path) -> None:
    said = one_line(run((*words, str(tmp_path / "out")), "", _FILE_SIZE))
    assert said.startswith("cannot write ")
    assert said.endswith("File too large")
    assert not list(tmp_path.iterdir())


def test_a_device_that_is_full_is_one_line() -> None:
    said = one_line(run(("report", _TRACE, "-o", "/dev/full", "--format", "md")))
    assert said == "cannot write /dev/full: No space left on device"


def test_an_encoding_without_a_character_is_one_line(tmp_path: Path) -> None:
    trace = tmp_path / "é→.txt"
    trace.write_bytes((SAMPLES / "contended.txt").read_bytes()[:20_000])
    done = subprocess.run(
        [sys.executable, "-m", "tdxtrace", "analyze", str(trace)],
        env=os.environ | {"PYTHONIOENCODING": "latin-1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert one_line(done) == (
        "the encoding iso8859-1 of standard output has no '\\u2192'; set PYTHONIOENCODING=utf-8"
    )


def test_a_closed_standard_output_is_one_line() -> None:
    words = [sys.executable, "-m", "tdxtrace", "--version"]
    shell = ["sh", "-c", 'exec "$@" >&-', "sh", *words]
    done = subprocess.run(shell, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert one_line(done) == "cannot write standard output: Bad file descriptor"
