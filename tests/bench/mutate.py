"""Damage recordings for as long as wanted, and keep those that are not survived.

The longer form of test_mutations.py; exits with 1 if something was found.

python tests/bench/mutate.py [--minutes 10] [--seed 0] [--keep FOLDER] [--again FILE]
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

# In place of this folder, whose coverage.py numba would take for the package of that name.
sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).parent.parent))
from support.mutations import SEEDS, in_memory, mutate, survive


def main() -> None:
    """Damage and read until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="where to keep what is found; default: new")
    parser.add_argument("--again", type=Path, help="only read this file, and show what happens")
    words = parser.parse_args()
    if words.again is not None:
        print(survive(words.again, whole=True))
        return
    chance, ends = random.Random(words.seed), Counter[str]()
    until = time.monotonic() + 60 * words.minutes
    recordings = [make() for make in SEEDS.values()]
    folder = words.keep or Path(tempfile.mkdtemp(prefix="tdxtrace-mutate-"))
    folder.mkdir(parents=True, exist_ok=True)
    with in_memory() as written:
        while time.monotonic() < until:
            data = mutate(chance.choice(recordings), chance)
            try:
                ends[survive(written(data), whole=chance.random() < 0.05)] += 1
            except Exception as error:
                found = f"{type(error).__name__} at {_place(error)}"
                ends[found] += 1
                if ends[found] == 1:
                    kept = folder / f"{words.seed}-{sum(ends.values())}"
                    kept.write_bytes(_shortened(data, found))
                    print(f"{found}: {kept}", flush=True)
    print(f"{sum(ends.values())} recordings: {dict(ends)}")
    sys.exit(int(any(" at " in end for end in ends)))


def _place(error: BaseException) -> str:
    """The file and line that raised an error: errors of one place are one finding."""
    at = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    return "nowhere" if at is None else f"{at.tb_frame.f_code.co_filename}:{at.tb_lineno}"


def _shortened(data: bytes, found: str) -> bytes:
    """The shortest beginning of a recording, in halves, that is not survived in the same way."""
    size, step = len(data), len(data) // 2
    with in_memory() as written:
        while step:
            try:
                survive(written(data[: size - step]), whole=True)
            except Exception as error:
                if f"{type(error).__name__} at {_place(error)}" == found:
                    size -= step
            step //= 2
    return data[:size]


if __name__ == "__main__":
    main()
