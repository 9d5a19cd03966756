"""Make traces with dependent or unequal requests, which narrow intervals and limits wrongly.

Each kind makes one trace and says what is true of it. Where TDs, inputs, storms or times differ,
the truth is that of a further one, or of the end of the recording.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tdxtrace.tables.findings import RETRY_CHAINS

BUSY = 0.03
PACE_NS = 1_000
"""From one attempt to the next."""
APART_NS = 100_000
"""From one request to the next, if they do not meet."""
_MANY = 4_000_000

Numbers = NDArray[np.int64]
More = Callable[[int], float]


@dataclass(frozen=True)
class Made:
    """One trace, and what is true of what it is to speak for."""

    numbers: Numbers
    """How often each request is busy."""
    more: More
    """P(a request needs more than n attempts)."""
    td: Numbers | None = None
    source: Numbers | None = None
    outcome: NDArray[np.str_] | None = None
    begin_lost: NDArray[np.bool_] | None = None
    start_ns: Numbers | None = None
    """Where requests wait for one holder they start together."""


Kind = Callable[[int, np.random.Generator], Made]


def geometric(stays: float, share: float = BUSY) -> More:
    """P(needs more than n) where so many are busy, and stay so with that chance."""
    return lambda n: share * float(stays ** (n - 1))


def _drawn(numbers: Numbers) -> More:
    """The same of many numbers that were drawn."""
    ordered = np.sort(numbers)
    return lambda n: float(len(ordered) - np.searchsorted(ordered, n, "left")) / len(ordered)


def _numbers(chance: np.random.Generator, is_busy: NDArray[np.bool_], stays: object) -> Numbers:
    return np.where(is_busy, chance.geometric(1 - np.asarray(stays), len(is_busy)), 0)


def _alone(draw: Callable[[int, np.random.Generator], Numbers], more: More) -> Kind:
    """Independent requests; ``draw`` gives the numbers of those that are busy."""

    def make(n: int, chance: np.random.Generator) -> Made:
        numbers = np.zeros(n, np.int64)
        busy = np.flatnonzero(chance.random(n) < BUSY)
        numbers[busy] = draw(len(busy), chance)
        return Made(numbers, more)

    return make


def _lognormal(n: int, chance: np.random.Generator) -> Numbers:
    return np.ceil(chance.lognormal(0.5, 1.5, n)).astype(np.int64)


def _weibull(n: int, chance: np.random.Generator) -> Numbers:
    return np.maximum(np.ceil(2 * chance.weibull(0.5, n)), 1).astype(np.int64)


def _pareto(n: int, chance: np.random.Generator) -> Numbers:
    return np.ceil((chance.random(n) ** -0.5 - 1) / 0.5 + 1e-9).astype(np.int64)


def _periodic(n: int, chance: np.random.Generator) -> Numbers:
    return chance.integers(1, 13, n)


def _plateaus(n: int, chance: np.random.Generator) -> Numbers:
    return chance.choice([1, 4, 8, 64], n, p=[0.6, 0.25, 0.1, 0.05])


@cache
def _share_of(draw: Callable[[int, np.random.Generator], Numbers]) -> More:
    drawn = _drawn(draw(_MANY, np.random.default_rng(0)))
    return lambda n: BUSY * drawn(n)


def _of_shape(draw: Callable[[int, np.random.Generator], Numbers]) -> Kind:
    def make(n: int, chance: np.random.Generator) -> Made:
        # Many numbers are drawn for the truth: only when they are asked for.
        return _alone(draw, _share_of(draw))(n, chance)

    return make


def two_kinds(n: int, chance: np.random.Generator) -> Made:
    """Of 1,000 requests one is slow."""
    slow = chance.random(n) < 1e-3
    stays = np.where(slow, 0.97, 2 / 3)
    share, of_slow = geometric(2 / 3, BUSY * 0.999), geometric(0.97, 1e-3)
    numbers = _numbers(chance, slow | (chance.random(n) < BUSY), stays)
    return Made(numbers, lambda m: share(m) + of_slow(m))


def two_kinds_of_busy(n: int, chance: np.random.Generator) -> Made:
    """Of 1,000 requests that are busy one is slow."""
    busy = chance.random(n) < BUSY
    stays = np.where(chance.random(n) < 1e-3, 0.97, 2 / 3)
    share, of_slow = geometric(2 / 3, BUSY * 0.999), geometric(0.97, BUSY * 1e-3)
    return Made(_numbers(chance, busy, stays), lambda m: share(m) + of_slow(m))


def _bursts(first: Numbers, sizes: Numbers, n: int) -> tuple[Numbers, Numbers]:
    """Places of requests three apart, in bursts that begin at ``first``, and their bursts."""
    burst = np.repeat(np.arange(len(first)), sizes)
    rank = np.arange(len(burst)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    place = first[burst] + 3 * rank
    places, at = np.unique(place[place < n], return_index=True)
    return places, burst[place < n][at]


def _waiters(alike: float) -> Kind:
    """Eight wait for one holder, with other requests between them."""

    def draw(n_bursts: int, chance: np.random.Generator) -> tuple[Numbers, Numbers]:
        burst = np.repeat(np.arange(n_bursts), 8)
        held = chance.geometric(1 / 3, n_bursts)[burst]
        pace = chance.lognormal(0, alike, len(burst))
        return burst, np.maximum(np.round(held * pace), 1).astype(np.int64)

    def make(n: int, chance: np.random.Generator) -> Made:
        first = np.flatnonzero(chance.random(n) < BUSY / 8)
        places, burst = _bursts(first, np.full(len(first), 8), n)
        _, drawn = draw(len(first), chance)
        numbers, start = np.zeros(n, np.int64), np.arange(n) * APART_NS
        numbers[places] = drawn[burst * 8 + (places - first[burst]) // 3 % 8]
        start[places] = first[burst] * APART_NS + (places - first[burst]) * 10
        return Made(numbers, more_of(), start_ns=start)

    @cache
    def more_of() -> More:
        drawn = _drawn(draw(_MANY // 8, np.random.default_rng(0))[1])
        return lambda m: BUSY * drawn(m)

    return make


def hawkes(n: int, chance: np.random.Generator) -> Made:
    """A busy request makes 0.9 others busy, and all of a burst are as slow as each other."""
    first = np.flatnonzero(chance.random(n) < BUSY * 0.1)
    sizes = np.ones(len(first), np.int64)
    children = sizes.copy()
    while children.any():
        children = chance.poisson(0.9 * children)
        sizes += children
    places, burst = _bursts(first, sizes, n)
    numbers = np.zeros(n, np.int64)
    stays = chance.uniform(0.4, 0.85, len(first))
    numbers[places] = chance.geometric(1 - stays[burst])
    return Made(numbers, _of_hawkes())


@cache
def _of_hawkes() -> More:
    chance = np.random.default_rng(0)
    stays = chance.uniform(0.4, 0.85, _MANY)
    n = 4_000_000
    first = np.flatnonzero(chance.random(n) < BUSY * 0.1)
    sizes = np.ones(len(first), np.int64)
    children = sizes.copy()
    while children.any():
        children = chance.poisson(0.9 * children)
        sizes += children
    share = len(_bursts(first, sizes, n)[0]) / n
    drawn = _drawn(chance.geometric(1 - stays))
    return lambda m: share * drawn(m)


def on_and_off(n: int, chance: np.random.Generator) -> Made:
    """Two rates take turns, for some 100 requests each."""
    turns = chance.geometric(0.01, n // 20 + 10)
    is_on = np.repeat(np.arange(len(turns)) % 2 == chance.integers(2), turns)[:n]
    busy = chance.random(n) < np.where(is_on, 0.05, 0.01)
    return Made(_numbers(chance, busy, 2 / 3), geometric(2 / 3))


def _lognormal_bursts(n: int, chance: np.random.Generator) -> tuple[Numbers, Numbers]:
    first = np.flatnonzero(chance.random(n) < BUSY / 6)
    sizes = np.ceil(chance.lognormal(1.0, 1.2, len(first))).astype(np.int64)
    burst = np.repeat(np.arange(len(first)), sizes)
    steps = chance.geometric(0.2, len(burst))
    steps[np.cumsum(sizes) - sizes] = 0
    walked = np.cumsum(steps)
    place = first[burst] + walked - walked[np.cumsum(sizes) - sizes][burst]
    slow = chance.uniform(0.4, 0.85, len(first))
    places, at = np.unique(place[place < n], return_index=True)
    return places, chance.geometric(1 - slow[burst[place < n][at]])


def lognormal_bursts(n: int, chance: np.random.Generator) -> Made:
    """Bursts of lognormal size, with other requests between theirs, each as slow as another."""
    places, drawn = _lognormal_bursts(n, chance)
    numbers = np.zeros(n, np.int64)
    numbers[places] = drawn
    return Made(numbers, _of_lognormal_bursts())


@cache
def _of_lognormal_bursts() -> More:
    places, drawn = _lognormal_bursts(_MANY, np.random.default_rng(0))
    more = _drawn(drawn)
    return lambda m: len(places) / _MANY * more(m)


def _saturated(share: float) -> Kind:
    """Most are busy, in blocks of eight that wait for one holder."""

    def make(n: int, chance: np.random.Generator) -> Made:
        block = np.arange(n) // 8
        of_block = chance.geometric(1 / 3, n)[block]
        start = block * 8 * APART_NS + np.arange(n) % 8 * 10
        busy = chance.random(n) < share
        return Made(np.where(busy, of_block, 0), geometric(2 / 3, share), start_ns=start)

    return make


def saturated_without_times(n: int, chance: np.random.Generator) -> Made:
    """Blocks of eight are alike, but nothing shows that they meet."""
    made = _saturated(0.9)(n, chance)
    return Made(made.numbers, made.more)


def _rates(chance: np.random.Generator, n: int) -> NDArray[np.float64]:
    return np.minimum(BUSY * chance.lognormal(-0.125, 0.5, n), 0.5)


def ten_tds(n: int, chance: np.random.Generator) -> Made:
    """Ten TDs that differ, and a new one."""
    rates, td = _rates(chance, 11), chance.integers(0, 10, n)
    numbers = _numbers(chance, chance.random(n) < rates[td], 2 / 3)
    return Made(numbers, geometric(2 / 3, rates[10]), td)


def ten_like_tds(n: int, chance: np.random.Generator) -> Made:
    """Ten TDs that do not differ, and a new one."""
    numbers = _numbers(chance, chance.random(n) < BUSY, 2 / 3)
    return Made(numbers, geometric(2 / 3), chance.integers(0, 10, n))


def ten_inputs(n: int, chance: np.random.Generator) -> Made:
    """Ten inputs that differ, one after the other, and a new one."""
    rates, source = _rates(chance, 11), np.arange(n) * 10 // n
    numbers = _numbers(chance, chance.random(n) < rates[source], 2 / 3)
    return Made(numbers, geometric(2 / 3, rates[10]), source=source)


def six_storms(n: int, chance: np.random.Generator) -> Made:
    """Six storms that differ, one after the other, and a new one."""
    rates, storm = _rates(chance, 7), np.arange(n) * 6 // n
    numbers = _numbers(chance, chance.random(n) < rates[storm], 2 / 3)
    return Made(numbers, geometric(2 / 3, rates[6]))


def drift(n: int, chance: np.random.Generator) -> Made:
    """Busy requests stay so for longer and longer."""
    numbers = _numbers(chance, chance.random(n) < BUSY, np.linspace(0.3, 0.75, n))
    return Made(numbers, geometric(0.75))


def _given_up(kind: Kind) -> Kind:
    """All give up after sixteen calls."""

    def make(n: int, chance: np.random.Generator) -> Made:
        made = kind(n, chance)
        outcome = np.where(made.numbers >= 16, "abandoned", "succeeded")
        return Made(np.minimum(made.numbers, 16), made.more, outcome=outcome)

    return make


def _geometric(stays: float) -> Kind:
    return _alone(lambda n, chance: chance.geometric(1 - stays, n), geometric(stays))


def elsewhere(n: int, chance: np.random.Generator) -> Made:
    """Of three of ten that are busy another thread does the work as soon as it can."""
    made = _geometric(0.8)(n, chance)
    settled = (made.numbers > 0) & (chance.random(n) < 0.3)
    outcome = np.where(settled, "resolved_elsewhere", "succeeded")
    return Made(made.numbers, made.more, outcome=outcome)


def _long_ones_cut(n: int, chance: np.random.Generator) -> Made:
    """At each attempt a request is lost from sight with chance 5 %."""
    made = _of_shape(_weibull)(n, chance)
    seen = chance.geometric(0.05, n)
    outcome = np.where(seen <= made.numbers, "cut", "succeeded")
    return Made(np.minimum(made.numbers, seen), made.more, outcome=outcome)


def _lost_anywhere(kind: Kind) -> Kind:
    """A fifth of the beginnings is lost, and with it some attempts."""

    def make(n: int, chance: np.random.Generator) -> Made:
        made = kind(n, chance)
        begin_lost = chance.random(n) < 0.2
        seen = np.where(begin_lost, chance.integers(0, made.numbers + 1), made.numbers)
        return Made(seen, made.more, begin_lost=begin_lost)

    return make


def _lost_while_spinning(kind: Kind) -> Kind:
    """At each attempt events are lost with chance 20 %; what comes after is another request."""

    def make(n: int, chance: np.random.Generator) -> Made:
        made = kind(n, chance)
        seen = chance.geometric(0.2, n)
        is_cut = seen <= made.numbers
        rest = np.maximum(made.numbers - seen, 0)
        numbers = np.column_stack([np.minimum(made.numbers, seen), rest])
        shown = np.column_stack([np.ones(n, bool), is_cut]).ravel()
        outcome = np.column_stack([np.where(is_cut, "cut", "succeeded"), np.full(n, "succeeded")])
        begin_lost = np.column_stack([np.zeros(n, bool), np.ones(n, bool)])
        return Made(
            numbers.ravel()[shown],
            made.more,
            outcome=outcome.ravel()[shown],
            begin_lost=begin_lost.ravel()[shown],
        )

    return make


KINDS: dict[str, Kind] = {
    "geometric (control)": _geometric(2 / 3),
    "two kinds, of requests": two_kinds,
    "two kinds, of busy ones": two_kinds_of_busy,
    "lognormal": _of_shape(_lognormal),
    "Weibull": _of_shape(_weibull),
    "periodic, bounded": _of_shape(_periodic),
    "plateaus 1, 4, 8, 64": _of_shape(_plateaus),
    "self-exciting bursts": hawkes,
    "lognormal bursts": lognormal_bursts,
    "on and off": on_and_off,
    "8 waiters for a holder": _waiters(0.5),
    "8 tied waiters": _waiters(0.0),
    "half busy, in blocks": _saturated(0.5),
    "saturated, in blocks": _saturated(0.9),
    "saturated, no times": saturated_without_times,
    "10 TDs": ten_tds,
    "10 like TDs": ten_like_tds,
    "10 inputs": ten_inputs,
    "6 storms": six_storms,
    "drift": drift,
    "given up at 16": _given_up(_geometric(0.85)),
    "given up, light": _given_up(_geometric(2 / 3)),
    "given up, two kinds": _given_up(two_kinds),
    "given up, Pareto": _given_up(_of_shape(_pareto)),
    "settled elsewhere": elsewhere,
    "Weibull, cut": _long_ones_cut,
    "lost anywhere": _lost_anywhere(_geometric(0.8)),
    "lost while spinning": _lost_while_spinning(_geometric(0.8)),
    "Weibull, lost spinning": _lost_while_spinning(_of_shape(_weibull)),
}


def chains_of(made: Made, leaf: int = 6) -> pl.DataFrame:
    """The chains of a trace; those of one leaf, of which several traces may be together."""
    n = len(made.numbers)
    seq = np.arange(n)
    start = seq * APART_NS if made.start_ns is None else made.start_ns
    outcome = np.full(n, "succeeded") if made.outcome is None else made.outcome
    zeros = np.zeros(n, np.int64)
    columns: dict[str, Any] = {
        "source": zeros if made.source is None else made.source,
        "first_seq": seq + (leaf << 32),
        "last_seq": seq + (leaf << 32),
        "leaf": zeros + leaf,
        "td_id": zeros if made.td is None else made.td,
        "start_ns": start,
        "end_ns": start + (made.numbers + 1) * PACE_NS,
        "n_busy": made.numbers,
        "n_attempts": made.numbers + (outcome == "succeeded"),
        "outcome": outcome,
        "n_segments": zeros + 1,
        "identity": np.full(n, "request"),
        "begin_lost": zeros > 0 if made.begin_lost is None else made.begin_lost,
    }
    chains = pl.DataFrame(columns)
    missing = [name for name in RETRY_CHAINS.schema if name not in chains.columns]
    chains = chains.with_columns(pl.lit(None).alias(name) for name in missing)
    return chains.select(RETRY_CHAINS.schema.names()).cast(RETRY_CHAINS.schema)
