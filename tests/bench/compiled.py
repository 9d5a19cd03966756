"""Measure from which input size compiled loops are faster, and the cost of the first run.

    python tests/bench/compiled.py [--kind trace.dat] [--folder /dev/shm] [--rounds 5]

Reads inputs of growing size with compiled loops and with interpreted ones,
in processes of their own, start included; the median counts.  The last row is a run with
an empty cache: it compiles what it needs, once for all later runs.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench.run import WRITERS

SIZES = (500_000, 1_000_000, 2_000_000, 3_000_000, 6_000_000, 12_000_000)
# It ends as the commands do: without a last look for circles of objects.
READ = (
    "import gc, sys, tdxtrace; from tdxtrace import compiler; "
    "compiler.COMPILE_BYTES = int(sys.argv[2]); tdxtrace.read_trace(sys.argv[1]); gc.freeze()"
)
ALWAYS, NEVER = "0", str(1 << 60)


def seconds(path: Path, least: str, rounds: int, cache: Path | None = None) -> float:
    """How long a run takes that compiles for inputs of at least so many bytes."""
    environment = os.environ | ({} if cache is None else {"NUMBA_CACHE_DIR": str(cache)})
    took = []
    for _ in range(rounds):
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-c", READ, path, least], check=True, env=environment)
        took.append(time.perf_counter() - begin)
    return median(took)


def main() -> None:
    """Print a line for each size."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--kind", choices=WRITERS, default="trace.dat")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the inputs are made")
    words = parser.parse_args()
    print("| events | MB | interpreted s | compiled s | ratio |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="tdxtrace-bench-", dir=words.folder) as name:
        path, cache = Path(name) / "input", Path(name) / "cache"
        for n_events in SIZES:
            n_written = WRITERS[words.kind](path, n_events, 1.0)
            slow, quick = (seconds(path, least, words.rounds) for least in (NEVER, ALWAYS))
            size = f"{n_written / 1e6:.1f} M | {path.stat().st_size / 1e6:.0f}"
            print(f"| {size} | {slow:.2f} | {quick:.2f} | {slow / quick:.2f} |", flush=True)
        first = seconds(path, ALWAYS, 1, cache)
        print(f"| {size}, first run of all | | {first:.2f} | |")


if __name__ == "__main__":
    main()
