"""End writing commands at random moments by SIGINT, SIGTERM, SIGHUP and SIGKILL.

No input may be lost and no output half written; exits with 1 if one is.

python tests/bench/kills.py [--kills 200] [--seed 0] [COMMAND...]
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

# In place of this folder, whose coverage.py numba would take for the package of that name.
sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).parent.parent))
from support.kills import SIGNALS, WRITERS, end_one, prepared, reference


def main() -> None:
    """End each command so often, half the time where an output of it is already there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("commands", nargs="*", metavar="COMMAND", help=", ".join(WRITERS))
    words = parser.parse_args()
    chance, ends = random.Random(words.seed), Counter[tuple[str, str]]()
    names = words.commands or list(WRITERS)
    with tempfile.TemporaryDirectory() as made:
        for name in names:
            one, whole = Path(made) / name, Path(made) / f"{name} whole"
            whole.mkdir()
            out, seconds = reference(name, whole)
            for n in range(-(-words.kills // len(names))):
                if n % 2 == 0:
                    shutil.rmtree(one, ignore_errors=True)
                    one.mkdir()
                    prepared(one)
                after_s, number = chance.uniform(0.2, 1.1) * seconds, chance.choice(SIGNALS)
                try:
                    ends[name, end_one(name, one, out, number, after_s)] += 1
                except AssertionError as error:
                    ends[name, "BROKEN"] += 1
                    print(f"{name}, {number.name} after {after_s:.3f} s: {error}", flush=True)
            result = ", ".join(f"{n} {end}" for (of, end), n in sorted(ends.items()) if of == name)
            print(f"{name}: {result}", flush=True)
    print(f"{sum(ends.values())} ended")
    sys.exit(int(any(end == "BROKEN" for _, end in ends)))


if __name__ == "__main__":
    main()
