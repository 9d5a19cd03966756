"""Score of the replay: replayed intervals of a policy against simulated runs of that policy."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from tdxtrace.errors import QueryError
from tdxtrace.recommend import policy_definitions
from tdxtrace.recommend.replay import policies
from tdxtrace.simulate import scenario
from tdxtrace.simulate.engine import Run
from tdxtrace.simulate.journal import Request
from tdxtrace.simulate.kvm.policies import Policy, policy_named
from tdxtrace.simulate.module import abi
from tdxtrace.validate.captured import capture_run
from tdxtrace.validate.cells import Cell, Plan
from tdxtrace.validate.matrix import run_in_processes, simulated

# Leaves that a simulated policy limits; it repeats TDH.VP.ENTER without a limit.
_INSTALLS: Final = ("TDH.MEM.PAGE.AUG", "TDH.MEM.SEPT.ADD")
_ZAPS: Final = ("TDH.MEM.RANGE.BLOCK", "TDH.MEM.TRACK", "TDH.MEM.PAGE.REMOVE")
# Runs with contention in which every actor obeys the policy: name, generation, length in ms.
# The attacks churn_blocks and refused faults do not obey it; page_split repeats DEMOTE, which the
# policy does not cover.
SCENARIOS: Final = (
    ("balloon", "C", 8),
    ("boot_storm", "A", 2),
    ("conversion_churn", "C", 8),
    ("fresh_memory", "A", 2),
    ("host_gives_up", "C", 6),
    ("hostile_guest", "C", 8),
    ("hostile_guest", "B", 8),
    ("memslot_deletion", "C", 8),
    ("prefault_race", "A", 2),
)
REPLAYED: Final = ("mainline", "v1-series", "seed-loop", "fixed-1", "fixed-2", "fixed-5")
RECORDED: Final = ("endless", "mainline")
MIN_HELD: Final = 0.95
"""Minimum share of the seeds whose interval contains the truth, as its confidence is 95 %."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One leaf of one policy, replayed from one recording and simulated with the same seed."""

    scenario: str
    """Name of the scenario, and generation of the module."""
    recorded: str
    policy: str
    leaf: str
    seed: int
    n_stopped: int
    """Number of requests at which the simulated policy stopped."""
    n_requests: int
    low: float
    high: float
    ratio: float | None

    @property
    def truth(self) -> float:
        """Share of the requests at which the simulated policy stopped."""
        return self.n_stopped / self.n_requests

    @property
    def is_held(self) -> bool:
        """Whether the interval contains the truth."""
        return self.low <= self.truth <= self.high


def select_scenarios(names: Sequence[str]) -> list[tuple[str, str, int]]:
    """Return the rows of SCENARIOS with these names; all rows if ``names`` is empty.

    Raises:
        QueryError: If a name is not in SCENARIOS.
    """
    known = [name for name, _, _ in SCENARIOS]
    for name in names:
        if name not in known:
            raise QueryError(f"no replay of scenario {name!r}; choose from: {', '.join(known)}")
    return [row for row in SCENARIOS if not names or row[0] in names]


def compare(
    seeds: Sequence[int], scenarios: Sequence[tuple[str, str, int]] = SCENARIOS, jobs: int = 0
) -> list[Comparison]:
    """Replay policies over recordings of other policies, and compare with runs of the policies.

    Args:
        seeds: Seeds; for each, every scenario is simulated once with each policy.
        scenarios: Rows of SCENARIOS.
        jobs: Number of processes; 0: one per CPU.

    Returns:
        A comparison for each leaf that was busy in the recording or under the policy.
    """
    work = [(*row, seed) for row, seed in itertools.product(scenarios, seeds)]
    done = dict(run_in_processes(_compared, work, jobs))
    return [comparison for item in work for comparison in done[item]]


_Item = tuple[str, str, int, int]


def _compared(item: _Item) -> tuple[_Item, list[Comparison]]:
    name, generation, ms, seed = item
    kernel = scenario.named(name).kernel
    plans = {
        policy: Plan(name, generation, policy, seed, ms, kernel)
        for policy in dict.fromkeys((*RECORDED, *REPLAYED))
    }
    runs = {policy: simulated(plan) for policy, plan in plans.items()}
    return item, [
        comparison
        for recorded in RECORDED
        for comparison in _replayed(runs, Cell(plans[recorded], "trace-cmd", ("raw", "ns")))
    ]


def _replayed(runs: dict[str, Run], cell: Cell) -> Iterator[Comparison]:
    recorded = cell.plan.policy
    captured = capture_run(runs[recorded], cell)
    if captured is None:
        return
    chosen = [policy_definitions.policy_named(name) for name in REPLAYED if name != recorded]
    table = policies(captured.findings.retry_chains, captured.findings.busy_answers, chosen)
    rows = {(row["policy"], row["leaf"]): row for row in table.iter_rows(named=True)}
    for policy, leaf in itertools.product(chosen, (*_INSTALLS, *_ZAPS)):
        row = rows.get((policy.name, abi.LEAF[leaf]))
        requests = [r for r in runs[policy.name].journal.requests if r.leaf == leaf]
        if row is None or not requests:
            continue
        if row["n_retried"] or any(abi.is_busy(r.calls[0].status) for r in requests):
            yield _comparison(cell.plan, row, leaf, requests)


def _comparison(plan: Plan, row: dict[str, Any], leaf: str, requests: list[Request]) -> Comparison:
    policy = policy_named(row["policy"])
    n_stopped = sum(has_stopped(request, policy) for request in requests)
    ends = row["exceeding_low"], row["exceeding_high"], row["exceeding_ratio"]
    return Comparison(
        *(
            f"{plan.scenario} {plan.generation}",
            plan.policy,
            policy.name,
            leaf,
            plan.seed,
            n_stopped,
            len(requests),
        ),
        *ends,
    )


def has_stopped(request: Request, policy: Policy) -> bool:
    """Return whether a simulated policy abandoned a request, or killed the VM because of it.

    Args:
        request: A request of a run with that policy.
        policy: The policy.
    """
    limit = _limit(request.leaf, policy)
    for number, call in enumerate(request.calls, 1):
        if not abi.is_busy(call.status):
            return False
        wrong = policy.exactly_sept and request.leaf != "TDH.MEM.TRACK"
        if wrong and call.status != abi.OPERAND_BUSY | abi.OPERAND["SEPT_TREE"]:
            return True
        if number == limit:
            return True
    return False


def _limit(leaf: str, policy: Policy) -> int | None:
    """Return the number of calls after which the policy stops; None if unlimited."""
    if policy.doubling_from:
        return policy.bug_at
    if leaf in _INSTALLS:
        return None if policy.local_loop else policy.install_calls or None
    return (policy.track_calls if leaf == "TDH.MEM.TRACK" else policy.zap_calls) or None


def share_held(comparisons: Iterable[Comparison]) -> float | None:
    """Return the share of comparisons whose interval contains the truth; None if empty."""
    held = [comparison.is_held for comparison in comparisons]
    return sum(held) / len(held) if held else None


def table(comparisons: Sequence[Comparison]) -> list[list[str]]:
    """Return table rows for display: a heading, then one row per policy, recording, scenario, leaf.

    The ends of the interval are medians over the seeds; ``withheld`` counts comparisons without a
    share.
    """
    head = ["policy", "recorded", "scenario", "TDH.", "truth", "replayed", "withheld", "held"]
    groups: dict[tuple[str, ...], list[Comparison]] = {}
    for c in comparisons:
        groups.setdefault((c.policy, c.recorded, c.scenario, c.leaf), []).append(c)
    rows = [
        [*key[:3], key[3].removeprefix("TDH."), *_figures(groups[key])] for key in sorted(groups)
    ]
    return [head, *rows, ["all", "", "", "", *_figures(comparisons)]]


def _figures(part: Sequence[Comparison]) -> list[str]:
    n = sum(c.n_requests for c in part)
    truth = sum(c.n_stopped for c in part) / n if n else 0.0
    low, high = (float(np.median([getattr(c, end) for c in part])) for end in ("low", "high"))
    return [
        f"{truth:.2%}",
        f"{low:.2%} to {high:.2%}",
        f"{sum(c.ratio is None for c in part)}/{len(part)}",
        f"{sum(c.is_held for c in part)}/{len(part)}",
    ]
