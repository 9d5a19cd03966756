"""Benchmarks: tdxtrace and each installed peer on the same files, in one run.

    python tests/bench/run.py [--events 4000000] [--repeat 3] [--memory] [--only PART]

Inputs are made in a temporary folder.  Every program runs in turn in a process of
its own, start included, its output to /dev/null; the best of the repeats counts.
``read`` is the time inside tdxtrace.read_trace alone, ``user`` the processor's.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench import inputs

READ = (
    "import sys, time, tdxtrace; begin = time.perf_counter(); "
    "trace = tdxtrace.read_trace(sys.argv[1]); "
    "print(time.perf_counter() - begin, sum(f.height for f in trace.tables().values()))"
)
CONVERT = "import sys; from tdxtrace.cli import main; main()"
PEERS = {
    "trace-cmd report": ["trace-cmd", "report"],
    "perf script": ["perf", "script", "-i"],
}


@dataclass(frozen=True)
class Run:
    """What one run of a program took."""

    seconds: float
    user_s: float
    peak_mib: float
    said: str


def run(command: list[str]) -> Run:
    """Run a program; its output is read only if it is ours."""
    ours = command[0] == sys.executable
    begin = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE if ours else subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as child:
        said = child.stdout.read().decode() if child.stdout else ""
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - begin
    if child.returncode:
        raise SystemExit(f"failed: {' '.join(command)}")
    return Run(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, said)


def best(command: list[str], repeat: int) -> Run:
    """The fastest of some runs."""
    return min((run(command) for _ in range(repeat)), key=lambda made: made.seconds)


def show(name: str, what: str, n_events: int, made: Run, against: Run | None = None) -> None:
    """Print one line of the table."""
    read = float(made.said.split()[0]) if made.said else None
    inside = "" if read is None else f"{read:.2f}"
    rate = n_events / made.seconds / 1e6
    ratio = "" if against is None else f"{against.seconds / made.seconds:.1f} x"
    if against is not None and read is not None:
        ratio += f" ({against.seconds / read:.1f} x reading)"
    print(
        f"| {name} | {what} | {made.seconds:.2f} | {inside} | {made.user_s:.2f} | {rate:.2f} "
        f"| {made.peak_mib:.0f} | {ratio} |",
        flush=True,
    )


def measure(path: Path, what: str, n_events: int, peer: str, repeat: int) -> Run:
    """Measure tdxtrace on a file, and the peer that reads it too, in turn."""
    command = [sys.executable, "-c", READ, str(path)]
    ours = best(command, repeat)
    if shutil.which(PEERS[peer][0]) is None:
        show("tdxtrace", what, n_events, ours)
        return ours
    other = best([*PEERS[peer], str(path)], repeat)
    ours = min((ours, best(command, repeat)), key=lambda made: made.seconds)
    show(peer, what, n_events, other)
    show("tdxtrace", what, n_events, ours, other)
    return ours


def memory(folder: Path) -> None:
    """Peak memory of convert on an input of 1 GB and of 8 GB."""
    peaks = []
    for gigabytes in (1, 8):
        path = folder / "large.dat"
        n_events = inputs.write_dat(path, gigabytes * 25_000_000, 0.3)
        made = run(
            [
                sys.executable,
                "-c",
                CONVERT,
                "convert",
                str(path),
                "-o",
                str(folder / f"run{gigabytes}"),
                "--quiet",
            ]
        )
        peaks.append(made.peak_mib)
        show("tdxtrace convert", f"trace.dat of {path.stat().st_size / 1e9:.1f} GB", n_events, made)
        shutil.rmtree(folder / f"run{gigabytes}")
        path.unlink()
    print(f"\nconvert, 8 GB to 1 GB: {peaks[1] / peaks[0]:.2f} x the memory")


SHARES = {"all ours": 1.0, "30 % ours": 0.3, "5 % ours": 0.05}


def compare(folder: Path, words: argparse.Namespace) -> None:
    """Run everything on every input."""
    took: dict[str, Run] = {}
    for peer, kind, write in (
        ("trace-cmd report", "trace.dat", inputs.write_dat),
        ("perf script", "perf.data", inputs.write_perf),
    ):
        for share, ours in SHARES.items():
            what = f"{kind}, {share}"
            if words.only in what:
                path = folder / kind
                n_events = write(path, words.events, ours)
                took[what] = measure(path, what, n_events, peer, words.repeat)
                path.unlink()
    for kind in ("trace.dat", "perf.data"):
        both = took.get(f"{kind}, all ours"), took.get(f"{kind}, 5 % ours")
        if both[0] is not None and both[1] is not None:
            faster = both[0].seconds / both[1].seconds
            print(f"\n{kind}, 95 % foreign events: {faster:.1f} x faster than all ours")


def main() -> None:
    """Make the inputs, run everything, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=4_000_000)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--memory", action="store_true", help="also convert 1 GB and 8 GB")
    parser.add_argument("--only", default="", help="only inputs whose name has this in it")
    words = parser.parse_args()
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}, "
        f"Python {platform.python_version()}\n\n"
        "| program | input | s | read s | user s | M events/s | MiB | against |\n"
        "|---|---|---|---|---|---|---|---|",
        flush=True,
    )
    with tempfile.TemporaryDirectory(prefix="tdxtrace-bench-") as name:
        compare(Path(name), words)
        if words.memory:
            memory(Path(name))
    absent = [name for name, command in PEERS.items() if shutil.which(command[0]) is None]
    absent += [name for name in ("perfetto", "lisa") if importlib.util.find_spec(name) is None]
    print(f"\nnot installed: {', '.join(absent) or 'none'}")


if __name__ == "__main__":
    main()
