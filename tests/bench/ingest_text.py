"""Measure speed and memory of reading text, relative to mawk in the same run.

    python tests/bench/ingest_text.py              speed: 3 million lines, all ours and 5 % ours
    python tests/bench/ingest_text.py --memory     peaks at 1 and 4 GB of 95 % foreign lines
    python tests/bench/ingest_text.py --start      --version, --help and the sample, against typer
    python tests/bench/ingest_text.py --analysis   5 million SEAMCALLs in memory

Runs alternate, each in a fresh process; the median counts: machines are noisy.
Large files are written into --folder and removed.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parent.parent.parent
SAMPLE = ROOT / "sample_traces" / "contended.txt"
MAKE = Path(__file__).parent / "make_text.py"
READ = """
import resource, sys, time
import tdxtrace
begun = time.perf_counter()
trace = tdxtrace.read_trace(sys.argv[1])
took = time.perf_counter() - begun
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
size = sum(table.estimated_size() for table in trace.tables().values()) / 2**20
print(took, peak, size, trace.provenance.sources[0].n_lines, trace.seamcalls.height)
"""
ANALYSE = """
import sys, time
import tdxtrace
trace = tdxtrace.read_trace(sys.argv[1])
begun = time.perf_counter()
findings = tdxtrace.analyze(trace)
print(time.perf_counter() - begun, trace.seamcalls.height, findings.retry_chains.height)
"""
HELLO = (
    "import typer\napp = typer.Typer()\n@app.command()\ndef hello(name: str = 'x'): pass\napp()\n"
)


def timed(*command: str) -> float:
    """Seconds that a command takes."""
    begun = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - begun


def figures(program: str, *words: str) -> list[float]:
    """What a Python program prints."""
    command = [sys.executable, "-c", program, *words]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return [float(word) for word in done.stdout.split()]


def make(folder: Path, name: str, *size: str) -> Path:
    """Write a trace of some size."""
    target = folder / name
    subprocess.run(
        [sys.executable, MAKE, SAMPLE, target, *size], check=True, stdout=subprocess.DEVNULL
    )
    return target


def speed(folder: Path, rounds: int) -> None:
    """Compare with splitting fields in C."""
    mawk = shutil.which("mawk")
    for name, noise in (("all ours", "0"), ("5 % ours", "0.95")):
        text = make(folder, "speed.txt", "--events", "3e6", "--noise", noise)
        reference, ours = [], []
        for _ in range(rounds):
            if mawk:
                reference.append(timed(mawk, "{s+=NF} END{print s}", str(text)))
            ours.append(figures(READ, str(text)))
        took, _, _, lines, _ = min(ours)
        print(f"{name}: tables {took:.2f} s, {lines / took / 1e6:.2f} M lines/s", end="")
        if mawk:
            best = min(reference)
            print(
                f"; mawk {best:.2f} s, {lines / best / 1e6:.2f} M lines/s; ratio {best / took:.2f}"
            )
        else:
            print("; mawk is not installed")
        text.unlink()


def memory(folder: Path) -> None:
    """Compare the peaks that two sizes of one kind of file need, above their tables."""
    empty = figures(READ, str(SAMPLE))[1]
    above = []
    for size in ("1e9", "4e9"):
        text = make(folder, "memory.txt", "--bytes", size, "--noise", "0.95")
        took, peak, tables, lines, _ = figures(READ, str(text))
        above.append(peak - empty - tables)
        print(
            f"{float(size) / 1e9:.0f} GB: peak {peak:.0f} MiB, tables {tables:.0f} MiB, "
            f"above both a small file's {empty:.0f} MiB and the tables {above[-1]:.0f} MiB; "
            f"{lines / took / 1e6:.1f} M lines/s"
        )
        text.unlink()
    print(f"working memory: ratio {above[1] / above[0]:.2f}")


def start(folder: Path, rounds: int) -> None:
    """Compare with a program that does nothing."""
    hello = folder / "hello.py"
    hello.write_text(HELLO)
    tdxtrace = [sys.executable, "-m", "tdxtrace"]
    commands = {
        "hello world in typer": [sys.executable, str(hello)],
        "hello world --help": [sys.executable, str(hello), "--help"],
        "tdxtrace --version": [*tdxtrace, "--version"],
        "tdxtrace --help": [*tdxtrace, "--help"],
        "tdxtrace analyze log (the sample)": [*tdxtrace, "analyze", "log", str(SAMPLE)],
    }
    took: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            took[name].append(timed(*command))
    for name, runs in took.items():
        print(f"{name}: {1000 * median(runs):.0f} ms")


def analysis(folder: Path, rounds: int) -> None:
    """Time the analyses alone."""
    text = make(folder, "analysis.txt", "--events", "1e7")
    runs = [figures(ANALYSE, str(text)) for _ in range(rounds)]
    _, calls, chains = runs[0]
    took = median(run[0] for run in runs)
    print(f"{calls:,.0f} SEAMCALLs to {chains:,.0f} chains and all findings: {took:.2f} s")
    text.unlink()


def main() -> None:
    """Run one of the benchmarks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--start", action="store_true")
    parser.add_argument("--analysis", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where large files may be written")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        if options.memory:
            memory(folder)
        elif options.start:
            start(folder, options.rounds)
        elif options.analysis:
            analysis(folder, options.rounds)
        else:
            speed(folder, options.rounds)


if __name__ == "__main__":
    main()
