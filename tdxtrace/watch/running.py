"""What was seen so far: counters by leaf, vCPU and cause, in memory that does not grow."""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Final

import polars as pl

from tdxtrace.tdx import leaves, operands, word
from tdxtrace.tdx.status import is_retryable
from tdxtrace.watch.chains import Chains
from tdxtrace.watch.counters import MOST_ATTEMPTS, Leaf, Vcpu
from tdxtrace.watch.ticks import Tick

_VP_ENTER: Final = leaves.parse_leaf("TDH.VP.ENTER")[0]
_BUSY_SEPT: Final = word.TDX_OPERAND_BUSY | word.TDX_OPERAND_ID_SEPT
# KVM's word for an entry that failed: Linux 6.16 arch/x86/kvm/vmx/tdx.c,
# tdx_to_vmx_exit_reason.
_NOT_ENTERED: Final = 0xFFFF_FFFF
# Threads and vCPUs of which something is kept; the longest unheard of are forgotten.
_MOST_KEPT: Final = 4096
_MOST_WORST: Final = 5


@dataclass(slots=True)
class Running:
    """Everything since the watch began."""

    chains: Chains = field(default_factory=Chains)
    leaves: dict[str, Leaf] = field(default_factory=dict)
    busy: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Busy answers by leaf and what was busy."""
    vcpus: OrderedDict[int, Vcpu] = field(default_factory=OrderedDict)
    comms: OrderedDict[int, str] = field(default_factory=OrderedDict)
    worst: list[dict[str, Any]] = field(default_factory=list)
    """The chains of most attempts, ended or not."""
    n_events: int = 0
    n_lost: int = 0
    n_refused: int = 0
    """Entries refused by zero-step mitigation, also of vCPUs that were forgotten."""
    n_episodes: int = 0
    began: float = field(default_factory=time.monotonic)
    rates: Mapping[str, float] = field(default_factory=dict)
    _looked: float = field(default_factory=time.monotonic)

    def take(self, tick: Tick) -> None:
        """Add what came since the last look."""
        ended = self.chains.feed(tick.seamcalls, tick.losses, tick.last_ns)
        for tid, comm in tick.comms.items():
            _touch(self.comms, tid, comm)
        n_busy = self._take_calls(tick.seamcalls)
        self._take_chains(ended)
        self._take_entries(tick)
        lost = _n_lost(tick.losses)
        self.n_events += tick.n_events
        self.n_lost += lost
        now = time.monotonic()
        seconds = max(now - self._looked, 1e-9)
        self._looked = now
        counted = (tick.n_events, tick.seamcalls.height, n_busy, lost)
        names = ("events", "seamcalls", "busy", "lost")
        self.rates = {name: n / seconds for name, n in zip(names, counted, strict=True)}

    def _take_calls(self, calls: pl.DataFrame) -> int:
        if calls.is_empty():
            return 0
        for leaf, n in calls.group_by("leaf").len().iter_rows():
            self._leaf(leaf).n_calls += n
        busy = calls.filter(is_retryable(pl.col("status")).fill_null(False))
        what = busy.group_by(
            "leaf", what=operands.resource(pl.col("status"), pl.col("leaf")).fill_null("other")
        ).len()
        for leaf, resource, n in what.iter_rows():
            self._leaf(leaf).n_busy += n
            self.busy[_name(leaf), resource] += n
        return busy.height

    def _take_chains(self, ended: pl.DataFrame) -> None:
        counts = ended.group_by(
            "leaf", "outcome", attempts=pl.col("n_attempts").clip(upper_bound=MOST_ATTEMPTS)
        ).agg(
            n=pl.len(),
            retried=(pl.col("n_busy") > 0).sum(),
            most=pl.col("n_attempts").max(),
            longest=pl.col("took_ns").max(),
        )
        for leaf, outcome, attempts, n, retried, most, longest in counts.iter_rows():
            one = self._leaf(leaf)
            one.n_requests += n
            one.n_retried += retried
            one.outcomes[outcome] += n
            one.attempts[attempts] += n
            one.max_attempts = max(one.max_attempts, most)
            one.max_ns = max(one.max_ns, longest or 0)
        top = ended.filter(pl.col("n_attempts") > 1).top_k(_MOST_WORST, by="n_attempts")
        self._take_worst(top)

    def _take_worst(self, top: pl.DataFrame) -> None:
        found = [
            {
                "leaf": _name(row["leaf"]),
                "tid": row["tid"],
                "comm": self.comms.get(row["tid"], ""),
                "gpa": row["gpa"],
                "attempts": row["n_attempts"],
                "took_ns": row["took_ns"],
                "outcome": row["outcome"],
            }
            for row in top.iter_rows(named=True)
        ]
        every = sorted(self.worst + found, key=lambda one: -int(one["attempts"]))
        self.worst = every[:_MOST_WORST]

    def _take_entries(self, tick: Tick) -> None:
        entering = tick.seamcalls.filter(pl.col("leaf") == _VP_ENTER, pl.col("tid").is_not_null())
        refused = pl.col("refused")
        marked = entering.sort("seq").select(
            "tid", refused=(pl.col("status") == _BUSY_SEPT).fill_null(False)
        )
        begins = refused & ~refused.shift(1).over("tid").fill_null(False)
        rows = (
            marked.with_columns(begins=begins)
            .group_by("tid")
            .agg(
                refused.sum(),
                pl.col("begins").sum(),
                refused.first().alias("first"),
                last=refused.last(),
            )
        )
        for tid, n, begun, first, last in rows.iter_rows():
            one = self.vcpus.get(tid)
            if one is None and not n:
                continue
            one = one or Vcpu()
            episodes = begun - int(first and one.is_refused)
            one.n_refused += n
            one.episodes += episodes
            one.is_refused = last
            self.n_refused += n
            self.n_episodes += episodes
            _touch(self.vcpus, tid, one)
        failed = tick.vm_entries.filter(
            pl.col("exit_reason") == _NOT_ENTERED, pl.col("tid").is_not_null()
        )
        for tid, n in failed.group_by("tid").len().iter_rows():
            one = self.vcpus.get(tid) or Vcpu()
            one.n_failed += n
            _touch(self.vcpus, tid, one)

    def _leaf(self, number: int) -> Leaf:
        return self.leaves.setdefault(_name(number), Leaf())

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data, for one line of JSON."""
        return {
            "seconds": round(time.monotonic() - self.began, 3),
            "events": self.n_events,
            "lost": self.n_lost,
            "rates": {name: round(rate, 1) for name, rate in self.rates.items()},
            "in_flight": self.chains.n_in_flight,
            "in_flight_max_attempts": self.chains.most_in_flight,
            "given_up": self.chains.n_given_up,
            "leaves": {name: one.to_dict() for name, one in sorted(self.leaves.items())},
            "busy": [
                {"leaf": leaf, "resource": what, "n": n}
                for (leaf, what), n in self.busy.most_common()
            ],
            "vcpus": [
                {"tid": tid, "comm": self.comms.get(tid, ""), **one.to_dict()}
                for tid, one in self.vcpus.items()
            ],
            "worst": self.worst,
        }

    def quantity(self, name: str) -> float:
        """What a threshold of that name is held against; see QUANTITIES."""
        return QUANTITIES[name](self)


def _outcome(name: str) -> Callable[[Running], float]:
    return lambda r: sum(one.outcomes[name] for one in r.leaves.values())


def _most(running: Running) -> float:
    """Also of chains in flight: an endless one never ends."""
    ended = (one.max_attempts for one in running.leaves.values())
    return max(running.chains.most_in_flight, *ended, 0)


# The names of tdxtrace.analysis.thresholds.QUANTITIES, asked of what was seen so far.
QUANTITIES: Final[Mapping[str, Callable[[Running], float]]] = {
    "max-attempts": _most,
    "max-chain-ms": lambda r: max((o.max_ns for o in r.leaves.values()), default=0) / 1e6,
    "retried-seamcalls": lambda r: sum(one.n_retried for one in r.leaves.values()),
    "busy": lambda r: sum(one.n_busy for one in r.leaves.values()),
    "abandoned": _outcome("abandoned"),
    "failed": _outcome("failed"),
    "cut": _outcome("cut"),
    "zero-steps": lambda r: r.n_episodes,
    "losses": lambda r: r.n_lost,
}


def _name(leaf: int) -> str:
    """The leaf's name, or its number."""
    return _names().get(leaf, f"leaf {leaf}")


@cache
def _names() -> dict[int, str]:
    return dict(leaves.leaf_table().select("leaf", "name").iter_rows())


def _touch(kept: OrderedDict[int, Any], key: int, value: Any) -> None:  # noqa: ANN401
    """Keep a value as the latest; forget the one that was not touched for longest."""
    kept[key] = value
    kept.move_to_end(key)
    while len(kept) > _MOST_KEPT:
        kept.popitem(last=False)


def _n_lost(losses: pl.DataFrame) -> int:
    """Events lost; a loss of an unknown number counts as one."""
    lost = losses.filter(pl.col("severity") == "data_loss")
    return int(lost["n_events"].fill_null(1).sum())
