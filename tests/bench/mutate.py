"""Damage recordings for as long as wanted: the longer form of test_mutations.py.

python tests/bench/mutate.py [--minutes 10] [--seed 0]
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from support.mutations import SEEDS, mutate, survive


def main() -> None:
    """Damage and read until the time is over; a failure keeps its file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    words = parser.parse_args()
    chance, ends = random.Random(words.seed), Counter[str]()
    path = Path(tempfile.mkdtemp(prefix="tdxtrace-mutate-")) / "recording"
    until = time.monotonic() + 60 * words.minutes
    recordings = [make() for make in SEEDS.values()]
    while time.monotonic() < until:
        path.write_bytes(mutate(chance.choice(recordings), chance))
        ends[survive(path, whole=chance.random() < 0.05)] += 1
    print(f"{sum(ends.values())} recordings: {dict(ends)}; the last is {path}")


if __name__ == "__main__":
    main()
