"""How often the intervals hold the truth: traces made with a tail that is known.

    python tests/bench/coverage.py [--unlike] [--traces 250] [--processes 2] [--seed 1]

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


# Traces in which requests are not alike: most of the shapes that make intervals too narrow.


@dataclass(frozen=True)
class Made:
    """One trace, and what is true of what it is to speak for."""

    numbers: Numbers
    """How often each request is busy."""
    more: Callable[[int], float]
    """P(a request needs more than n attempts): of a new TD or storm, or at the end of a drift."""
    td: Numbers | None = None
    outcome: NDArray[np.str_] | None = None
    begin_lost: NDArray[np.bool_] | None = None


def geometric(stays: float, share: float = BUSY) -> Callable[[int], float]:
    """P(needs more than n) where so many are busy, and stay so with that chance."""
    return lambda n: share * float(stays ** (n - 1))


def _numbers(chance: np.random.Generator, is_busy: NDArray[np.bool_], stays: object) -> Numbers:
    return np.where(is_busy, chance.geometric(1 - np.asarray(stays), len(is_busy)), 0)


def control(n: int, chance: np.random.Generator) -> Made:
    """Independent requests of one kind."""
    return Made(_numbers(chance, chance.random(n) < BUSY, 2 / 3), geometric(2 / 3))


def two_kinds(n: int, chance: np.random.Generator) -> Made:
    """Of 1,000 requests one is slow."""
    slow = chance.random(n) < 1e-3
    stays = np.where(slow, 0.97, 2 / 3)
    share, of_slow = geometric(2 / 3, BUSY * 0.999), geometric(0.97, 1e-3)
    numbers = _numbers(chance, slow | (chance.random(n) < BUSY), stays)
    return Made(numbers, lambda m: share(m) + of_slow(m))


def saturated(n: int, chance: np.random.Generator) -> Made:
    """Nine of ten are busy, in blocks of eight that are alike."""
    block = np.arange(n) // 8
    of_block = chance.geometric(1 / 3, n)[block]
    return Made(np.where(chance.random(n) < 0.9, of_block, 0), geometric(2 / 3, 0.9))


def tied(n: int, chance: np.random.Generator) -> Made:
    """Eight wait for one holder, with other requests between them."""
    first = np.flatnonzero(chance.random(n) < BUSY / 8)
    numbers = np.zeros(n, np.int64)
    of_burst = chance.geometric(1 / 3, len(first))
    for waiter in range(8):
        at = first + 3 * waiter
        numbers[at[at < n]] = of_burst[at < n]
    return Made(numbers, geometric(2 / 3))


def ten_tds(n: int, chance: np.random.Generator) -> Made:
    """Ten TDs that differ, and a new one."""
    rates = np.minimum(BUSY * chance.lognormal(-0.125, 0.5, 11), 0.5)
    td = chance.integers(0, 10, n)
    numbers = _numbers(chance, chance.random(n) < rates[td], 2 / 3)
    return Made(numbers, geometric(2 / 3, rates[10]), td)


def storms(n: int, chance: np.random.Generator) -> Made:
    """Six storms that differ, one after the other, and a new one."""
    rates = np.minimum(BUSY * chance.lognormal(-0.125, 0.5, 7), 0.5)
    storm = np.arange(n) * 6 // n
    numbers = _numbers(chance, chance.random(n) < rates[storm], 2 / 3)
    return Made(numbers, geometric(2 / 3, rates[6]))


def drift(n: int, chance: np.random.Generator) -> Made:
    """Busy requests stay so for longer and longer."""
    numbers = _numbers(chance, chance.random(n) < BUSY, np.linspace(0.3, 0.75, n))
    return Made(numbers, geometric(0.75))


def given_up(n: int, chance: np.random.Generator) -> Made:
    """All give up after sixteen calls."""
    numbers = _numbers(chance, chance.random(n) < BUSY, 0.85)
    outcome = np.where(numbers >= 16, "abandoned", "succeeded")
    return Made(np.minimum(numbers, 16), geometric(0.85), outcome=outcome)


def elsewhere(n: int, chance: np.random.Generator) -> Made:
    """Of three of ten that are busy another thread does the work as soon as it can."""
    numbers = _numbers(chance, chance.random(n) < BUSY, 0.8)
    settled = (numbers > 0) & (chance.random(n) < 0.3)
    return Made(
        numbers, geometric(0.8), outcome=np.where(settled, "resolved_elsewhere", "succeeded")
    )


def lost(n: int, chance: np.random.Generator) -> Made:
    """A fifth of the beginnings is lost, and with it some attempts."""
    numbers = _numbers(chance, chance.random(n) < BUSY, 0.8)
    begin_lost = chance.random(n) < 0.2
    seen = np.where(begin_lost, chance.integers(0, numbers + 1), numbers)
    return Made(seen, geometric(0.8), begin_lost=begin_lost)


KINDS = (
    *(control, two_kinds, saturated, tied, ten_tds),
    *(storms, drift, given_up, elsewhere, lost),
)
SHARES = (1, 2, 5, 16)
TARGETS = (1e-2, 1e-3)


def unlike(make: Callable[[int, np.random.Generator], Made], n: int, seed: int) -> Counter[str]:
    """What held in one trace of requests that are not alike."""
    made = make(n, np.random.default_rng(seed))
    chains = chains_of(made)
    curve = attempts(chains, answers_of(chains)).filter(
        pl.col("unit") == "attempts", pl.col("by") == "leaf"
    )
    held: Counter[str] = Counter()
    for within in SHARES:
        row = curve.filter(pl.col("within") <= within).tail(1)
        if not row.is_empty():
            so = row["done_low"][0] <= 1 - made.more(within) <= row["done_high"][0]
            held.update({f"{within} asked": 1, f"{within} so": int(so)})
    for target in TARGETS:
        found = limits(curve, chains, LOSSES.empty(), 1.0, Target(target)).row(0, named=True)
        held.update({f"{target} traces": 1})
        if found["limit"] is not None:
            kept = made.more(found["limit"]) <= target
            best = next(m for m in range(1, 10_000) if made.more(m) <= target)
            over = round(1000 * found["limit"] / best)
            held.update(
                {f"{target} limits": 1, f"{target} kept": int(kept), f"{target} over": over}
            )
    return held


def chains_of(made: Made) -> pl.DataFrame:
    """The chains of a trace, a microsecond apart."""
    seq = np.arange(len(made.numbers))
    columns = {"first_seq": seq, "last_seq": seq, "start_ns": seq * 1000, "n_busy": made.numbers}
    columns["end_ns"] = (seq + made.numbers) * 1000
    outcome = np.full(len(seq), "succeeded") if made.outcome is None else made.outcome
    done = outcome == "succeeded"
    chains = pl.DataFrame(columns).with_columns(
        source=0,
        leaf=6,
        n_segments=1,
        identity=pl.lit("request"),
        outcome=pl.Series(outcome),
        n_attempts=pl.Series(made.numbers + done),
        td_id=pl.Series(seq * 0 if made.td is None else made.td),
        begin_lost=pl.Series(
            np.zeros(len(seq), bool) if made.begin_lost is None else made.begin_lost
        ),
    )
    missing = [name for name in RETRY_CHAINS.schema if name not in chains.columns]
    chains = chains.with_columns(pl.lit(None).alias(name) for name in missing)
    return chains.select(RETRY_CHAINS.schema.names()).cast(RETRY_CHAINS.schema)


def study_unlike(
    n_traces: int, seed: int, n: int, run: Callable[..., Iterator[Counter[str]]]
) -> None:
    """Print a line for each kind: shares that hold; limits given, kept, over the best."""
    head = [
        *(f"S({m})" for m in SHARES),
        *(f"{t:g} {w}" for t in TARGETS for w in ("given", "kept", "over")),
    ]
    print(f"{'kind of trace':<16}" + "".join(f"{name:>12}" for name in head))
    for make in KINDS:
        held: Counter[str] = Counter()
        for result in run(partial(unlike, make, n), range(seed, seed + n_traces)):
            held.update(result)
        columns = [share(held, f"{m} so", f"{m} asked") for m in SHARES]
        for target in TARGETS:
            columns.append(share(held, f"{target} limits", f"{target} traces"))
            columns.append(share(held, f"{target} kept", f"{target} limits"))
            n_limits = held[f"{target} limits"]
            columns.append(f"{held[f'{target} over'] / 1000 / n_limits:.1f}" if n_limits else "-")
        print(f"{make.__name__:<16}" + "".join(f"{c:>12}" for c in columns), flush=True)


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
    wanted = parser.parse_args()
    if wanted.unlike:
        with ProcessPoolExecutor(wanted.processes) as pool:
            for n in wanted.sizes:
                print(f"{n:,} requests")
                run = partial(pool.map, chunksize=5)
                study_unlike(wanted.traces, wanted.seed, n, run)
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
    with ProcessPoolExecutor(wanted.processes) as pool:
        run = partial(pool.map, chunksize=5)
        for cell in cells(tuple(wanted.sizes)):
            print(study(cell, wanted.traces, wanted.seed, run), flush=True)


if __name__ == "__main__":
    main()
