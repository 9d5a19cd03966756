"""Measure time and memory of commands, and of reading alone.

    python tests/bench/commands.py [--events 12000000] [--rounds 3] [--folder /dev/shm]
    python tests/bench/commands.py FILE... [--only policies]

Makes a trace.dat of so many events, with all of them ours and with one in twenty, or takes the
files that are named.  Each command runs in a process of its own, start included, its output
thrown away; the median of the rounds counts.  The first row of a file is ``read_trace`` alone,
and the ratios are to that row of the same run: of seconds, and of the processor's, which other
programs on the machine disturb less.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench import inputs
from bench.run import CONVERT, READ, SHARES, Run, middle, run

# report's page goes to a file that is not kept: the others print their tables.
COMMANDS = {
    "analyze log": ("analyze", "log"),
    "policies": ("policies",),
    "busy-causes": ("busy-causes",),
    "verdicts": ("verdicts",),
    "attempts": ("attempts",),
    "recommend": ("recommend",),
    "report": ("report", "--format", "html"),
}


def measure(path: Path, what: str, rounds: int, only: str) -> None:
    """Print a row for reading a file, and one for each command."""
    read = [sys.executable, "-c", READ, str(path)]
    base = middle([run(read) for _ in range(rounds)])
    show(what, "read", base, base)
    for name, words in COMMANDS.items():
        if only in name:
            command = [sys.executable, "-c", CONVERT, *words, str(path)]
            # What the command prints is not the time inside of reading.
            runs = [run(command) for _ in range(rounds)]
            made = middle([Run(r.seconds, r.cpu_s, r.peak_mib, "") for r in runs])
            show("", name, made, base)


def show(what: str, name: str, made: Run, base: Run) -> None:
    """Print one row."""
    print(
        f"| {what} | {name} | {made.seconds:.2f} | {made.seconds / base.seconds:.1f} x "
        f"| {made.cpu_s:.2f} | {made.cpu_s / base.cpu_s:.1f} x | {made.peak_mib:.0f} |",
        flush=True,
    )


def main() -> None:
    """Make the inputs that are not named, run everything, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--events", type=int, default=12_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="only commands whose name has this in it")
    parser.add_argument("--folder", type=Path, help="where inputs are made")
    words = parser.parse_args()
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}, "
        f"Python {platform.python_version()}\n\n"
        "| input | question | s | to reading | cpu s | to reading | MiB |\n"
        "|---|---|---|---|---|---|---|",
        flush=True,
    )
    for path in words.files:
        measure(path, path.name, words.rounds, words.only)
    if words.files:
        return
    with tempfile.TemporaryDirectory(prefix="tdxtrace-bench-", dir=words.folder) as name:
        for share, ours in SHARES.items():
            path = Path(name) / "input.dat"
            n_events = inputs.write_dat(path, words.events, ours)
            what = f"trace.dat, {share}, {n_events / 1e6:.0f} M events"
            measure(path, what, words.rounds, words.only)
            path.unlink()


if __name__ == "__main__":
    main()
