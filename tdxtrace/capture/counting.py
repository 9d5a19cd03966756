"""Run the script that counts requests in the kernel with bpftrace, and keep its output."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Final

from tdxtrace.capture.choose import seconds_of
from tdxtrace.capture.histogram import MAX_KEYS
from tdxtrace.errors import InputError
from tdxtrace.tables.text import one_line

# How long bpftrace may take to print its maps and detach; a choice.
_END_S: Final = 60


def count_requests(
    script: str,
    output: Path,
    duration: str | None,
    command: Sequence[str],
    *,
    force: bool = False,
) -> None:
    """Count until the duration has passed, the command ends, or Ctrl-C is pressed.

    Args:
        script: Output of ``capture plan --dialect histogram``.
        output: File for the counts; it is renamed to this path when complete.
        duration: Duration such as 10s; None: until interrupted.
        command: Program to run meanwhile, if any, without a shell.
        force: Whether ``output`` may be overwritten.

    Raises:
        InputError: If bpftrace is not installed or fails, or the output cannot be written.
        QueryError: If the duration cannot be parsed.
    """
    seconds = None if duration is None else seconds_of(duration)
    tool = shutil.which("bpftrace")
    if tool is None:
        raise InputError(
            "bpftrace is not installed; capture plan --dialect histogram prints the "
            "script, to run it elsewhere"
        )
    if output.exists() and not force:
        raise InputError(f"{one_line(str(output), 80)} exists; --force overwrites it")
    try:
        with tempfile.TemporaryDirectory(prefix=".histogram-", dir=output.parent) as folder:
            made, source = Path(folder) / "counts.json", Path(folder) / "script.bt"
            source.write_text(script, encoding="utf-8")
            words = [tool, "-q", "-f", "json", "-o", str(made)]
            # bpftrace splits the command at blanks and runs it.
            words += ["-c", " ".join(command)] if command else []
            _run([*words, str(source)], seconds)
            made.replace(output)
    except OSError as error:
        raise InputError(f"cannot write {one_line(str(output), 80)}: {error.strerror}") from None


def _run(words: list[str], seconds: float | None) -> None:
    """Run bpftrace, and send it SIGINT after ``seconds`` or at Ctrl-C.

    Raises:
        InputError: If it fails; the message contains its first error.
    """
    keys = {"BPFTRACE_MAP_KEYS_MAX": str(MAX_KEYS)}
    with tempfile.TemporaryFile() as stderr:
        # In its own process group, so that Ctrl-C does not reach it directly as well.
        run = subprocess.Popen(
            words, stdout=subprocess.DEVNULL, stderr=stderr, env=os.environ | keys, process_group=0
        )
        try:
            run.wait(seconds)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            run.send_signal(signal.SIGINT)
        try:
            run.wait(_END_S)
        except subprocess.TimeoutExpired:
            run.kill()
            run.wait()
            raise InputError(f"bpftrace did not end within {_END_S} s; nothing was kept") from None
        if run.returncode:
            raise InputError(f"bpftrace failed: {_first_error(stderr)}")


def _first_error(stderr: IO[bytes]) -> str:
    """Return the first error, except for the one about RLIMIT_MEMLOCK, which is a warning."""
    stderr.seek(0)
    lines = stderr.read().decode("utf-8", "replace").splitlines()
    errors = [line for line in lines if "ERROR" in line and "RLIMIT_MEMLOCK" not in line]
    return one_line((errors or lines or ["it gave no reason"])[0], 160)
