"""Benchmarks: tdxtrace and each installed peer on the same files, in one run.

    python tests/bench/run.py [--events 12000000] [--rounds 3] [--only PART] [--large]

Inputs are made in a temporary folder (--folder says where): trace.dat, perf.data and
text of at least so many events, with all of them ours, and with one in twenty.  Every
program runs in turn in a process of its own, start included, its output to /dev/null.
Its rounds follow one another, so that memory which a virtual machine's host takes away
meanwhile is not asked for again in each of them, and the median counts.  ``read s`` is
the time inside tdxtrace.read_trace alone, ``cpu s`` the processor's.  The first row is what
tdxtrace takes for a few hundred events: its start; the rate ``steady`` leaves that out.
--folder should be one in memory, such as /dev/shm, where the kernel does not keep files in
its cache.  The last rows show what memory ``convert`` needs for an input and for one eight
times as large: 1 and 8 GB with --large, else a tenth of it.
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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench import inputs

# It ends as the commands do: without a last look for circles of objects.
READ = (
    "import gc, sys, time, tdxtrace; begin = time.perf_counter(); "
    "trace = tdxtrace.read_trace(sys.argv[1]); "
    "print(time.perf_counter() - begin, sum(f.height for f in trace.tables().values())); "
    "gc.freeze()"
)
CONVERT = "import sys; from tdxtrace.cli import main; main()"
SMALL = inputs.SAMPLES / "tracecmd-v7.dat"
MAKE_TEXT = Path(__file__).parent / "make_text.py"
TEXT_SAMPLE = inputs.SAMPLES / "contended.txt"
SHARES = {"all ours": 1.0, "5 % ours": 0.05}


@dataclass(frozen=True)
class Peer:
    """A program that reads the same file, and how far it goes."""

    name: str
    command: tuple[str, ...]
    version: tuple[str, ...]


PEERS = {
    "trace.dat": (Peer("trace-cmd report", ("trace-cmd", "report"), ("trace-cmd", "--version")),),
    "perf.data": (Peer("perf script", ("perf", "script", "-i"), ("perf", "--version")),),
    "text": (
        Peer("mawk, splits fields", ("mawk", "{s+=NF} END{print s}"), ("mawk", "-W", "version")),
        Peer("rg, looks at every byte", ("rg", "-c", "tdh_"), ("rg", "--version")),
    ),
}
# Readers in Python that know these formats; named where they are not installed.  Where they
# are, what they take is not comparable: perfetto keeps the events it knows, LISA those asked for.
LIBRARIES = ("perfetto", "lisa")


@dataclass(frozen=True)
class Run:
    """What one run of a program took."""

    seconds: float
    cpu_s: float
    peak_mib: float
    said: str


def run(command: list[str]) -> Run:
    """Run a program; its output is read only if it is ours."""
    ours = command[0] == sys.executable
    # Installed by pip, modules are compiled once; a shell that forbids it would have
    # them compiled in every run.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    begin = time.perf_counter()
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE if ours else subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment,
    ) as child:
        said = child.stdout.read().decode() if child.stdout else ""
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - begin
    if child.returncode:
        raise SystemExit(f"failed: {' '.join(command)}")
    return Run(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, said)


def middle(runs: list[Run]) -> Run:
    """The median of each figure; what was said is the time inside reading."""
    result = [float(made.said.split()[0]) for made in runs if made.said]
    return Run(
        median(made.seconds for made in runs),
        median(made.cpu_s for made in runs),
        median(made.peak_mib for made in runs),
        str(median(result)) if result else "",
    )


def show(
    name: str, what: str, n_events: int, made: Run, ratios: str = "", start_s: float = 0.0
) -> None:
    """Print one line of the table; ``start_s`` is what the program takes without events."""
    rate = f"{n_events / made.seconds / 1e6:.2f}" if n_events else ""
    steady = f"{n_events / (made.seconds - start_s) / 1e6:.2f}" if start_s else ""
    inside = f"{float(made.said):.2f}" if made.said else ""
    print(
        f"| {what} | {name} | {made.seconds:.2f} | {inside} | {made.cpu_s:.2f} | {rate} "
        f"| {steady} | {made.peak_mib:.0f} | {ratios} |",
        flush=True,
    )


def start(rounds: int) -> float:
    """Measure what tdxtrace takes for a few events; return the seconds."""
    made = middle([run([sys.executable, "-c", READ, str(SMALL)]) for _ in range(2 * rounds)])
    show("tdxtrace", "few events", 0, made)
    return made.seconds


def measure(path: Path, what: str, kind: str, n_events: int, rounds: int, start_s: float) -> Run:
    """Measure tdxtrace and the installed peers on a file, in turn; print a line for each."""
    ours = [sys.executable, "-c", READ, str(path)]
    peers = [peer for peer in PEERS[kind] if shutil.which(peer.command[0])]
    others = {
        peer.name: middle([run([*peer.command, str(path)]) for _ in range(rounds)])
        for peer in peers
    }
    made = middle([run(ours) for _ in range(rounds)])
    for name, other in others.items():
        show(name, what, n_events, other)
    ratios = ", ".join(
        f"{other.seconds / made.seconds:.1f} x {name.partition(',')[0]}"
        f" ({other.seconds / float(made.said):.1f} x reading)"
        for name, other in others.items()
    )
    show("tdxtrace", what, n_events, made, ratios, start_s)
    return made


def write_text(path: Path, n_events: int, ours: float) -> int:
    """Write text of at least ``n_events`` lines."""
    noise = f"{1 - ours:.2f}"
    size = ("--events", str(n_events), "--noise", noise)
    done = subprocess.run(
        [sys.executable, MAKE_TEXT, TEXT_SAMPLE, path, *size],
        check=True,
        capture_output=True,
        text=True,
    )
    return int(done.stdout.split(": ")[1].split()[0].replace(",", ""))


WRITERS: dict[str, Callable[[Path, int, float], int]] = {
    "trace.dat": inputs.write_dat,
    "perf.data": inputs.write_perf,
    "text": write_text,
}


def compare(folder: Path, words: argparse.Namespace) -> None:
    """Run everything on every input."""
    took: dict[str, float] = {}
    start_s = start(words.rounds)
    for kind, write in WRITERS.items():
        for share, ours in SHARES.items():
            what = f"{kind}, {share}"
            if words.only in what:
                path = folder / f"input.{kind}"
                n_events = write(path, words.events, ours)
                size = f"{what}, {n_events / 1e6:.0f} M events, {path.stat().st_size / 1e9:.2f} GB"
                made = measure(path, size, kind, n_events, words.rounds, start_s)
                took[what] = made.seconds
                path.unlink()
    for kind in WRITERS:
        both = took.get(f"{kind}, all ours"), took.get(f"{kind}, 5 % ours")
        if both[0] is not None and both[1] is not None:
            faster = both[0] / both[1]
            steady = (both[0] - start_s) / (both[1] - start_s)
            print(
                f"| {kind}, 95 % foreign | tdxtrace | | | | | | | {faster:.1f} x all ours, "
                f"{steady:.1f} x without the start |"
            )


def memory(folder: Path, gigabyte: int) -> None:
    """Peak memory of convert on an input and on one eight times as large."""
    peaks = []
    for factor in (1, 8):
        path, target = folder / "large.dat", folder / f"run{factor}"
        # A recorded event of the sample takes some 40 bytes.
        n_events = inputs.write_dat(path, factor * gigabyte // 40, 0.3)
        words = ["convert", str(path), "-o", str(target), "--quiet"]
        made = run([sys.executable, "-c", CONVERT, *words])
        peaks.append(made.peak_mib)
        ratio = f"{peaks[1] / peaks[0]:.2f} x the memory" if len(peaks) == 2 else ""
        size = f"trace.dat of {path.stat().st_size / 1e9:.1f} GB"
        show("tdxtrace convert", size, n_events, made, ratio)
        shutil.rmtree(target)
        path.unlink()


def versions() -> tuple[list[str], list[str]]:
    """Versions of the peers that are installed, and names of those that are not."""
    found, absent = [], []
    for peer in (peer for peers in PEERS.values() for peer in peers):
        if shutil.which(peer.command[0]) is None:
            absent.append(peer.command[0])
            continue
        done = subprocess.run(peer.version, check=False, capture_output=True, text=True)
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        found.append(lines[0].strip() if lines else peer.command[0])
    absent += [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
    return found, absent


def main() -> None:
    """Make the inputs, run everything, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--events", type=int, default=12_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="only inputs whose name has this in it")
    parser.add_argument("--large", action="store_true", help="convert 1 GB and 8 GB")
    parser.add_argument("--folder", type=Path, help="where the inputs are made")
    words = parser.parse_args()
    found, absent = versions()
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}, "
        f"Python {platform.python_version()}; {'; '.join(found)}\n"
        f"not installed: {', '.join(absent) or 'none'}\n\n"
        "| input | program | s | read s | cpu s | M events/s | steady | MiB | ratio |\n"
        "|---|---|---|---|---|---|---|---|---|",
        flush=True,
    )
    with tempfile.TemporaryDirectory(prefix="tdxtrace-bench-", dir=words.folder) as name:
        compare(Path(name), words)
        if words.only in "convert":
            memory(Path(name), 1_000_000_000 if words.large else 100_000_000)


if __name__ == "__main__":
    main()
