"""The ``policies`` table: replay of retry policies over the recorded requests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any, Final

import numpy as np
import polars as pl

from tdxtrace.intervals import CONFIDENCE, exact_interval, few_clusters_factor, interval_of_sum
from tdxtrace.recommend.policy_definitions import (
    DEFAULTS,
    MAX_CALLS,
    DoublingLimit,
    LeafPolicy,
    RetryPolicy,
    policy_named,
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
_REQUEST: Final = ("source", "first_seq")
_DONE: Final = ("succeeded", "failed")
# TDX_OPERAND_BUSY with operand SEPT tree, the v1 series' TDX_ERROR_SEPT_BUSY.
_SEPT_BUSY: Final = word.TDX_OPERAND_BUSY | word.TDX_OPERAND_ID_SEPT
# sc_retry() below every wrapper repeats these itself, at most ten calls, before the caller
# sees a status: Linux 6.16 arch/x86/virt/vmx/tdx/tdx.c.
_RETRIED_BELOW: Final = word.TDX_RND_NO_ENTROPY


def policies(
    retry_chains: pl.DataFrame,
    busy_answers: pl.DataFrame,
    chosen: Sequence[RetryPolicy] | None = None,
) -> pl.DataFrame:
    """Replay policies over the recorded requests.

    Each request gets the same answers under every policy, at the same times. A policy
    stops at the first busy answer after which it makes no further call. A request that
    was cut or given up before a policy would have stopped is undecided, and widens the
    interval: none or all of them would have exceeded it.

    Args:
        retry_chains: The ``retry_chains`` table.
        busy_answers: The ``busy_answers`` table of the same chains, or of more.
        chosen: Policies to replay; the mail's and those argued for on the list by default.

    Returns:
        The ``policies`` table, a row for each leaf that the policy has a rule for, in the
        order chosen.  ``not_known`` says what replay cannot know about the row.

    Raises:
        TableError: If an argument lacks a column or has one of another type.
    """
    if chosen is None:
        chosen = [policy_named(name) for name in DEFAULTS]
    chains = RETRY_CHAINS.conform(retry_chains)
    requests = _by_leaf(chains)
    answers = _with_requests(BUSY_ANSWERS.conform(busy_answers), chains)
    of_leaf = {int(leaf[0]): own for leaf, own in answers.group_by("leaf")}
    rows = [row for policy in chosen for row in _rows_of_policy(policy, requests, answers, of_leaf)]
    return POLICIES.conform(pl.DataFrame(rows, schema=POLICIES.schema))


def _by_leaf(chains: pl.DataFrame) -> pl.DataFrame:
    return (
        chains.group_by("leaf")
        .agg(n_requests=pl.len(), n_retried=(pl.col("n_busy") > 0).sum())
        .sort("n_retried", "n_requests", "leaf", descending=[True, True, False])
    )


def _with_requests(answers: pl.DataFrame, chains: pl.DataFrame) -> pl.DataFrame:
    """Busy answers with the VM, page, start and outcome of their request."""
    of_request = chains.filter(pl.col("n_busy") > 0).select(
        *("source", "first_seq", "td_id", "tgid", "gpa", "start_ns"),
        done=pl.col("outcome").is_in(_DONE),
        n_seen="n_busy",
    )
    return answers.join(of_request, on=_REQUEST).with_columns(
        at_ns=pl.col("start_ns") + pl.col("waited_ns")
    )


def _rows_of_policy(
    policy: RetryPolicy,
    requests: pl.DataFrame,
    answers: pl.DataFrame,
    of_leaf: Mapping[int, pl.DataFrame],
) -> Iterable[dict[str, Any]]:
    covered = [
        (leaf, rule, n_requests, n_retried)
        for leaf, n_requests, n_retried in requests.iter_rows()
        if (rule := policy.rule(_leaf_name(leaf))) is not None
    ]
    doubling_leaves = [leaf for leaf, rule, _, _ in covered if rule.doubling is not None]
    warnings = pl.DataFrame(schema=_WARNINGS)
    for doubling in {rule.doubling for _, rule, _, _ in covered if rule.doubling is not None}:
        warnings = replay(answers.filter(pl.col("leaf").is_in(doubling_leaves)), doubling)
    for leaf, rule, n_requests, n_retried in covered:
        row = {"policy": policy.name, "leaf": leaf, "calls": rule.calls, "rising": _rising(rule)}
        row |= {"budget_ns": rule.budget_ns, "kicks": rule.kicks, "then": rule.then}
        row |= {"n_requests": n_requests, "n_retried": n_retried}
        if leaf in of_leaf:
            own = of_leaf[leaf]
            stops = _stopping_answers(own, rule, warnings)
            row |= _exceeding(own, stops, rule, n_requests)
            row |= _waited(own, stops) | _warnings(own, warnings) | _killed_vms(stops)
        else:
            row |= _nothing_busy(n_requests)
        yield row | {"not_known": _not_known(rule, row)}


def _nothing_busy(n_requests: int) -> dict[str, Any]:
    """Columns of a leaf without a busy answer, the same under any policy."""
    none, trials = np.zeros(1), np.array([float(n_requests)])
    return {
        **dict.fromkeys(("n_exceeding", "n_undecided", "n_warnings", "n_doublings", "n_bugs"), 0),
        **dict.fromkeys(("waited_ns", "waited_low_ns", "waited_high_ns"), 0),
        **dict.fromkeys(("n_vms_killed", "n_entries_left"), 0),
        "raised": None,
        "exceeding_ratio": 0.0,
        "exceeding_low": 0.0,
        "exceeding_high": float(exact_interval(none, trials, CONFIDENCE)[1][0]),
    }


def _rising(rule: LeafPolicy) -> str | None:
    if rule.doubling is None:
        return None
    return f"{rule.doubling.initial} x{rule.doubling.factor} to {rule.doubling.bug}"


@cache
def _leaf_name(leaf: int) -> str | None:
    table = leaves.leaf_table()
    names = table.filter(pl.col("leaf") == leaf)["name"]
    return None if names.is_empty() else str(names[0])


def _stopping_answers(
    answers: pl.DataFrame, rule: LeafPolicy, warnings: pl.DataFrame
) -> pl.DataFrame:
    """The answer at which the policy would have stopped, of each request that has one."""
    ends = pl.lit(False)
    if rule.calls is not None:
        ends = ends | (pl.col("number") >= rule.calls)
    if rule.budget_ns is not None:
        ends = ends | (pl.col("waited_ns") > rule.budget_ns)
    if rule.doubling is not None:
        bugs = warnings.filter("bug").select("source", "seq", bug=pl.lit(True))
        answers = answers.join(bugs, on=("source", "seq"), how="left")
        ends = ends | pl.col("bug").fill_null(False)
    not_retried = ~_is_retried(rule.answers)
    return (
        answers.with_columns(then=pl.when(ends).then(pl.lit(rule.then)))
        .with_columns(then=pl.when(not_retried).then(pl.lit(rule.otherwise)).otherwise("then"))
        .filter(pl.col("then").is_not_null())
        .sort(*_REQUEST, "number")
        .unique(_REQUEST, keep="first", maintain_order=True)
    )


def _is_retried(answers: str) -> pl.Expr:
    """Whether a policy of this kind retries after an answer."""
    status = pl.col("status")
    below = word.status_code(status) == pl.lit(_RETRIED_BELOW, dtype=pl.UInt64)
    return {
        "any": pl.lit(True),
        "busy": word.is_busy(status) | below,
        "sept": (status == pl.lit(_SEPT_BUSY, dtype=pl.UInt64)) | below,
    }[answers]


def _exceeding(
    answers: pl.DataFrame, stops: pl.DataFrame, rule: LeafPolicy, n_requests: int
) -> dict[str, Any]:
    """Number of requests that need more than the policy gives, with a 95 % interval."""
    ends = rule.calls is not None or rule.budget_ns is not None or rule.doubling is not None
    unseen = answers.filter(~pl.col("done")).select(_REQUEST).unique()
    unseen = unseen.join(stops.select(_REQUEST), on=_REQUEST, how="anti")
    n_undecided = unseen.height if ends or rule.answers != "any" else 0
    sizes = stops.group_by("source", "episode").len()["len"].to_numpy().astype(float)
    effect = 1.0
    if len(sizes):
        effect = max(float((sizes**2).sum() / sizes.sum()), 1.0)
        effect *= float(few_clusters_factor(np.array([float(len(sizes))]), CONFIDENCE)[0])
    shares = np.array([stops.height, stops.height + n_undecided]) / n_requests
    trials = np.full(2, n_requests / effect)
    low, high = exact_interval(shares, trials, CONFIDENCE)
    return {
        "n_exceeding": stops.height,
        "n_undecided": n_undecided,
        "exceeding_ratio": float(shares[0]),
        "exceeding_low": float(low[0]),
        "exceeding_high": float(high[1]),
    }


def _waited(answers: pl.DataFrame, stops: pl.DataFrame) -> dict[str, Any]:
    """Time from each request's first call to the last busy answer that the policy saw."""
    last = answers.group_by(*_REQUEST, "episode").agg(pl.col("waited_ns").max())
    stopped = stops.select(*_REQUEST, stopped_ns="waited_ns")
    by_episode = (
        last.join(stopped, on=_REQUEST, how="left")
        .group_by("source", "episode")
        .agg(pl.coalesce("stopped_ns", "waited_ns").sum())
        .sort("source", "episode")["stopped_ns"]
    )
    low, high = interval_of_sum(by_episode.to_numpy().astype(float), CONFIDENCE)
    total = int(by_episode.sum())
    return {"waited_ns": total, "waited_low_ns": int(low), "waited_high_ns": int(high)}


def _warnings(answers: pl.DataFrame, warnings: pl.DataFrame) -> dict[str, Any]:
    own = warnings.join(answers.select("source", "seq", "at_ns"), on=("source", "seq"))
    raised = own.filter(pl.col("raised_to").is_not_null()).sort("source", "seq")
    texts = [
        f"{to} at {ns // 10**9}.{ns % 10**9:09} s" + (f" (input {source})" if source else "")
        for source, to, ns in raised.select("source", "raised_to", "at_ns").iter_rows()
    ]
    return {
        "n_warnings": own.height,
        "n_doublings": raised.height,
        "raised": "; ".join(texts) or None,
    }


def _killed_vms(stops: pl.DataFrame) -> dict[str, Any]:
    """Number of VMs that would have died, and of entries left with host priority."""
    killed = stops.filter(pl.col("then") == "kill")
    vms = killed.with_columns(vm=pl.coalesce("td_id", pl.col("tgid").cast(pl.UInt64)))
    known = vms.filter(pl.col("vm").is_not_null())
    left_busy = stops.filter(pl.col("then") != "again", _sets_host_priority())
    return {
        "n_bugs": killed.height,
        "n_vms_killed": known.select("source", "vm").n_unique()
        if killed.is_empty() or not known.is_empty()
        else None,
        "n_entries_left": left_busy.select("source", "td_id", "gpa").n_unique(),
    }


def _sets_host_priority() -> pl.Expr:
    """Whether a busy answer leaves the host priority bit of an SEPT entry set."""
    here = pl.struct("leaf", low=word.low32(pl.col("status")).cast(pl.UInt32))
    return word.is_busy(pl.col("status")) & here.is_in(_priority_answers())


@cache
def _priority_answers() -> pl.Series:
    """Leaf and operand id of these answers, as one list."""
    hp = locks.lock_table().filter(
        pl.col("lock") == "SEPT_ENTRY",
        pl.col("kind") == "entry_hp",
        pl.col("operand_id").is_not_null(),
        pl.col("leaf").is_not_null(),
    )
    return hp.select(pl.struct("leaf", low=pl.col("operand_id"))).to_series().unique().implode()


def _not_known(rule: LeafPolicy, row: dict[str, Any]) -> str:
    """What the trace cannot show about a row, in words."""
    parts = ["arrivals are as recorded: another policy would change which calls conflict"]
    if rule.kicks:
        parts.append(
            "a kick removes the vCPUs, so that the last call may be less likely to be busy"
        )
    if rule.doubling is not None:
        parts.append("the lock held over the loop would delay other calls of the VM")
    if row["n_undecided"]:
        n = row["n_undecided"]
        parts.append(
            f"{n:,} request{'' if n == 1 else 's'} ended unobserved before this policy: cut, or "
            "given up by the policy of the recorded kernel"
        )
    if row["n_bugs"]:
        parts.append("requests that a dead VM would not have made are still counted")
    elif row["n_exceeding"]:
        parts.append("what the caller does after giving up is not replayed")
    if row["n_vms_killed"] is None:
        parts.append("which VMs: the capture has neither TD nor process")
    return "; ".join(parts)


def replay(answers: pl.DataFrame, doubling: DoublingLimit) -> pl.DataFrame:
    """Replay the doubling limit over the busy answers of one or more hosts.

    A limit is met by the first request that gets as many busy answers after the limit
    took that value; later requests meet the next value.  So each value but the last is
    met once, and the host's answers are searched once per value.

    Args:
        answers: Rows of ``busy_answers`` for the calls inside the loop.  The limit is
            kept from VM to VM, and begins anew with each source.
        doubling: Initial limit, factor and fatal limit.

    Returns:
        One row per warning: source, seq of the answer, raised_to (null where it is not
        raised), bug (whether the VM dies of it).
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
    # The first busy answer takes the other branch, so a limit of 1 is never met.
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
