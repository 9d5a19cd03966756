"""Where a policy stops in the recorded requests, and where it diverges from the recording.

A recording shows the answers that a policy would get only as long as the policy does what the
recorded kernel did.  Four events end that:

- a kick: it takes the vCPUs out of the guest, so the answer to a call after a kick cannot be
  inferred from a call without one, nor the reverse;
- a faster pace: a loop inside the wrapper repeats the call at once, a loop through the fault
  handler later, so the first makes more calls during the same wait;
- the death of the VM: it makes no further requests;
- giving up: the lock's host-priority bit stays set and keeps guests out until a host call takes
  the lock (TDX module, ``tdx_locks.h``, ``release_sharex_lock_hp``: only a successful host call
  clears it), and the page stays as it was.  Until then, the VM's other requests may get different
  answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tdxtrace.compiler import Runner, choose
from tdxtrace.errors import TableError
from tdxtrace.recommend.loops import (
    BUSY_IS_RETRIED,
    IS_BUSY,
    NO_EVENT,
    NONE,
    SEPT_IS_RETRIED,
    STOP,
    first_events,
    longest_waits,
)
from tdxtrace.recommend.policy_definitions import AT_LIMIT, LeafPolicy
from tdxtrace.recommend.recorded import recorded_policies
from tdxtrace.tdx import word
from tdxtrace.tdx.leaves import parse_leaf

# TDX_OPERAND_BUSY with operand SEPT tree, the v1 series' TDX_ERROR_SEPT_BUSY.
_SEPT_BUSY: Final = word.TDX_OPERAND_BUSY | word.TDX_OPERAND_ID_SEPT
# sc_retry() inside every wrapper repeats calls with this status, at most ten times, before it
# returns to the caller: Linux 6.16 arch/x86/virt/vmx/tdx/tdx.c.
_RETRIED_BY_WRAPPER: Final = word.TDX_RND_NO_ENTROPY
_VP_ENTER: Final = parse_leaf("TDH.VP.ENTER")[0]
_DONE: Final = ("succeeded", "failed")
_GAVE_UP: Final = ("abandoned", "resolved_elsewhere")
_KILL: Final = AT_LIMIT.index("kill")
_UNLIMITED: Final = int(np.iinfo(np.int64).max)
# Bit of the answers that a policy retries, by LeafPolicy.answers; 0 for all.
_RETRIED: Final = {"any": 0, "busy": BUSY_IS_RETRIED, "sept": SEPT_IS_RETRIED}
# Bytes that the loops read per busy answer, over all default policies; used to choose the runner.
_BYTES_PER_ANSWER: Final = 8 * 20

# Columns of retry_chains and of busy_answers that the replay uses.
CHAIN_COLUMNS: Final = (
    *("source", "first_seq", "leaf", "td_id", "tgid", "vp_id", "gpa", "start_ns", "end_ns"),
    *("n_attempts", "n_busy", "outcome"),
)
ANSWER_COLUMNS: Final = (
    *("source", "seq", "first_seq", "leaf", "number", "waited_ns", "status", "episode"),
)

_Rows = NDArray[np.int64]
_Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Requests:
    """The recorded requests and their busy answers, prepared once for all policies."""

    chains: pl.DataFrame
    """All requests: leaf, page or vCPU, start_ns, ``vm_code`` (number of the VM), and
    ``is_unanswered`` (whether no answer was recorded)."""
    n_vms: int
    """Number of VMs; requests with neither TD nor process count as one VM per source."""
    by_leaf: pl.DataFrame
    """leaf, n_requests, n_retried; leaves with most retried requests first."""
    retried: pl.DataFrame
    """The retried requests, sorted by leaf as in ``by_leaf``, then by source and first_seq."""
    first: _Rows
    """Place of the first answer of each retried request, followed by the number of answers."""
    answers: pl.DataFrame
    """source, seq and leaf of the busy answers, in any order, with their ``place``: the index
    into the arrays of answers, in which the answers of a request are adjacent."""
    waited_ns: _Rows
    """By place: time from the request's first attempt to the answer."""
    status: NDArray[np.uint64]
    """By place: status of the answer."""
    kind: NDArray[np.uint8]
    """By place: class of the status, as bits of :mod:`~tdxtrace.recommend.loops`."""
    episode: NDArray[np.uint32]
    """By retried request: its burst."""
    run: Runner[Any]

    @cached_property
    def ranges(self) -> dict[int, slice]:
        """Rows of ``retried`` of each leaf."""
        ends = self.by_leaf["n_retried"].cum_sum().to_list()
        begins = [0, *ends[:-1]]
        return dict(zip(self.by_leaf["leaf"], map(slice, begins, ends), strict=True))

    @cached_property
    def waits(self) -> tuple[_Rows, _Rows]:
        """By retried request: longest wait, and wait until its last OPERAND_BUSY (NONE if none)."""
        longest_ns, held_ns = (np.empty(self.retried.height, np.int64) for _ in range(2))
        columns = self.first, self.waited_ns, self.kind
        self.run(longest_waits)(*columns, longest_ns, held_ns)
        return longest_ns, held_ns

    @cached_property
    def vm_codes(self) -> NDArray[np.uint32]:
        """VM number of each retried request."""
        return self.retried["vm_code"].to_numpy()

    @cached_property
    def starts_ns(self) -> _Rows:
        """Start time of each retried request."""
        return self.retried["start_ns"].to_numpy()

    @cached_property
    def done(self) -> _Flags:
        """Whether each retried request succeeded or failed in the recording."""
        return self.retried["done"].to_numpy()

    @cached_property
    def may_follow_kick(self) -> _Flags:
        """Whether the second call of each retried request may have followed a kick."""
        return (self.retried["may_be_kicked"] & (self.retried["n_attempts"] > 1)).to_numpy()

    @cached_property
    def next_ns(self) -> pl.Series:
        """Start of the next identical request after each retried request; null if none."""
        return _next_same_call(self.retried, self.chains)


def requests_of(chains: pl.DataFrame, answers: pl.DataFrame) -> Requests:
    """Prepare requests and their busy answers for the replay.

    Args:
        chains: The ``retry_chains`` table.
        answers: The ``busy_answers`` table of at least these chains.

    Raises:
        TableError: If a chain lacks some of its busy answers.
    """
    by_leaf = (
        chains.group_by("leaf")
        .agg(n_requests=pl.len(), n_retried=(pl.col("n_busy") > 0).sum())
        .sort("n_retried", "n_requests", "leaf", descending=[True, True, False])
    )
    narrow, n_vms = _with_vms(chains)
    retried = _retried(narrow, by_leaf)
    first = np.zeros(retried.height + 1, np.int64)
    np.cumsum(retried["n_busy"].to_numpy(), out=first[1:])
    keyed = retried.select("source", "first_seq", begins=pl.Series(first[:-1]))
    placed = answers.join(keyed, on=["source", "first_seq"]).with_columns(
        place=pl.col("begins") + pl.col("number") - 1
    )
    if placed.height != first[-1]:
        raise TableError(
            f"retry_chains counts {first[-1]:,} busy answers, busy_answers has {placed.height:,} "
            "for these chains: the tables are from different traces"
        )
    place = placed["place"].to_numpy()
    waited_ns, status, episode, kind = (
        _by_place(column, place)
        for column in placed.select("waited_ns", "status", "episode", kind=_kind())
    )
    return Requests(
        narrow.select(
            *("source", "leaf", "vm", "gpa", "vp_id", "start_ns", "vm_code"),
            is_unanswered=(pl.col("n_busy") == 0) & ~pl.col("outcome").is_in(_DONE),
        ),
        n_vms,
        by_leaf,
        retried,
        first,
        placed.select("source", "seq", "leaf", "number", "place"),
        waited_ns,
        status,
        kind,
        episode[first[:-1]],
        choose(placed.height * _BYTES_PER_ANSWER),
    )


def _with_vms(chains: pl.DataFrame) -> tuple[pl.DataFrame, int]:
    """Return CHAIN_COLUMNS with ``vm`` and its number ``vm_code``, and the number of VMs."""
    narrow = chains.select(
        *CHAIN_COLUMNS,
        vm=pl.coalesce("td_id", pl.col("tgid").cast(pl.UInt64)),
    )
    vms = narrow.select("source", "vm").unique().with_row_index("vm_code")
    of_vm = narrow.select("source", "vm").join(
        vms, on=["source", "vm"], how="left", nulls_equal=True, maintain_order="left"
    )
    return narrow.with_columns(of_vm["vm_code"]), vms.height


def _retried(narrow: pl.DataFrame, by_leaf: pl.DataFrame) -> pl.DataFrame:
    """Return the retried requests in the order of ``by_leaf``."""
    order = by_leaf.select("leaf").with_row_index("leaf_place")
    return (
        narrow.filter(pl.col("n_busy") > 0)
        .with_columns(
            done=pl.col("outcome").is_in(_DONE), gave_up=pl.col("outcome").is_in(_GAVE_UP)
        )
        .drop("outcome")
        .join(order, on="leaf", how="left", maintain_order="left")
        .join(_possibly_kicked(narrow), on=("source", "leaf"), how="left", maintain_order="left")
        .with_columns(pl.col("may_be_kicked").fill_null(False))
        .sort("leaf_place", "source", "first_seq")
        .drop("leaf_place")
    )


def _by_place(column: pl.Series, place: _Rows) -> NDArray[Any]:
    """Return the values of a column in the order of ``place``."""
    values = column.to_numpy()
    placed = np.empty(len(values), values.dtype)
    placed[place] = values
    return placed


def _possibly_kicked(chains: pl.DataFrame) -> pl.DataFrame:
    """Return the sources and leaves for which the recorded kernel may kick before second calls.

    A kernel that kicks makes at most two calls, so a request with three calls excludes a kick.
    Without such a request both are possible.
    """
    return (
        recorded_policies(chains)
        .filter("may_kick")
        .select("source", "leaf", may_be_kicked=pl.lit(True))
    )


def _kind() -> pl.Expr:
    """Return the class of a status as bits, for the loops."""
    status = pl.col("status")
    below = word.status_code(status) == pl.lit(_RETRIED_BY_WRAPPER, dtype=pl.UInt64)
    bits = {
        IS_BUSY: word.is_busy(status),
        BUSY_IS_RETRIED: word.is_busy(status) | below,
        SEPT_IS_RETRIED: (status == pl.lit(_SEPT_BUSY, dtype=pl.UInt64)) | below,
    }
    return pl.sum_horizontal(
        pl.when(holds).then(pl.lit(bit, pl.UInt8)).otherwise(pl.lit(0, pl.UInt8))
        for bit, holds in bits.items()
    ).cast(pl.UInt8)


@dataclass(frozen=True)
class Events:
    """First divergence of a policy from the recording, by retried request."""

    answer: _Rows
    """Place of the last answer before the divergence; NONE if the policy does not diverge."""
    event: NDArray[np.uint8]
    """STOP, KICK or NO_EVENT."""
    is_made: _Flags
    """Whether the VM is alive when the request begins, so that the request is made."""
    dead_ns: _Rows
    """By VM: time at which the policy kills it."""


def events_of(requests: Requests, rules: dict[int, LeafPolicy], is_fatal: _Flags) -> Events:
    """Replay a policy, and return its first divergence from each retried request.

    If the policy kicks before its last call, and that call completed the request in the recording
    without a kick, it is assumed to complete it with a kick too, because a kick only removes
    vCPUs; if the recorded call was busy, the request is undecided (KICK).  Events after the death
    of the VM are removed.

    Args:
        requests: The recorded requests.
        rules: The rules of the policy, by leaf.
        is_fatal: By place of answers: whether the doubling limit kills the VM there.
    """
    n = requests.retried.height
    answer, event = np.full(n, NONE, np.int64), np.zeros(n, np.uint8)
    is_killed = np.zeros(n, np.bool_)
    for leaf, rule in rules.items():
        own = requests.ranges[leaf]
        _write_events(requests, own, rule, is_fatal, (answer, event))
        stopped = event[own] == STOP
        is_killed[own] = stopped & (_follows(rule, requests.kind[answer[own]]) == _KILL)
    at_ns = requests.starts_ns + requests.waited_ns[answer] if n else requests.starts_ns
    dead_ns = np.full(requests.n_vms, _UNLIMITED)
    np.minimum.at(dead_ns, requests.vm_codes[is_killed], at_ns[is_killed])
    of_request = dead_ns[requests.vm_codes]
    outlived = (event != NO_EVENT) & (at_ns > of_request)
    answer[outlived], event[outlived] = NONE, NO_EVENT
    return Events(answer, event, requests.starts_ns <= of_request, dead_ns)


def _write_events(
    requests: Requests,
    own: slice,
    rule: LeafPolicy,
    is_fatal: _Flags,
    written: tuple[_Rows, NDArray[np.uint8]],
) -> None:
    """Fill ``answer`` and ``event`` for the requests of one leaf."""
    answer, event = written
    requests.run(first_events)(
        requests.first[own.start : own.stop + 1],
        requests.waited_ns,
        requests.kind,
        is_fatal,
        requests.may_follow_kick[own],
        _UNLIMITED if rule.calls is None else rule.calls,
        _UNLIMITED if rule.budget_ns is None else min(rule.budget_ns, _UNLIMITED),
        _RETRIED[rule.answers],
        rule.kicks,
        answer[own],
        event[own],
    )


def _follows(rule: LeafPolicy, kind: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the consequence of a stop at answers of these classes, as indices into AT_LIMIT."""
    bit = _RETRIED[rule.answers]
    is_retried = (kind & bit) != 0 if bit else np.ones(len(kind), np.bool_)
    then, otherwise = (AT_LIMIT.index(name) for name in (rule.then, rule.otherwise))
    return np.where(is_retried, then, otherwise).astype(np.uint8)


def n_not_made(requests: Requests, leaf: int, dead_ns: _Rows) -> int:
    """Count the requests of a leaf that begin after the death of their VM."""
    if (dead_ns == _UNLIMITED).all():
        return 0
    own = requests.chains.filter(pl.col("leaf") == leaf)
    return int((own["start_ns"].to_numpy() > dead_ns[own["vm_code"].to_numpy()]).sum())


def n_unanswered(requests: Requests, leaf: int, dead_ns: _Rows) -> int:
    """Count the requests of a leaf that are made and have no recorded answer.

    Args:
        requests: The recorded requests.
        leaf: The leaf.
        dead_ns: By VM: time at which the policy kills it.
    """
    own = requests.chains.filter(pl.col("leaf") == leaf, pl.col("is_unanswered"))
    return int((own["start_ns"].to_numpy() <= dead_ns[own["vm_code"].to_numpy()]).sum())


def n_outpaced(requests: Requests, leaf: int, events: Events, rule: LeafPolicy) -> int:
    """Count requests that would need more calls than allowed if the calls were back to back.

    They were busy for at least as long as the policy's calls take back to back, although the
    recorded kernel made fewer calls.  TDH.VP.ENTER is left out: every kernel enters again through
    vcpu_run.

    Args:
        requests: The recorded requests.
        leaf: The leaf.
        events: Result of :func:`events_of` for the policy.
        rule: The policy for that leaf.
    """
    calls = rule.calls if rule.doubling is None else rule.doubling.bug
    if calls is None or leaf == _VP_ENTER:
        return 0
    own = requests.ranges[leaf]
    settled = requests.done[own] & events.is_made[own]
    each_ns = _busy_call_ns(requests, own, settled)
    if each_ns is None:
        return 0
    held_ns = requests.waits[1][own]
    long = settled & (held_ns != NONE) & (held_ns // each_ns >= calls)
    return int((long & (events.answer[own] == NONE)).sum())


def _busy_call_ns(requests: Requests, own: slice, settled: _Flags) -> int | None:
    """Return the median duration of a busy first call; None if unknown.

    Only the first call of a request is used, because its start is recorded.
    """
    at = requests.first[:-1][own][settled]
    first_ns = requests.waited_ns[at]
    first_ns = first_ns[(first_ns > 0) & (requests.kind[at] & IS_BUSY != 0)]
    return int(np.median(first_ns)) or None if len(first_ns) else None


_SAME_CALL: Final = ("source", "leaf", "vm_key", "what")


def _next_same_call(retried: pl.DataFrame, chains: pl.DataFrame) -> pl.Series:
    """Return the start of the next identical request after each of ``retried``; null if none.

    Requests are identical if source, leaf, VM and page agree, or vCPU where no page was recorded;
    null equals null.
    """
    what = pl.coalesce("gpa", pl.col("vp_id").cast(pl.UInt64))
    purpose = [pl.col("vm").fill_null(0).alias("vm_key"), what.fill_null(0).alias("what")]
    later = chains.select("source", "leaf", *purpose, next_ns="start_ns").sort("next_ns")
    ended = retried.select("source", "leaf", *purpose, "end_ns").with_row_index("place")
    return (
        ended.sort("end_ns")
        .join_asof(
            later,
            left_on="end_ns",
            right_on="next_ns",
            by=_SAME_CALL,
            strategy="forward",
            check_sortedness=False,
        )
        .sort("place")["next_ns"]
    )


def is_dependent(stops: pl.DataFrame) -> pl.Series:
    """Return whether each stop may have been influenced by an earlier stop of the same VM.

    The influence of a stop lasts until the host makes the same call for the same page or vCPU
    again: the later steps of the abandoned operation, which could clear the lock's host priority,
    are not made.  If the fault handler retries by itself (``again``), the influence lasts until
    the recorded end of the request.  If the recorded kernel gave up at the same answer, the stop
    has no influence beyond what was recorded.

    Args:
        stops: Stops of all leaves of one policy, without those after the death of their VM:
            source, vm, start_ns, end_ns, at_ns, next_ns, gave_up, is_last (whether the request
            has no later busy answer) and then.

    Returns:
        One boolean for each stop, in the same order.
    """
    ends = (
        pl.when(pl.col("gave_up") & pl.col("is_last"))
        .then("at_ns")
        .when(pl.col("then") == "again")
        .then("end_ns")
        .otherwise(pl.col("next_ns").fill_null(pl.Int64.max()))
    )
    return (
        stops.with_columns(pl.col("vm").fill_null(0), lasts=ends)
        .with_row_index("place")
        .sort("at_ns", "place")
        .with_columns(pl.col("lasts").cum_max().shift().over("source", "vm"))
        .sort("place")
        .select((pl.col("start_ns") < pl.col("lasts")).fill_null(False))
        .to_series()
    )


def stops_of(requests: Requests, rules: dict[int, LeafPolicy], events: Events) -> pl.DataFrame:
    """Return the requests at which a policy stops, in the order of ``requests.retried``.

    Returns:
        The columns that :func:`is_dependent` needs, and leaf, td_id, gpa, episode, status and
        dependent.
    """
    at = np.flatnonzero(events.event == STOP)
    answer = events.answer[at]
    then = np.zeros(len(at), np.uint8)
    for leaf, rule in rules.items():
        own = requests.ranges[leaf]
        here = slice(*np.searchsorted(at, (own.start, own.stop)))
        then[here] = _follows(rule, requests.kind[answer[here]])
    columns = ("source", "leaf", "td_id", "gpa", "vm", "start_ns", "end_ns", "gave_up")
    stops = requests.retried.select(columns)[at].with_columns(
        at_ns=pl.col("start_ns") + pl.Series(requests.waited_ns[answer]),
        is_last=pl.Series(answer + 1 == requests.first[at + 1]),
        status=pl.Series(requests.status[answer]),
        episode=pl.Series(requests.episode[at]),
        then=pl.Series(then).cat.to(pl.Enum(AT_LIMIT)),
        next_ns=requests.next_ns[at] if len(at) else pl.lit(None, pl.Int64),
    )
    return stops.with_columns(dependent=is_dependent(stops))
