"""Measure the coverage of intervals on traces with a known tail.

    PYTHONPATH=tests python -m bench.coverage [--traces 250] [--processes 2] [--seed 1]
    PYTHONPATH=tests python -m bench.coverage --unlike --sizes 3000 [--only storms]

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
from itertools import count, product
from multiprocessing import get_context

import numpy as np
import polars as pl
from bench.unlike import KINDS, Made, chains_of
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


SHARES = (1, 2, 5, 16)
TARGETS = {3_000: (1e-2, 1e-3, 6.7e-5), 100_000: (1e-3, 1e-4, 1e-5, 1e-6)}
# Requests that are analysed at once: traces are leaves of one, as nothing is shared by leaves.
AT_ONCE = 600_000
FIRST_LEAF = 1000


def unlike(name: str, n: int, targets: tuple[float, ...], seeds: range) -> Counter[str]:
    """What held in traces of one kind of requests that are not alike."""
    made = {
        FIRST_LEAF + place: KINDS[name](n, np.random.default_rng(seed))
        for place, seed in enumerate(seeds)
    }
    chains = pl.concat([chains_of(trace, leaf) for leaf, trace in made.items()])
    curves = attempts(chains, answers_of(chains)).filter(
        pl.col("unit") == "attempts", pl.col("by") == "leaf"
    )
    held: Counter[str] = Counter()
    for leaf, trace in made.items():
        curve = curves.filter(pl.col("leaf") == leaf)
        for within in SHARES:
            row = curve.filter(pl.col("within") <= within).tail(1)
            if not row.is_empty():
                # Requests last seen busy at the end of a curve may be done anywhere beyond it.
                is_open = within > curve["within"][-1] and curve["n_censored"][-1] > 0
                high = 1.0 if is_open else row["done_high"][0]
                so = row["done_low"][0] <= 1 - trace.more(within) <= high
                held.update({f"{within} asked": 1, f"{within} so": int(so)})
        held.update({"drifts": int(curve["drifts"].any())})
    for target in targets:
        best = {leaf: next(filter(_keeps(trace, target), count(1))) for leaf, trace in made.items()}
        found = limits(curves, chains, LOSSES.empty(), 1.0, Target(target))
        for given in found.filter(made_by="anyone", unit="attempts").iter_rows(named=True):
            held.update({f"{target} traces": 1})
            if given["limit"] is None:
                continue
            how = "model" if given["basis"] == "extrapolated" else "counted"
            kept = made[given["leaf"]].more(given["limit"]) <= target
            over = round(1000 * given["limit"] / best[given["leaf"]])
            of = f"{target} {how}"
            held.update({f"{of} limits": 1, f"{of} kept": int(kept), f"{of} over": over})
    return held


def _keeps(trace: Made, target: float) -> Callable[[int], bool]:
    return lambda m: trace.more(m) <= target


def study_unlike(
    wanted: argparse.Namespace, n: int, run: Callable[..., Iterator[Counter[str]]]
) -> None:
    """Print a line for each kind: shares that hold, drifts seen; limits given, kept, over the best.

    Limits that were counted come before the stroke, those of a model behind it.
    """
    targets = TARGETS.get(n, TARGETS[3_000])
    head = [*(f"S({m})" for m in SHARES), "drifts"]
    print(f"{'kind of trace':<24}" + "".join(f"{name:>7}" for name in head), end="")
    print("".join(f"{f'{t:g} given, kept, x':>32}" for t in targets))
    size = max(1, min(AT_ONCE // n, wanted.traces))
    last = wanted.seed + wanted.traces
    parts = [range(at, min(at + size, last)) for at in range(wanted.seed, last, size)]
    for name in KINDS:
        if wanted.only not in name:
            continue
        held: Counter[str] = Counter()
        for result in run(partial(unlike, name, n, targets), parts):
            held.update(result)
        columns = [share(held, f"{m} so", f"{m} asked") for m in SHARES]
        columns.append(f"{100 * held['drifts'] / wanted.traces:.0f}")
        print(f"{name:<24}" + "".join(f"{c:>7}" for c in columns), end="")
        given = (
            " | ".join(_given(held, f"{t}", how) for how in ("counted", "model")) for t in targets
        )
        print("".join(f"{text:>32}" for text in given), flush=True)


def _given(held: Counter[str], target: str, how: str) -> str:
    """How many limits were given, how many of these keep their target, and how large they are."""
    n = held[f"{target} {how} limits"]
    if not n:
        return "-"
    given, kept = (
        share(held, f"{target} {how} limits", f"{target} traces"),
        held[f"{target} {how} kept"],
    )
    return f"{given} {100 * kept / n:.0f} {held[f'{target} {how} over'] / 1000 / n:.2g}x"


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
    parser.add_argument("--unlike", action="store_true", help="requests that are not alike")
    parser.add_argument("--only", default="", help="kinds of --unlike whose name has this")
    wanted = parser.parse_args()
    if wanted.unlike:
        with ProcessPoolExecutor(wanted.processes, get_context("spawn")) as pool:
            for n in wanted.sizes:
                print(f"{n:,} requests")
                study_unlike(wanted, n, pool.map)
        return
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
    with ProcessPoolExecutor(wanted.processes, get_context("spawn")) as pool:
        run = partial(pool.map, chunksize=5)
        for cell in cells(tuple(wanted.sizes)):
            print(study(cell, wanted.traces, wanted.seed, run), flush=True)


if __name__ == "__main__":
    main()
