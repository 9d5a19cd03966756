"""Running totals of a live trace: counters by leaf, vCPU and busy resource, in bounded memory."""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Final

import polars as pl

from tdxtrace.analysis import retry_chains
from tdxtrace.analysis.retry_chains import ChainState
from tdxtrace.analysis.zero_steps import RefusalState, count_refusals
from tdxtrace.ingest.histogram import OUTCOMES
from tdxtrace.tables.attempt_cells import max_attempts_in
from tdxtrace.tables.histograms import COMPLETE
from tdxtrace.tdx import leaves, operands
from tdxtrace.tdx.status import describe_status, is_retryable
from tdxtrace.watch.counts import CountTick
from tdxtrace.watch.ticks import Tick

# Exit reason of a failed entry in kvm_exit: Linux 6.16 arch/x86/kvm/vmx/tdx.c,
# tdx_to_vmx_exit_reason.
_NOT_ENTERED: Final = 0xFFFF_FFFF
# Maximum threads and vCPUs kept; the least recently updated are dropped.
_MAX_THREADS: Final = 4096
# Steps kept of vCPUs, three at most of each.
_MAX_STEPS: Final = 3 * _MAX_THREADS
_N_WORST: Final = 5
# Leaves, and leaves with what was busy, that are kept apart: those of a module are some hundred.
_MAX_KINDS: Final = 1024
_OTHERS: Final = "(other leaves)", "(others)"
# Time without a new attempt after which a chain is in flight no more.  A choice.
_STALE_NS: Final = 60 * 1_000_000_000
# Attempts from here on are counted together: more than any recommendation needs.
MAX_ATTEMPTS: Final = 1024


@dataclass(slots=True)
class LeafCounters:
    """Counters of one leaf."""

    n_requests: int = 0
    n_calls: int = 0
    n_busy: int = 0
    n_retried: int = 0
    max_attempts: int = 0
    max_ns: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    attempts: Counter[int] = field(default_factory=Counter)
    """Requests by number of attempts; MAX_ATTEMPTS stands for that many or more."""

    def quantile(self, share: float) -> int:
        """Return the attempts within which this share of requests ended; 0 without requests."""
        left = share * self.n_requests
        for attempts in sorted(self.attempts):
            left -= self.attempts[attempts]
            if left <= 0:
                return attempts
        return self.max_attempts

    def to_dict(self) -> dict[str, Any]:
        """The counters as plain data."""
        return {
            "requests": self.n_requests,
            "seamcalls": self.n_calls,
            "busy": self.n_busy,
            "retried": self.n_retried,
            "p50": self.quantile(0.5),
            "p99": self.quantile(0.99),
            "max_attempts": self.max_attempts,
            "max_ns": self.max_ns,
            "outcomes": dict(self.outcomes),
        }


@dataclass(slots=True)
class VcpuCounters:
    """Counters of the entries of one vCPU thread."""

    n_refused: int = 0
    """Entries refused: TDH.VP.ENTER answered BUSY with operand SEPT (zero-step mitigation)."""
    episodes: int = 0
    """Zero-step episodes, by the status of TDH.VP.ENTER."""
    n_failed: int = 0
    """kvm_exit with reason -1: zero-step mitigation, a TRACK, or another error."""

    def to_dict(self) -> dict[str, int]:
        """The counters as plain data."""
        return {"refused": self.n_refused, "episodes": self.episodes, "failed": self.n_failed}


@dataclass(slots=True)
class RunningTotals:
    """Totals since the watch started."""

    chains: ChainState = field(default_factory=retry_chains.start)
    refusals: RefusalState = field(default_factory=RefusalState)
    leaves: dict[str, LeafCounters] = field(default_factory=dict)
    busy: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Busy answers by leaf and busy resource."""
    vcpus: OrderedDict[int, VcpuCounters] = field(default_factory=OrderedDict)
    """Counters by thread ID, the most recently updated last."""
    comms: OrderedDict[int, str] = field(default_factory=OrderedDict)
    """Thread names by thread ID, the most recently updated last."""
    worst: list[dict[str, Any]] = field(default_factory=list)
    """The ended chains with the most attempts."""
    n_events: int = 0
    n_lost: int = 0
    n_refused: int = 0
    """Entries refused by zero-step mitigation, including those of dropped vCPUs."""
    n_episodes: int = 0
    began: float = field(default_factory=time.monotonic)
    rates: Mapping[str, float] = field(default_factory=dict)
    """Events, seamcalls, busy answers and lost events per second, over the last tick."""
    _last_tick: float = field(default_factory=time.monotonic)
    _last_counted_ns: int | None = None
    """Time of the last counts of a histogram, ns."""

    def take(self, tick: Tick) -> None:
        """Add a tick."""
        ended = self._ended(tick)
        for tid, comm in tick.comms.items():
            _put_latest(self.comms, tid, comm)
        n_busy = self._add_calls(tick.seamcalls.group_by("leaf", "status").agg(n=pl.len()))
        self._add_chains(ended)
        self._add_entries(tick)
        lost = _n_lost(tick.losses)
        self.n_events += tick.n_events
        self.n_lost += lost
        now = time.monotonic()
        seconds = max(now - self._last_tick, 1e-9)
        self._last_tick = now
        counted = (tick.n_events, tick.seamcalls.height, n_busy, lost)
        names = ("events", "seamcalls", "busy", "lost")
        self.rates = {name: n / seconds for name, n in zip(names, counted, strict=True)}

    def _ended(self, tick: Tick) -> pl.DataFrame:
        """The chains that ended, or in which nothing happened for long."""
        # The event after a loss that ends a tick is in the next one.
        ends = pl.max_horizontal("start_ns", pl.lit(tick.last_ns, pl.Int64)) + 1
        losses = tick.losses.with_columns(pl.col("end_ns").fill_null(ends))
        ended = retry_chains.step(self.chains, tick.seamcalls, losses)
        if tick.last_ns is None:
            return ended
        return pl.concat([ended, retry_chains.evict_old(self.chains, tick.last_ns - _STALE_NS)])

    def replace_counts(self, tick: CountTick) -> None:
        """Replace counters by those of a histogram, which count from its beginning.

        Attempts above 64 are counted by powers of two: maxima are the least that they can be,
        quantiles the most.
        """
        before = (self.n_events, sum(self.busy.values()), self.n_lost)
        self.leaves.clear()
        self.busy.clear()
        histogram = tick.histogram
        statuses = [
            (leaf, high << 32 | low, n) for (_, leaf, high, low), n in histogram.statuses.items()
        ]
        schema = {"leaf": pl.UInt16, "status": pl.UInt64, "n": pl.UInt64}
        n_busy = self._add_calls(pl.DataFrame(statuses, schema=schema, orient="row"))
        for (_, leaf, outcome, attempts), n in tick.requests.items():
            self._add_requests(leaf, OUTCOMES[outcome], attempts, n)
        for leaf, cells in histogram.took_ns.items():
            self._leaf(leaf).max_ns = max((low for low, _, n in cells if n), default=0)
        self.n_events = sum(n for _, _, n in statuses)
        self.n_lost = sum(histogram.cannot.values()) + histogram.n_not_kept
        counted = (self.n_events, n_busy, self.n_lost)
        seconds = (histogram.last_ns - (self._last_counted_ns or histogram.first_ns)) / 1e9
        if seconds > 0:
            self._last_counted_ns = histogram.last_ns
            calls, busy, lost = (
                (n - previous) / seconds for n, previous in zip(counted, before, strict=True)
            )
            self.rates = {"events": calls, "seamcalls": calls, "busy": busy, "lost": lost}

    def _add_requests(self, leaf: int, outcome: str, attempts: int, n: int) -> None:
        counters = self._leaf(leaf)
        counters.n_requests += n
        counters.n_retried += n if attempts > 1 or outcome not in COMPLETE else 0
        counters.outcomes[outcome] += n
        counters.attempts[max_attempts_in(attempts)] += n
        counters.max_attempts = max(counters.max_attempts, attempts)

    def _add_calls(self, calls: pl.DataFrame) -> int:
        """Add calls, counted by leaf and status, to the counters; return the busy answers."""
        if calls.is_empty():
            return 0
        n = pl.col("n").sum()
        for leaf, count in calls.group_by("leaf").agg(n).iter_rows():
            self._leaf(leaf).n_calls += count
        busy = calls.filter(is_retryable(pl.col("status")).fill_null(False))
        status, leaf = pl.col("status"), pl.col("leaf")
        # A status that names no operand says itself what was busy: PREV_TLB_EPOCH_BUSY.
        resource = pl.coalesce(operands.resource(status, leaf), describe_status(status, leaf))
        for leaf, name, count in busy.group_by("leaf", resource=resource).agg(n).iter_rows():
            self._leaf(leaf).n_busy += count
            key = _name(leaf), name
            has_counter = key in self.busy or len(self.busy) < _MAX_KINDS
            self.busy[key if has_counter else _OTHERS] += count
        return int(busy["n"].sum())

    def _add_chains(self, ended: pl.DataFrame) -> None:
        counts = ended.group_by(
            "leaf", "outcome", attempts=pl.col("n_attempts").clip(upper_bound=MAX_ATTEMPTS)
        ).agg(
            n=pl.len(),
            retried=(pl.col("n_busy") > 0).sum(),
            most=pl.col("n_attempts").max(),
            longest=pl.col("took_ns").max(),
        )
        for leaf, outcome, attempts, n, retried, max_attempts, max_ns in counts.iter_rows():
            counters = self._leaf(leaf)
            counters.n_requests += n
            counters.n_retried += retried
            counters.outcomes[outcome] += n
            counters.attempts[attempts] += n
            counters.max_attempts = max(counters.max_attempts, max_attempts)
            counters.max_ns = max(counters.max_ns, max_ns or 0)
        top = ended.filter(pl.col("n_attempts") > 1).top_k(_N_WORST, by="n_attempts")
        self._add_worst(top)

    def _add_worst(self, top: pl.DataFrame) -> None:
        chains = [
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
        ranked = sorted(self.worst + chains, key=lambda chain: -int(chain["attempts"]))
        self.worst = ranked[:_N_WORST]

    def _add_entries(self, tick: Tick) -> None:
        refusals = count_refusals(self.refusals, tick.seamcalls)
        self.refusals.keep_latest(_MAX_STEPS)
        for _, tid, n, n_begun in refusals.filter(pl.col("n_refused") > 0).iter_rows():
            self.n_refused += n
            self.n_episodes += n_begun
            if tid is None:
                continue
            vcpu = self.vcpus.get(tid) or VcpuCounters()
            vcpu.n_refused += n
            vcpu.episodes += n_begun
            _put_latest(self.vcpus, tid, vcpu)
        failed = tick.vm_entries.filter(
            pl.col("exit_reason") == _NOT_ENTERED, pl.col("tid").is_not_null()
        )
        for tid, n in failed.group_by("tid").len().iter_rows():
            vcpu = self.vcpus.get(tid) or VcpuCounters()
            vcpu.n_failed += n
            _put_latest(self.vcpus, tid, vcpu)

    def _leaf(self, number: int) -> LeafCounters:
        name = _name(number)
        if name not in self.leaves and len(self.leaves) >= _MAX_KINDS:
            name = _OTHERS[0]
        return self.leaves.setdefault(name, LeafCounters())

    def to_dict(self) -> dict[str, Any]:
        """The totals as plain data, for one line of JSON."""
        return {
            "seconds": round(time.monotonic() - self.began, 3),
            "events": self.n_events,
            "lost": self.n_lost,
            "rates": {name: round(rate, 1) for name, rate in self.rates.items()},
            "in_flight": self.chains.n_in_flight,
            "in_flight_max_attempts": self.chains.max_attempts_in_flight,
            "given_up": self.chains.n_dropped,
            "leaves": {name: leaf.to_dict() for name, leaf in sorted(self.leaves.items())},
            "busy": [
                {"leaf": leaf, "resource": resource, "n": n}
                for (leaf, resource), n in self.busy.most_common()
            ],
            "vcpus": [
                {"tid": tid, "comm": self.comms.get(tid, ""), **vcpu.to_dict()}
                for tid, vcpu in self.vcpus.items()
            ],
            "worst": self.worst,
        }

    def quantity(self, name: str) -> float:
        """Return the value that a threshold of this name is compared with; see QUANTITIES."""
        return QUANTITIES[name](self)


def _outcome(name: str) -> Callable[[RunningTotals], float]:
    return lambda r: sum(leaf.outcomes[name] for leaf in r.leaves.values())


def _max_attempts(totals: RunningTotals) -> float:
    """Maximum attempts, including chains in flight, as an endless one never ends."""
    ended = (leaf.max_attempts for leaf in totals.leaves.values())
    return max(totals.chains.max_attempts_in_flight, *ended, 0)


# The quantities of tdxtrace.analysis.thresholds.QUANTITIES, computed from the totals.
QUANTITIES: Final[Mapping[str, Callable[[RunningTotals], float]]] = {
    "max-attempts": _max_attempts,
    "max-chain-ms": lambda r: max((leaf.max_ns for leaf in r.leaves.values()), default=0) / 1e6,
    "retried-seamcalls": lambda r: sum(leaf.n_retried for leaf in r.leaves.values()),
    "busy": lambda r: sum(leaf.n_busy for leaf in r.leaves.values()),
    "abandoned": _outcome("abandoned"),
    "failed": _outcome("failed"),
    "cut": _outcome("cut"),
    "zero-steps": lambda r: r.n_episodes,
    "losses": lambda r: r.n_lost,
}


def _name(leaf: int) -> str:
    """Return the leaf's name, or its number."""
    return _names().get(leaf, f"leaf {leaf}")


@cache
def _names() -> dict[int, str]:
    return dict(leaves.leaf_table().select("leaf", "name").iter_rows())


def _put_latest(latest: OrderedDict[int, Any], key: int, value: Any) -> None:  # noqa: ANN401
    """Store a value as the most recent; drop the least recent above _MAX_THREADS."""
    latest[key] = value
    latest.move_to_end(key)
    while len(latest) > _MAX_THREADS:
        latest.popitem(last=False)


def _n_lost(losses: pl.DataFrame) -> int:
    """Return the number of lost events; a loss of unknown size counts as one."""
    lost = losses.filter(pl.col("severity") == "data_loss")
    return int(lost["n_events"].fill_null(1).sum())
