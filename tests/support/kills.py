"""Writing commands that are ended at some moment, and checks of their inputs and outputs."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import polars as pl
from support.running import SAMPLES

import tdxtrace

TRACE: Final = "contended.txt"
SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL)
_TEMPORARY: Final = ".tdxtrace-"
_LONGEST_S: Final = 600.0


@dataclass(frozen=True, slots=True)
class Writer:
    """A command that writes ``out``, and how to see whether that is whole."""

    words: tuple[str, ...]
    is_whole: Callable[[Path, Path], bool]
    """Whether an output is as whole as that of a run that nobody ended."""


def _same_bytes(out: Path, reference: Path) -> bool:
    return out.read_bytes() == reference.read_bytes()


def _ends(ending: bytes) -> Callable[[Path, Path], bool]:
    return lambda out, _: out.read_bytes().rstrip().endswith(ending)


def _same_size(out: Path, reference: Path) -> bool:
    return out.stat().st_size == reference.stat().st_size


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _store(out: Path, reference: Path) -> bool:
    tdxtrace.read_trace(out).check()
    return _names(out) == _names(reference)


def _tables(out: Path, reference: Path) -> bool:
    for path in out.glob("*.parquet"):
        pl.read_parquet(path)
    return _names(out) == _names(reference)


def _pictures(out: Path, reference: Path) -> bool:
    ends = all(path.read_bytes().endswith(b"IEND\xaeB`\x82") for path in out.iterdir())
    return ends and _names(out) == _names(reference)


def _truth(out: Path, reference: Path) -> bool:
    return _names(out) == _names(reference) and all(
        _same_bytes(path, reference / path.name) for path in out.iterdir()
    )


WRITERS: Final[dict[str, Writer]] = {
    "convert": Writer(("convert", TRACE, "-q", "-o", "out", "--force"), _store),
    "a part": Writer(("convert", TRACE, "-q", "-o", "out", "--force", "--until", "+1"), _store),
    "tables": Writer(("analyze", TRACE, "-q", "-o", "out"), _tables),
    "rows": Writer(("events", TRACE, "--format", "csv", "-q", "-o", "out", "--force"), _same_bytes),
    "page": Writer(
        ("report", TRACE, "--format", "html", "-q", "-o", "out", "--force"), _ends(b"</html>")
    ),
    "mail": Writer(("report", TRACE, "--brief", "-q", "-o", "out", "--force"), _same_bytes),
    "pictures": Writer(
        ("report", TRACE, "-q", "-o", "page.html", "--png", "out", "--force"), _pictures
    ),
    "comparison": Writer(
        ("compare", TRACE, TRACE, "--format", "md", "-q", "-o", "out", "--force"), _same_bytes
    ),
    "Perfetto": Writer(("export", TRACE, "-q", "--perfetto", "out", "--force"), _same_size),
    "notebook": Writer(("notebook", TRACE, "-q", "-o", "out", "--force"), _same_bytes),
    "simulated": Writer(
        ("simulate", "quiet", "--seed", "3", "-q", "-o", "out", "--force"), _same_bytes
    ),
    "truth": Writer(
        ("simulate", "quiet", "--seed", "3", "-q", "-o", "trace", "--truth", "out", "--force"),
        _truth,
    ),
}


def _start(name: str, room: Path) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-m", "tdxtrace", *WRITERS[name].words]
    environment = os.environ | {"TMPDIR": str(room), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        words, cwd=room, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def prepared(room: Path) -> Path:
    """Put the input into a folder, and return it."""
    shutil.copy(SAMPLES / TRACE, room / TRACE)
    return room


def reference(name: str, room: Path) -> tuple[Path, float]:
    """Let a command end by itself; return its output, and the seconds that it took."""
    begin = time.monotonic()
    with _start(name, prepared(room)) as process:
        _, said = process.communicate(timeout=_LONGEST_S)
    assert process.returncode == 0, said
    return room / "out", time.monotonic() - begin


def end_one(name: str, room: Path, whole: Path, number: signal.Signals, after_s: float) -> str:
    """End a command after some time; assert that nothing is half written or lost.

    Args:
        name: The command, of WRITERS.
        room: Its folder, ``prepared``; what is in it stays between calls.
        whole: The output of a command that nobody ended.
        number: The signal.
        after_s: When it is sent.

    Returns:
        What there is then: ``nothing``, or the ``whole`` output, of this or an earlier call.
    """
    with _start(name, room) as process:
        try:
            process.wait(after_s)
        except subprocess.TimeoutExpired:
            process.send_signal(number)
        _, said = process.communicate(timeout=_LONGEST_S)
    assert process.returncode in (0, 128 + number, -number), said
    assert b"Traceback" not in said, said
    assert (room / TRACE).read_bytes() == (SAMPLES / TRACE).read_bytes()
    left = [path for path in room.rglob("*") if _TEMPORARY in path.name or "-store-" in path.name]
    if number is signal.SIGKILL:
        for path in left:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    else:
        assert not left, (process.returncode, said)
    out = room / "out"
    if not out.exists():
        return "nothing"
    assert WRITERS[name].is_whole(out, whole), _names(out) if out.is_dir() else out.stat()
    return "whole"
