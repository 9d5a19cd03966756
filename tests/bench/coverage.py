"""How often the intervals hold the truth: traces made with a tail that is known.

    python tests/bench/coverage.py [--traces 250] [--processes 2] [--seed 1]

Each cell makes so many traces of light or heavy tail, few or many requests, independent
or in bursts.  A request is busy with chance BUSY; how often it is busy then has a known
distribution.  In bursts, busy requests stand close together, and each has the number of
the one before it with chance SAME.  At each busy answer a request is lost from sight
with chance LOST.

Columns: how often the 95 % interval of the share done within 1, and within the number
that all but 0.1 % need, holds the true one; how often that of the number that all but the
target need (counted, and extrapolated) does; how often a limit that was given keeps the
target (stated: 95 %); how often one was given.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import product

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tdxtrace.analysis.attempts import attempts
from tdxtrace.analysis.busy_answers import episodes
from tdxtrace.recommend.limits import limits
from tdxtrace.recommend.target import Target
from tdxtrace.tables.events import LOSSES
from tdxtrace.tables.findings import RETRY_CHAINS
from tdxtrace.tables.limits import BUSY_ANSWERS

BUSY = 0.03
SAME = 0.5
LOST = 0.01
BURST = 6.0
# A geometric tail that ends a request with a third of its attempts, and a generalised
# Pareto one without a fourth moment.
LIGHT_STAYS = 2 / 3
HEAVY_SHAPE, HEAVY_SCALE = 0.3, 1.5
COUNTED = 1e-3

Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Cell:
    """One kind of trace."""

    is_heavy: bool
    n: int
    in_bursts: bool

    @property
    def name(self) -> str:
        tail = "heavy" if self.is_heavy else "light"
        return f"{tail} {self.n:>7,} {'bursty' if self.in_bursts else 'independent'}"

    @property
    def far(self) -> float:
        """A target beyond what can be counted."""
        return 0.2 / self.n

    def more(self, n: float) -> float:
        """P(a request needs more than n attempts)."""
        if self.is_heavy:
            return BUSY * float((1 + HEAVY_SHAPE * (n - 1) / HEAVY_SCALE) ** (-1 / HEAVY_SHAPE))
        return BUSY * float(LIGHT_STAYS ** (n - 1))

    def quantile(self, target: float) -> int:
        """The smallest n that all but ``target`` need no more than."""
        n = 1
        while self.more(n) > target:
            n += 1
        return n

    def numbers(self, chance: np.random.Generator, n: int) -> Numbers:
        """How often requests that are busy are so."""
        u = chance.random(n)
        if self.is_heavy:
            beyond = HEAVY_SCALE * (u**-HEAVY_SHAPE - 1) / HEAVY_SHAPE
        else:
            beyond = np.log(u) / math.log(LIGHT_STAYS)
        return np.maximum(np.ceil(beyond), 1).astype(np.int64)

    def places(self, chance: np.random.Generator) -> tuple[Numbers, NDArray[np.bool_]]:
        """Which requests are busy, and whether each is of the same burst as the one before."""
        if not self.in_bursts:
            places = np.flatnonzero(chance.random(self.n) < BUSY)
            return places, np.zeros(len(places), bool)
        # Each burst has BURST requests on average, half a clean one after each, and a
        # quiet time before it that makes the whole share BUSY.
        n = int(self.n * BUSY / BURST * 2) + 50
        sizes = chance.geometric(1 / BURST, n)
        quiet = chance.geometric(1 / (BURST / BUSY - 1.5 * BURST + 1), n) - 1
        steps = 1 + chance.geometric(2 / 3, sizes.sum()) - 1
        first = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        steps[first] += quiet
        places = np.cumsum(steps)
        goes_on = np.ones(len(places), bool)
        goes_on[first] = False
        inside = places < self.n
        return places[inside], goes_on[inside]


def trace(cell: Cell, chance: np.random.Generator) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The retry chains of one trace, and their busy answers."""
    places, goes_on = cell.places(chance)
    numbers = cell.numbers(chance, len(places))
    alike = goes_on & (chance.random(len(places)) < SAME)
    source = np.maximum.accumulate(np.where(alike, 0, np.arange(len(places))))
    numbers = numbers[source]
    until = chance.geometric(LOST, len(places))
    lost = until <= numbers
    numbers = np.minimum(numbers, until)
    n_busy = np.zeros(cell.n, np.uint32)
    n_busy[places] = numbers
    was_lost = np.zeros(cell.n, bool)
    was_lost[places] = lost
    seq = np.arange(cell.n)
    chains = pl.DataFrame(
        {
            "first_seq": seq,
            "last_seq": seq,
            "n_busy": n_busy,
            "n_attempts": n_busy + ~was_lost,
            "outcome": np.where(was_lost, "cut", "succeeded"),
            "start_ns": seq * 1000,
            "end_ns": seq * 1000,
        }
    ).with_columns(
        source=0,
        leaf=6,
        n_segments=1,
        identity=pl.lit("request"),
        cut_by=pl.when(pl.col("outcome") == "cut").then(pl.lit("lost_events")),
    )
    missing = [name for name in RETRY_CHAINS.schema if name not in chains.columns]
    chains = chains.with_columns(pl.lit(None).alias(name) for name in missing)
    chains = chains.select(RETRY_CHAINS.schema.names()).cast(RETRY_CHAINS.schema)
    return chains, answers_of(chains)


def answers_of(chains: pl.DataFrame) -> pl.DataFrame:
    """The busy answers of chains that were made up, a microsecond apart."""
    retried = episodes(chains)
    each = retried[np.repeat(np.arange(retried.height), retried["n_busy"].to_numpy())]
    number = pl.int_range(1, pl.len() + 1, dtype=pl.UInt32).over("source", "first_seq")
    answers = each.select(
        "source",
        "first_seq",
        "leaf",
        "episode",
        number=number,
        seq=pl.int_range(pl.len(), dtype=pl.UInt64),
        waited_ns=number.cast(pl.Int64) * 1000,
        status=pl.lit(0x8000_0200_0000_0092, pl.UInt64),
    )
    return BUSY_ANSWERS.conform(answers)


def one(cell: Cell, seed: int) -> Counter[str]:
    """What held in one trace: how often asked, and how often so."""
    chance = np.random.default_rng(seed)
    chains, answers = trace(cell, chance)
    curve = attempts(chains, answers).filter(pl.col("unit") == "attempts", pl.col("by") == "leaf")
    held: Counter[str] = Counter()
    for name, n in (("within 1", 1), ("within 99.9 %", cell.quantile(COUNTED))):
        row = curve.filter(pl.col("within") <= n).tail(1)
        if not row.is_empty():
            is_held = row["done_low"][0] <= 1 - cell.more(n) <= row["done_high"][0]
            held.update({f"{name} asked": 1, f"{name} so": int(is_held)})
    for name, target in (("counted", COUNTED), ("far", cell.far)):
        wish = Target(target, 0.95)
        steps = curve.filter(pl.col("unit") == "attempts")
        found = limits(steps, chains, LOSSES.empty(), 1.0, wish).row(0, named=True)
        held.update({f"{name} {found['basis']}": 1, f"{name} traces": 1})
        if found["limit"] is None:
            continue
        keeps = cell.more(found["limit"]) <= target
        held.update({f"{name} limits": 1, f"{name} kept": int(keeps)})
        low, high = found["estimate_low"], found["estimate_high"]
        truth = cell.quantile(target)
        holds = low <= truth <= (math.inf if high is None else high)
        held.update({f"{name} asked": 1, f"{name} so": int(holds)})
    return held


def cells(sizes: tuple[int, ...]) -> Iterator[Cell]:
    """Light and heavy, few and many, independent and in bursts."""
    for heavy, n, bursts in product((False, True), sizes, (False, True)):
        yield Cell(heavy, n, bursts)


def share(held: Counter[str], part: str, whole: str) -> str:
    """Part of whole in percent."""
    return f"{100 * held[part] / held[whole]:.1f}" if held[whole] else "-"


def study(cell: Cell, n_traces: int, seed: int, run: Callable[..., Iterator[Counter[str]]]) -> str:
    """One line of the table."""
    held: Counter[str] = Counter()
    for result in run(partial(one, cell), range(seed, seed + n_traces)):
        held.update(result)
    columns = [
        share(held, "within 1 so", "within 1 asked"),
        share(held, "within 99.9 % so", "within 99.9 % asked"),
        *(
            share(held, f"{name} {part}", f"{name} {whole}")
            for name in ("counted", "far")
            for part, whole in (("so", "asked"), ("kept", "limits"), ("limits", "traces"))
        ),
        share(held, "counted observed", "counted limits"),
    ]
    return f"{cell.name:<28}" + "".join(f"{column:>9}" for column in columns)


def main() -> None:
    """Run the study and print its table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--traces", type=int, default=250, help="of each cell")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--sizes", type=int, nargs="+", default=[3_000, 200_000])
    wanted = parser.parse_args()
    names = (
        "S(1)",
        "S(n)",
        "q held",
        "q kept",
        "q given",
        "far held",
        "far kept",
        "given",
        "counted",
    )
    print(f"{'tail, requests, arrival':<28}" + "".join(f"{name:>9}" for name in names))
    with ProcessPoolExecutor(wanted.processes) as pool:
        run = partial(pool.map, chunksize=5)
        for cell in cells(tuple(wanted.sizes)):
            print(study(cell, wanted.traces, wanted.seed, run), flush=True)


if __name__ == "__main__":
    main()
