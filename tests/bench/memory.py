"""Measure the peak memory of commands, each in its own process.

    python tests/bench/memory.py FILE [--events 12000000] [--limit 4G]

One line per question: seconds, peak memory in MiB, and bytes for each event. With --limit the
address space is limited as by `ulimit -v`: each question must give an answer or one clear line.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time

from tdxtrace.tables.memory import parse_size

_QUESTIONS = (
    "analyze log",
    "busy-causes",
    "verdicts",
    "attempts",
    "policies",
    "recommend",
    "report",
)
_MAIN = "from tdxtrace.cli.main import main; main()"


def main() -> None:
    """Ask each question."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file")
    parser.add_argument("--events", type=int, default=12_000_000)
    parser.add_argument("--limit", help="address space, as 4G")
    parser.add_argument("--only", action="append", default=[], help="a question; may be repeated")
    options = parser.parse_args()
    limit = parse_size(options.limit) if options.limit else None
    for question in options.only or _QUESTIONS:
        words = [sys.executable, "-c", _MAIN, *question.split(), options.file, "--quiet"]
        began = time.monotonic()
        if limit:
            words = ["sh", "-c", 'ulimit -v "$0" && exec "$@"', str(limit >> 10), *words]
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        said = process.stderr.read().decode() if process.stderr else ""
        _, status, used = os.wait4(process.pid, 0)
        peak = used.ru_maxrss << 10
        print(
            f"{question:12} {time.monotonic() - began:7.1f} s {peak >> 20:6} MiB "
            f"{peak // options.events:5} bytes an event, status {os.waitstatus_to_exitcode(status)}"
            f"{': ' + said.strip()[-300:] if said.strip() else ''}",
            flush=True,
        )


if __name__ == "__main__":
    main()
