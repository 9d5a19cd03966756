"""Measure events per second of ``tdxtrace watch -``, and its memory over time.

    PYTHONPATH=tests python tests/bench/watch.py [EVENTS_PER_S [SECONDS]]

A recording of the sample folder is written again and again into its pipe, each time with later
stamps, at the pace asked for (0: as fast as it is read).  CPU is that of the watching process.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO

import numpy as np
from support.running import SAMPLES
from support.testbed import program

STAMP = re.compile(rb" (\d{5})\.(\d{6}): ")


class Source:
    """Lines whose stamps move on."""

    def __init__(self, path: Path) -> None:
        # Five digits of seconds, so that they have room to move on.
        text = re.sub(
            rb"^(.{16}-\d+ .*?) +(\d{1,5})(\.\d{6}: )",
            lambda found: found[1] + b" " + found[2].rjust(5, b"0") + found[3],
            path.read_bytes(),
            flags=re.MULTILINE,
        )
        found = list(STAMP.finditer(text))
        self.n = len(found)
        self.data = np.frombuffer(text, np.uint8).copy()
        self.at = np.array([match.start(1) for match in found])
        self.us = np.array([int(match[1] + match[2]) for match in found], np.int64)
        self.span = int(self.us[-1] - self.us[0]) + 1000

    def next(self) -> bytes:
        """The lines once more, later."""
        rest = self.us
        for place in (11, 10, 9, 8, 7, 6, 4, 3, 2, 1, 0):
            rest, digit = np.divmod(rest, 10)
            self.data[self.at + place] = digit + ord("0")
        self.us = self.us + self.span
        return self.data.tobytes()


def pour(source: Source, into: IO[bytes], rate: float, seconds: float) -> None:
    """Write at a pace until the time is over."""
    began, n = time.monotonic(), 0
    while time.monotonic() - began < seconds:
        into.write(source.next())
        n += source.n
        prefetch = n / rate - (time.monotonic() - began) if rate else 0
        if prefetch > 0:
            time.sleep(prefetch)
    into.close()


def main() -> None:
    """Measure and print."""
    rate = float(sys.argv[1]) if len(sys.argv) > 1 else 300_000
    seconds = float(sys.argv[2]) if len(sys.argv) > 2 else 600
    source = Source(SAMPLES / "contended.txt")
    process = subprocess.Popen(
        program("watch", "-", "--jsonl"), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    began, shown, result = time.monotonic(), 0.0, {}
    writer = threading.Thread(target=pour, args=(source, process.stdin, rate, seconds))
    writer.start()
    for line in process.stdout:
        result = json.loads(line)
        now = time.monotonic() - began
        if now - shown >= seconds / 20:
            shown = now
            print(f"{now:6.0f} s {result['events']:>12,} events {usage(process.pid)}", flush=True)
    _, _, used = os.wait4(process.pid, 0)
    process.returncode = 0
    cpu = used.ru_utime + used.ru_stime
    print(
        f"{result['events']:,} events in {time.monotonic() - began:.0f} s: {cpu:.1f} s of CPU, "
        f"{result['events'] / cpu:,.0f} events per second of CPU, {result['lost']} lost, "
        f"peak {used.ru_maxrss / 1024:.0f} MB"
    )


def usage(pid: int) -> str:
    """Memory and CPU of a process so far."""
    status = Path(f"/proc/{pid}/status").read_text()
    rss = re.search(r"^VmRSS:\s*(\d+) kB", status, re.MULTILINE)
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    ticks = int(fields[11]) + int(fields[12])
    return f"{int(rss[1]) / 1024 if rss else 0:6.0f} MB {ticks / 100:7.1f} s CPU"


if __name__ == "__main__":
    main()
