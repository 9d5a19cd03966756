"""Where a policy stops in the recorded requests, and where the recording no longer tells.

A recording tells what a policy would have met as long as the policy does what the recorded
kernel did.  Four things end that:

- a kick: it takes the vCPUs out of the guest, so what a call after it meets is not known from
  a call without it, nor the other way round;
- the pace: a loop inside the wrapper calls again at once, one through the fault handler later, so
  that the same wait takes it more calls;
- the death of the VM: it makes no further requests;
- giving up: the lock's host-priority bit stays set and keeps guests out until a host call takes
  the lock (TDX module, ``tdx_locks.h``, ``release_sharex_lock_hp``: only a successful host call
  clears it), and the page stays as it was.  What the VM's other requests meet until then may
  differ.
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
    GOES_ON,
    IS_BUSY,
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
# sc_retry() below every wrapper repeats these itself, at most ten calls, before the caller
# sees a status: Linux 6.16 arch/x86/virt/vmx/tdx/tdx.c.
_RETRIED_BELOW: Final = word.TDX_RND_NO_ENTROPY
_VP_ENTER: Final = parse_leaf("TDH.VP.ENTER")[0]
_DONE: Final = ("succeeded", "failed")
_GAVE_UP: Final = ("abandoned", "resolved_elsewhere")
_KILL: Final = AT_LIMIT.index("kill")
_UNLIMITED: Final = int(np.iinfo(np.int64).max)
# By what a policy retries: the bit of such answers; 0 for all.
_RETRIED: Final = {"any": 0, "busy": BUSY_IS_RETRIED, "sept": SEPT_IS_RETRIED}
# What the loops look at of a busy answer, for each of the default policies: it decides how they
# run.
_BYTES_PER_ANSWER: Final = 8 * 20

# Columns of retry_chains and of busy_answers that the replay depends on.
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
    """All requests: leaf, page or vCPU, start_ns, ``vm_code``, which numbers their VMs, and
    ``is_unanswered``: whether no answer was recorded of the request."""
    n_vms: int
    """VMs, one of each source for all requests of which neither TD nor process is known."""
    by_leaf: pl.DataFrame
    """leaf, n_requests, n_retried: those with most retried requests first."""
    retried: pl.DataFrame
    """The retried requests, in the order of ``by_leaf`` and, within, of source and first_seq."""
    first: _Rows
    """Place of the first answer of each retried request; one more: the number of answers."""
    answers: pl.DataFrame
    """source, seq and leaf of the busy answers, in any order, with their ``place``."""
    waited_ns: _Rows
    """By place: answers of a request follow each other."""
    status: NDArray[np.uint64]
    kind: NDArray[np.uint8]
    """By place: bits of the status, see :mod:`~tdxtrace.recommend.loops`."""
    episode: NDArray[np.uint32]
    """By retried request: its burst."""
    run: Runner[Any]

    @cached_property
    def ranges(self) -> dict[int, slice]:
        """Places of the retried requests of each leaf."""
        ends = self.by_leaf["n_retried"].cum_sum().to_list()
        begins = [0, *ends[:-1]]
        return dict(zip(self.by_leaf["leaf"], map(slice, begins, ends), strict=True))

    @cached_property
    def waits(self) -> tuple[_Rows, _Rows]:
        """How long each retried request waited; and until its last busy operand, NONE if none."""
        longest_ns, held_ns = (np.empty(self.retried.height, np.int64) for _ in range(2))
        columns = self.first, self.waited_ns, self.kind
        self.run(longest_waits)(*columns, longest_ns, held_ns)
        return longest_ns, held_ns

    @cached_property
    def vm_codes(self) -> NDArray[np.uint32]:
        """The number of the VM of each retried request."""
        return self.retried["vm_code"].to_numpy()

    @cached_property
    def starts_ns(self) -> _Rows:
        """The start of each retried request."""
        return self.retried["start_ns"].to_numpy()

    @cached_property
    def done(self) -> _Flags:
        """Whether each retried request was done in the recording."""
        return self.retried["done"].to_numpy()

    @cached_property
    def goes_on_unkicked(self) -> _Flags:
        """Whether each retried request has further calls that may have followed a kick."""
        return (self.retried["may_be_kicked"] & (self.retried["n_attempts"] > 1)).to_numpy()

    @cached_property
    def next_ns(self) -> pl.Series:
        """When the host first made the same call again after each retried request; null if not."""
        return _next_same(self.retried, self.chains)


def requests_of(chains: pl.DataFrame, answers: pl.DataFrame) -> Requests:
    """Prepare requests and their busy answers for the replay.

    Args:
        chains: The ``retry_chains`` table.
        answers: The ``busy_answers`` table of the same chains, or of more.

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
            f"retry_chains tells of {first[-1]:,} busy answers, busy_answers of {placed.height:,} "
            "of these chains: they are not of one trace"
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
    """What the replay needs of requests, with the numbers of their VMs; and how many VMs."""
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
    """The retried requests, in the order of ``by_leaf``."""
    order = by_leaf.select("leaf").with_row_index("leaf_place")
    return (
        narrow.filter(pl.col("n_busy") > 0)
        .with_columns(
            done=pl.col("outcome").is_in(_DONE), gave_up=pl.col("outcome").is_in(_GAVE_UP)
        )
        .drop("outcome")
        .join(order, on="leaf", how="left", maintain_order="left")
        .join(_perhaps_kicked(narrow), on=("source", "leaf"), how="left", maintain_order="left")
        .with_columns(pl.col("may_be_kicked").fill_null(False))
        .sort("leaf_place", "source", "first_seq")
        .drop("leaf_place")
    )


def _by_place(column: pl.Series, place: _Rows) -> NDArray[Any]:
    """Values of a column, each at its place."""
    values = column.to_numpy()
    placed = np.empty(len(values), values.dtype)
    placed[place] = values
    return placed


def _perhaps_kicked(chains: pl.DataFrame) -> pl.DataFrame:
    """The sources and leaves whose second calls the recorded kernel may have kicked for.

    A kernel that kicks makes two calls at most: a request with three shows that it does not.
    Without one nothing in the requests tells which of the two it is.
    """
    return (
        recorded_policies(chains)
        .filter("may_kick")
        .select("source", "leaf", may_be_kicked=pl.lit(True))
    )


def _kind() -> pl.Expr:
    """Bits of a status, as the loops look at it."""
    status = pl.col("status")
    below = word.status_code(status) == pl.lit(_RETRIED_BELOW, dtype=pl.UInt64)
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
    """The first answer of each retried request after which the recording no longer tells."""

    answer: _Rows
    """Its place; NONE where the policy goes on for as long as was recorded."""
    event: NDArray[np.uint8]
    """STOP, KICK or GOES_ON."""
    is_made: _Flags
    """Whether the request is made at all: its VM is alive when it begins."""
    dead_ns: _Rows
    """By VM: when the policy kills it."""


def events_of(requests: Requests, rules: dict[int, LeafPolicy], is_fatal: _Flags) -> Events:
    """Replay a policy, and return what ends what the recording tells of each retried request.

    Where the policy kicks, a request that its last call settled without a kick is taken to be
    settled with it: the kick only takes vCPUs away.  A busy answer of that call says nothing.
    Nothing happens after the death of a VM.

    Args:
        requests: The recorded requests.
        rules: The policy, by leaf.
        is_fatal: By place of answers: whether a doubling limit is fatal there.
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
    outlived = (event != GOES_ON) & (at_ns > of_request)
    answer[outlived], event[outlived] = NONE, GOES_ON
    return Events(answer, event, requests.starts_ns <= of_request, dead_ns)


def _write_events(
    requests: Requests,
    own: slice,
    rule: LeafPolicy,
    is_fatal: _Flags,
    written: tuple[_Rows, NDArray[np.uint8]],
) -> None:
    """Write ``answer`` and ``event`` of the requests of one leaf."""
    answer, event = written
    requests.run(first_events)(
        requests.first[own.start : own.stop + 1],
        requests.waited_ns,
        requests.kind,
        is_fatal,
        requests.goes_on_unkicked[own],
        _UNLIMITED if rule.calls is None else rule.calls,
        _UNLIMITED if rule.budget_ns is None else min(rule.budget_ns, _UNLIMITED),
        _RETRIED[rule.answers],
        rule.kicks,
        answer[own],
        event[own],
    )


def _follows(rule: LeafPolicy, kind: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """What follows when a policy stops at answers of these kinds, as places in AT_LIMIT."""
    bit = _RETRIED[rule.answers]
    is_retried = (kind & bit) != 0 if bit else np.ones(len(kind), np.bool_)
    then, otherwise = (AT_LIMIT.index(name) for name in (rule.then, rule.otherwise))
    return np.where(is_retried, then, otherwise).astype(np.uint8)


def n_not_made(requests: Requests, leaf: int, dead_ns: _Rows) -> int:
    """Return the number of requests of a leaf that begin after the death of their VM."""
    if (dead_ns == _UNLIMITED).all():
        return 0
    own = requests.chains.filter(pl.col("leaf") == leaf)
    return int((own["start_ns"].to_numpy() > dead_ns[own["vm_code"].to_numpy()]).sum())


def n_unanswered(requests: Requests, leaf: int, dead_ns: _Rows) -> int:
    """Return the number of requests of a leaf that are made, and whose answers are not known.

    Args:
        requests: The recorded requests.
        leaf: The leaf.
        dead_ns: By VM: when the policy kills it.
    """
    own = requests.chains.filter(pl.col("leaf") == leaf, pl.col("is_unanswered"))
    return int((own["start_ns"].to_numpy() <= dead_ns[own["vm_code"].to_numpy()]).sum())


def n_outpaced(requests: Requests, leaf: int, events: Events, rule: LeafPolicy) -> int:
    """Return the number of requests that would need more calls than allowed if made at once.

    They were busy for at least as long as the policy's calls take back to back, though the
    recorded kernel made fewer.  TDH.VP.ENTER is left out: every kernel enters again by way of
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
    """Typical time of one busy call: of the first ones of requests, whose start is recorded."""
    at = requests.first[:-1][own][settled]
    first_ns = requests.waited_ns[at]
    first_ns = first_ns[(first_ns > 0) & (requests.kind[at] & IS_BUSY != 0)]
    return int(np.median(first_ns)) or None if len(first_ns) else None


_PURPOSE: Final = ("source", "leaf", "vm_key", "what")


def _next_same(retried: pl.DataFrame, chains: pl.DataFrame) -> pl.Series:
    """When the next request for the same begins after each of ``retried`` ends; null if none.

    The same is leaf and page, else leaf and vCPU; what was not recorded is one value of its own.
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
            by=_PURPOSE,
            strategy="forward",
            check_sortedness=False,
        )
        .sort("place")["next_ns"]
    )


def is_dependent(stops: pl.DataFrame) -> pl.Series:
    """Return whether each stop lies where an earlier one may have changed what its VM meets.

    What a stop changes lasts until the host makes the same call for the same page or vCPU
    again: with the operation given up, its later steps are not made, and may not clear the
    lock's priority.  Where the fault handler itself comes again, it lasts until its request
    was settled.  A stop at which the recorded kernel gave up too changes nothing that was not
    recorded.

    Args:
        stops: Stops of all leaves of one policy, without those after the death of their VM:
            source, vm, start_ns, end_ns, at_ns, next_ns, gave_up, is_last (whether the request
            has no later busy answer) and then.

    Returns:
        One boolean for each stop, in order.
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
