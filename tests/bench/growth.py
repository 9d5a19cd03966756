"""Print how the time to read hostile recordings grows with their size.

python tests/bench/growth.py [--times 64] [FAMILY...]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

# In place of this folder, whose coverage.py numba would take for the package of that name.
sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).parent.parent))
from support.growth import FAMILIES, seconds


def main() -> None:
    """Read each family at a size and at twice that; print ms of the processor and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=64, help="of the size that tests use")
    parser.add_argument("families", nargs="*", metavar="FAMILY")
    words = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recording"
        for name in words.families or FAMILIES:
            n = FAMILIES[name][0] * words.times
            for size in (n, 2 * n):
                seconds(name, size, path)  # loops are compiled for the larger of them
            once, twice = (min(seconds(name, k * n, path) for _ in range(3)) for k in (1, 2))
            print(f"{name:28} {1e3 * once:9.1f} {1e3 * twice:9.1f} {twice / once:6.2f}", flush=True)


if __name__ == "__main__":
    main()
