"""The ``policies`` table: replay of retry policies over the recorded requests."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any, Final

import numpy as np
import polars as pl

from tdxtrace.intervals import CONFIDENCE, exact_interval, few_clusters_factor, interval_of_sum
from tdxtrace.recommend.loops import KICK, NONE
from tdxtrace.recommend.policy_definitions import (
    DEFAULTS,
    MAX_CALLS,
    DoublingLimit,
    LeafPolicy,
    RetryPolicy,
    policy_named,
)
from tdxtrace.recommend.stops import (
    ANSWER_COLUMNS,
    CHAIN_COLUMNS,
    Events,
    Requests,
    events_of,
    n_not_made,
    n_outpaced,
    n_unanswered,
    requests_of,
    stops_of,
)
from tdxtrace.tables.findings import RETRY_CHAINS
from tdxtrace.tables.limits import BUSY_ANSWERS, POLICIES
from tdxtrace.tdx import leaves, locks, word

_WARNINGS = {
    "source": pl.UInt16,
    "seq": pl.UInt64,
    "raised_to": pl.Int64,
    "bug": pl.Boolean,
}


def policies(
    retry_chains: pl.DataFrame | pl.LazyFrame,
    busy_answers: pl.DataFrame | pl.LazyFrame,
    chosen: Sequence[RetryPolicy] | None = None,
) -> pl.DataFrame:
    """Replay policies over the recorded requests.

    Each request gets the same answers at the same times under every policy. A policy stops at the
    first busy answer after which it makes no further call. A request is undecided where the
    recording cannot show its answers under the policy (:mod:`~tdxtrace.recommend.stops`): it was
    cut or given up before the policy would have stopped; no answer was recorded; the policy kicks
    the vCPUs before its next call, or the recorded kernel may have; it was busy for as long as the
    policy's calls take back to back; or the policy had killed the VM before. Undecided requests
    widen the interval: either none or all of them would have exceeded the policy. Stops that an
    earlier stop of the same VM may have influenced (``n_dependent``) widen it downwards. In both
    cases the ratio itself is withheld.

    Args:
        retry_chains: The ``retry_chains`` table, or a query of it.
        busy_answers: The ``busy_answers`` table of at least these chains, or a query of it.
        chosen: Policies to replay; by default those of the mail and those discussed on the list.

    Returns:
        The ``policies`` table: one row for each policy, in the given order, and leaf that it
        covers.  ``not_known`` describes what the replay cannot determine for the row.

    Raises:
        TableError: If an argument lacks a column or has one of another type.
    """
    if chosen is None:
        chosen = [policy_named(name) for name in DEFAULTS]
    chains = RETRY_CHAINS.pick(retry_chains, *CHAIN_COLUMNS)
    answers = BUSY_ANSWERS.pick(busy_answers, *ANSWER_COLUMNS)
    requests = requests_of(chains, answers)
    rows = [row for policy in chosen for row in _rows_of_policy(policy, requests)]
    return POLICIES.conform(pl.DataFrame(rows, schema=POLICIES.schema))


def _rows_of_policy(policy: RetryPolicy, requests: Requests) -> Iterable[dict[str, Any]]:
    covered = {
        leaf: rule
        for leaf in requests.by_leaf["leaf"]
        if (rule := policy.rule(_leaf_name(leaf))) is not None
    }
    if not covered:
        return
    warnings = _all_warnings(covered, requests)
    is_fatal = np.zeros(len(requests.waited_ns), np.bool_)
    is_fatal[warnings.filter("bug")["place"].to_numpy()] = True
    events = events_of(requests, covered, is_fatal)
    stops = stops_of(requests, covered, events)
    for leaf, n_requests, n_retried in requests.by_leaf.iter_rows():
        if leaf not in covered:
            continue
        rule, of_leaf = covered[leaf], requests.ranges[leaf]
        own_stops = stops.filter(pl.col("leaf") == leaf)
        numbers = {"not made": n_not_made(requests, leaf, events.dead_ns)}
        if _can_stop(rule):
            kicks = "kick" if rule.kicks else "no kick"
            numbers[kicks] = int((events.event[of_leaf] == KICK).sum())
            numbers["no answer"] = n_unanswered(requests, leaf, events.dead_ns)
            numbers["unseen"] = _n_unobserved(requests, of_leaf, events)
            numbers["pace"] = n_outpaced(requests, leaf, events, rule)
        row = {
            "policy": policy.name,
            "leaf": leaf,
            "calls": rule.calls,
            "rising": _doubling_text(rule),
        }
        row |= {"budget_ns": rule.budget_ns, "kicks": rule.kicks, "then": rule.then}
        row |= {"n_requests": n_requests, "n_retried": n_retried}
        row |= _exceeding(own_stops, sum(numbers.values()), n_requests)
        row |= _waiting_times(requests, of_leaf, events) | _warnings(
            requests, of_leaf, events, warnings
        )
        row |= _killed_vms(own_stops)
        numbers["dependent"] = row["n_dependent"]
        yield row | {"not_known": _limitations(rule, row, numbers)}


def _all_warnings(covered: Mapping[int, LeafPolicy], requests: Requests) -> pl.DataFrame:
    """Return the warnings of the doubling limit, which all its leaves share, with ``place``."""
    limits = {leaf: rule.doubling for leaf, rule in covered.items() if rule.doubling is not None}
    for doubling in set(limits.values()):
        inside = requests.answers.filter(pl.col("leaf").is_in(list(limits)))
        found = replay(inside, doubling)
        return found.join(inside.select("source", "seq", "place"), on=("source", "seq"))
    return pl.DataFrame(schema={**_WARNINGS, "place": pl.Int64})


def _can_stop(rule: LeafPolicy) -> bool:
    limited = rule.calls is not None or rule.budget_ns is not None or rule.doubling is not None
    return limited or rule.answers != "any"


def _n_unobserved(requests: Requests, of_leaf: slice, events: Events) -> int:
    """Count requests whose recorded attempts end busy before the policy would stop."""
    continues = events.is_made[of_leaf] & (events.answer[of_leaf] == NONE)
    return int((continues & ~requests.done[of_leaf]).sum())


def _doubling_text(rule: LeafPolicy) -> str | None:
    if rule.doubling is None:
        return None
    return f"{rule.doubling.initial} x{rule.doubling.factor} to {rule.doubling.bug}"


@cache
def _leaf_name(leaf: int) -> str | None:
    table = leaves.leaf_table()
    names = table.filter(pl.col("leaf") == leaf)["name"]
    return None if names.is_empty() else str(names[0])


# The difference between the shares of two runs has twice the variance of one share, which equals
# the variance of one share with half as many trials.
_N_RUNS: Final = 2


def _exceeding(stops: pl.DataFrame, n_undecided: int, n_requests: int) -> dict[str, Any]:
    """Count the requests that need more calls than the policy makes, with a 95 % interval.

    The interval is for the share in another run of the same length under the policy: it includes
    the variance of both runs, and its ends are whole requests.
    """
    n_dependent = int(stops["dependent"].sum())
    sizes = stops.group_by("source", "episode").len()["len"].to_numpy().astype(float)
    effect = 1.0
    if len(sizes):
        effect = max(float((sizes**2).sum() / sizes.sum()), 1.0)
        effect *= float(few_clusters_factor(np.array([float(len(sizes))]), CONFIDENCE)[0])
    ends = np.array([stops.height - n_dependent, min(stops.height + n_undecided, n_requests)])
    trials = np.full(2, n_requests / (effect * _N_RUNS))
    low, high = exact_interval(ends / n_requests, trials, CONFIDENCE)
    is_known = not n_dependent and not n_undecided
    return {
        "n_exceeding": stops.height,
        "n_dependent": n_dependent,
        "n_undecided": n_undecided,
        "exceeding_ratio": stops.height / n_requests if is_known else None,
        "exceeding_low": math.floor(float(low[0]) * n_requests) / n_requests,
        "exceeding_high": math.ceil(float(high[1]) * n_requests) / n_requests,
    }


# Range of the Int64 columns: 292 years, exceeded only by the sum of damaged times.
_MAX_NS: Final = (1 << 63) - 1


def _waiting_times(requests: Requests, of_leaf: slice, events: Events) -> dict[str, Any]:
    """Sum the time from each request's first call to the last answer shared with the recording."""
    answer = events.answer[of_leaf]
    until_ns = requests.waits[0][of_leaf].copy()
    until_ns[answer != NONE] = requests.waited_ns[answer[answer != NONE]]
    made = events.is_made[of_leaf]
    of_request = pl.DataFrame(
        {
            "source": requests.retried["source"][of_leaf],
            "episode": requests.episode[of_leaf],
            "until_ns": until_ns,
        }
    )
    by_episode = (
        of_request.filter(pl.Series(made))
        .group_by("source", "episode")
        .agg(pl.col("until_ns").cast(pl.Int128).sum())
        .sort("source", "episode")["until_ns"]
    )
    low, high = interval_of_sum(by_episode.cast(pl.Float64).to_numpy(), CONFIDENCE)
    total = int(by_episode.sum())
    ends = {"waited_ns": total, "waited_low_ns": int(low), "waited_high_ns": int(high)}
    return {name: max(-_MAX_NS, min(ns, _MAX_NS)) for name, ns in ends.items()}


def _warnings(
    requests: Requests, of_leaf: slice, events: Events, warnings: pl.DataFrame
) -> dict[str, Any]:
    """Count warnings and doublings within requests of one leaf, and list the times of doublings."""
    place = warnings["place"].to_numpy()
    request = np.searchsorted(requests.first, place, "right") - 1
    inside = (request >= of_leaf.start) & (request < of_leaf.stop)
    inside[inside] = events.is_made[request[inside]]
    made = warnings.with_columns(
        at_ns=pl.Series(requests.starts_ns[request] + requests.waited_ns[place], dtype=pl.Int64)
    ).filter(pl.Series(inside, dtype=pl.Boolean))
    raised = made.filter(pl.col("raised_to").is_not_null()).sort("source", "seq")
    texts = [
        f"{to} at {ns // 10**9}.{ns % 10**9:09} s" + (f" (input {source})" if source else "")
        for source, to, ns in raised.select("source", "raised_to", "at_ns").iter_rows()
    ]
    return {
        "n_warnings": made.height,
        "n_doublings": raised.height,
        "raised": "; ".join(texts) or None,
    }


def _killed_vms(stops: pl.DataFrame) -> dict[str, Any]:
    """Count VMs that would have died, and SEPT entries left with host priority."""
    killed = stops.filter(pl.col("then") == "kill")
    known = killed.filter(pl.col("vm").is_not_null())
    left_busy = stops.filter(pl.col("then") != "again", _sets_host_priority())
    return {
        "n_bugs": killed.height,
        "n_vms_killed": known.select("source", "vm").n_unique()
        if killed.is_empty() or not known.is_empty()
        else None,
        "n_entries_left": left_busy.select("source", "td_id", "gpa").n_unique(),
    }


def _sets_host_priority() -> pl.Expr:
    """Return whether a busy answer leaves the host-priority bit of an SEPT entry set."""
    leaf_and_operand = pl.struct("leaf", low=word.low32(pl.col("status")).cast(pl.UInt32))
    return word.is_busy(pl.col("status")) & leaf_and_operand.is_in(_priority_answers())


@cache
def _priority_answers() -> pl.Series:
    """Return leaf and operand id of the answers that set host priority, as one list."""
    host_priority = locks.lock_table().filter(
        pl.col("lock") == "SEPT_ENTRY",
        pl.col("kind") == "entry_hp",
        pl.col("operand_id").is_not_null(),
        pl.col("leaf").is_not_null(),
    )
    return (
        host_priority.select(pl.struct("leaf", low=pl.col("operand_id")))
        .to_series()
        .unique()
        .implode()
    )


_ARRIVALS: Final = "arrivals are as recorded: another policy would change which calls conflict"
_LOCK_OF_LOOP: Final = "the lock held over the loop would delay other calls of the VM"
_AFTER: Final = "what the caller does after giving up is not replayed"
_WHICH_VMS: Final = "number of VMs unknown: the capture has neither TD nor process"
# Reasons why requests are undecided, by the key of their count.
_UNDECIDED: Final = {
    "kick": "undecided: busy at the call that this policy makes after a kick, which removes the "
    "vCPUs from the guest",
    "no kick": "undecided: the recorded kernel may have kicked the vCPUs before its second call, "
    "and this policy does not",
    "unseen": "ended unobserved before this policy: cut, or given up by the policy of the recorded "
    "kernel",
    "no answer": "undecided: no answer was recorded",
    "pace": "undecided: busy for as long as the calls of this policy take back to back, as in a "
    "loop inside the wrapper",
    "not made": "undecided: recorded after this policy had killed the VM",
    "dependent": "counted might not have been busy, so the share may be lower: host priority keeps "
    "guests off the lock of a request that this policy gave up before",
}


def _limitations(rule: LeafPolicy, row: dict[str, Any], numbers: Mapping[str, int]) -> str:
    """Describe what the replay cannot determine for a row."""
    only_after = row["n_exceeding"] and not row["n_dependent"]
    parts = [
        _ARRIVALS,
        _LOCK_OF_LOOP if rule.doubling is not None else None,
        *(f"{_requests(n)} {_UNDECIDED[why]}" for why, n in numbers.items() if n),
        _AFTER if only_after else None,
        _WHICH_VMS if row["n_vms_killed"] is None else None,
    ]
    return "; ".join(part for part in parts if part)


def _requests(n: int) -> str:
    return f"{n:,} request{'' if n == 1 else 's'}"


def replay(answers: pl.DataFrame, doubling: DoublingLimit) -> pl.DataFrame:
    """Replay the doubling limit over the busy answers of one or more hosts.

    A value of the limit is reached by the first request with that many busy answers after the
    limit took the value; later requests reach the next value.  So each value but the last is
    reached once, and the host's answers are searched once per value.

    Args:
        answers: Rows of ``busy_answers`` for the calls inside the loop.  All VMs of a source
            share the limit; each source begins with the initial limit.
        doubling: Initial limit, factor and fatal limit.

    Returns:
        One row per warning: source, seq of the answer, raised_to (null at the fatal limit), bug
        (whether the VM dies).
    """
    warnings = [
        row
        for source in answers["source"].unique().sort()
        for row in _replay_host(answers.filter(pl.col("source") == source), doubling, source)
    ]
    return pl.DataFrame(warnings, schema=_WARNINGS, orient="row")


def _replay_host(
    answers: pl.DataFrame, doubling: DoublingLimit, source: int
) -> list[tuple[int, int, int | None, bool]]:
    warnings: list[tuple[int, int, int | None, bool]] = []
    limit, since = doubling.initial, -1
    # The mail's code only counts the first busy answer, so a limit of 1 is never reached.
    while 1 < limit <= MAX_CALLS:
        reached = answers.filter(pl.col("number") == limit, pl.col("seq") > since)["seq"].sort()
        if reached.is_empty():
            break
        if limit == doubling.bug:
            warnings += [(source, seq, None, True) for seq in reached]
            break
        since = reached[0]
        limit *= doubling.factor
        warnings.append((source, since, limit, False))
    return warnings
