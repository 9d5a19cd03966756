"""Measure how often a recording of the length that `recommend` suggests is long enough.

    python tests/bench/needed.py [--traces 40] [--seed 1]

Each cell records a pilot, in which the target cannot be counted, takes the number of requests
that it says would be needed, and records so many anew.  Columns: pilots that gave no answer
and a number, the median of that number, and how often the new recording counted a limit
(stated: at least 90 %).  The pilots of bursts are as bursty as those of coverage.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from statistics import median

import numpy as np
import polars as pl
from bench import coverage

from tdxtrace.analysis.attempts import attempts
from tdxtrace.recommend.limits import limits
from tdxtrace.recommend.target import Target
from tdxtrace.tables.events import LOSSES

TARGET = 1e-3


def basis_and_needed(cell: coverage.Cell, chance: np.random.Generator) -> tuple[str, int | None]:
    """On what the limit of one recording rests, and how many requests would be needed."""
    chains, answers = coverage.trace(cell, chance)
    curve = attempts(chains, answers).filter(pl.col("by") == "leaf")
    row = limits(curve, chains, LOSSES.empty(), 1.0, Target(TARGET)).row(0, named=True)
    return row["basis"], row["needed_requests"]


def cells() -> Iterator[coverage.Cell]:
    """Pilots that are too short for the target."""
    for is_heavy, n, in_bursts in (
        (False, 1_000, False),
        (False, 2_500, False),
        (True, 2_500, False),
        (False, 2_500, True),
        (False, 10_000, True),
        (True, 10_000, True),
    ):
        yield coverage.Cell(is_heavy, n, in_bursts)


def main() -> None:
    """Run the study and print its table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--traces", type=int, default=40, help="of each cell")
    parser.add_argument("--seed", type=int, default=1)
    wanted = parser.parse_args()
    print(f"{'pilot':<28}{'asked':>8}{'needed':>9}{'counted':>9}")
    for cell in cells():
        result: list[int] = []
        counted = 0
        for seed in range(wanted.seed, wanted.seed + wanted.traces):
            basis, needed = basis_and_needed(cell, np.random.default_rng(seed))
            if basis in ("observed", "nothing_busy") or needed is None:
                continue
            result.append(needed)
            anew = replace(cell, n=needed)
            found, _ = basis_and_needed(anew, np.random.default_rng(10_000 + seed))
            counted += found in ("observed", "nothing_busy")
        many = f"{median(result):,.0f}" if result else "-"
        of_them = f"{100 * counted / len(result):.0f} %" if result else "-"
        print(f"{cell.name:<28}{len(result):>8}{many:>9}{of_them:>9}", flush=True)


if __name__ == "__main__":
    main()
