"""The record of a run: calls, requests, busy reasons, kernel events, policy actions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, NamedTuple

from tdxtrace.simulate.module import abi
from tdxtrace.simulate.module.state import Call
from tdxtrace.simulate.thread import Thread

# Status codes after which a host issues the same call again, immediately or after a kick, with
# the resource if it is not a lock.
RETRYABLE: Final = {
    abi.OPERAND_BUSY: "",
    abi.PREVIOUS_TLB_EPOCH_BUSY: "PREVIOUS_EPOCH",
    abi.RND_NO_ENTROPY: "ENTROPY",
    abi.INTERRUPTED_RESUMABLE: "INTERRUPT",
    abi.INTERRUPTED_RESTARTABLE: "INTERRUPT",
    abi.INTERRUPTED_BUSY: "TREE_PRIORITY",
}


# Leaves of the fault path: their requests may continue after entries of the guest.
FAULT_LEAVES: Final = ("TDH.MEM.PAGE.AUG", "TDH.MEM.SEPT.ADD")
# Leaves that need a blocked range: after RANGE.UNBLOCK their caller has given up.
NEED_BLOCK: Final = (
    *("TDH.MEM.PAGE.DEMOTE", "TDH.MEM.PAGE.PROMOTE"),
    *("TDH.MEM.PAGE.RELOCATE", "TDH.MEM.PAGE.REMOVE"),
)
Identity = tuple[Thread, str, int, int, int, int]


class KernelEvent(NamedTuple):
    """A tracepoint of KVM, or a line of the kernel log (``name`` is then ``dmesg``)."""

    ts_ns: int
    cpu: int
    thread: Thread
    name: str
    fields: tuple[object, ...]


@dataclass(slots=True, eq=False)
class Request:
    """One operation that a caller requests, with all attempts at it."""

    number: int
    leaf: str
    thread: Thread
    td: int
    vcpu: int
    gpa: int
    level: int
    calls: list[Call]
    segments: int = 1
    """Number of groups of attempts, separated by entries of the vCPU."""
    n_entries: int = 0
    """Number of vCPU entries of the thread before the latest attempt."""
    turn: int = 0
    """Number of calls of the thread up to and including the latest attempt."""
    given_up: bool = False
    """Whether its caller dropped the operation."""
    undone: tuple[int, str] | None = None
    """Time at which RANGE.UNBLOCK ended the request, and the outcome."""
    outcome: str = ""
    """Empty while it is open."""

    @property
    def key(self) -> tuple[int, str, int, int]:
        """TD, leaf, page and level: equal for requests for the same operation."""
        return self.td, self.leaf, self.gpa, self.level

    @property
    def identity(self) -> Identity:
        """Thread, leaf, TD, vCPU, page and level: equal for attempts at one request."""
        return self.thread, self.leaf, self.td, self.vcpu, self.gpa, self.level


class PolicyAction(NamedTuple):
    """An action of the busy policy: a kick, a warning, a bug, giving up."""

    ts_ns: int
    thread: Thread
    td: int
    action: str
    leaf: str
    detail: int


@dataclass(slots=True)
class CountedFault:
    """One EPT violation that the module counted for zero-step."""

    gpa: int
    state: int
    """State of the Secure EPT entry where the access ended."""
    blocked_by: Call | None
    """The RANGE.BLOCK in force on that entry."""
    handling: str = ""
    """How KVM handled it: refused, memory_fault, served, spurious, frozen, invalidating or
    busy; empty until it is handled."""


class Actor(NamedTuple):
    """An actor in a run: a thread of the host on one TD, or the guest on one vCPU."""

    tid: int
    td: int
    vcpu: int
    side: str
    """``host`` or ``guest``."""
    kind: str
    """vcpu, main or a kind of worker; for a guest, its program."""
    conduct: str
    """``honest``, ``buggy`` or ``hostile``."""


class BrokenRule(NamedTuple):
    """A call that broke a rule of a correct kernel, and the call that proves it."""

    rule: str
    call: Call
    evidence: Call | None


@dataclass(slots=True)
class Episode:
    """One zero-step episode of a vCPU: from the arming of its gate until RIP advances."""

    thread: Thread
    td: int
    vcpu: int
    rip: int
    gpa: int
    armed_ns: int
    n_faults: int
    faults: list[CountedFault]
    """The counted faults at that RIP, in order, including those after the arming."""
    n_busy: int = 0
    n_emulated: int = 0
    first_refused_ns: int | None = None
    last_refused_ns: int | None = None
    cleared_ns: int | None = None


class Journal:
    """Calls, requests, events and actions of a run, in the order in which they ended."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.events: list[KernelEvent] = []
        self.requests: list[Request] = []
        self.actions: list[PolicyAction] = []
        self.episodes: list[Episode] = []
        self.epochs: list[tuple[int, int, int]] = []
        """Time, TD and number of each epoch that TRACK began."""
        self.actors: list[Actor] = []
        self.acts: dict[tuple[int, str], list[int]] = {}
        """Number, first and last time of the acts of an actor, by its thread and side."""
        self.broken: list[BrokenRule] = []
        """Broken rules recorded during the run; ``true_rules`` finds the others afterwards."""
        self.loader_calls: list[Call] = []
        """Calls of the P-SEAMLDR, in the order in which they ended."""
        self.stale_returns: list[Call] = []
        """Returns of tdx_vcpu_run that made no TDH.VP.ENTER, with the status of the last one."""
        self._pending: dict[Identity, Request] = {}
        """Requests whose last attempt was answered with a retryable status."""
        self._succeeded_ns: dict[tuple[int, str, int, int], int] = {}

    def open_request(
        self, leaf: str, thread: Thread, td: int, vcpu: int, page: tuple[int, int]
    ) -> Request:
        """Begin a request, or continue a pending one of the thread.

        A thread that makes the same request again continues it, even after other calls, unless
        another thread completed it meanwhile.  Requests for a physical page are distinguished by
        that page, which is not known here: they are always new.

        Args:
            leaf: The leaf to be called.
            thread: The calling thread.
            td: Number of the TD.
            vcpu: Number of the vCPU; -1: no vCPU.
            page: Guest page and level; (-1, -1): no page.
        """
        pending = self._pending.get((thread, leaf, td, vcpu, *page))
        if pending is not None and self._is_continued(pending):
            return pending
        request = Request(len(self.requests), leaf, thread, td, vcpu, *page, [])
        self.requests.append(request)
        return request

    def _is_continued(self, request: Request) -> bool:
        """Return whether the next attempt of the thread belongs to a pending request.

        The attempt belongs to it if it is the thread's next call, or if no other thread succeeded
        with the same request since the last attempt began.  An entry counts as another call: when
        the guest faults on the page again, KVM checks whether it is mapped (tdp_mmu.c,
        kvm_tdp_mmu_map); it installs a page that was mapped before only if it was removed
        meanwhile, which is another request.
        """
        if request.leaf.startswith("TDH.PHYMEM."):
            return False
        if request.thread.n_calls == request.turn:
            return True
        return not request.calls or not self._was_settled(request, request.calls[-1].start_ns)

    def _was_settled(self, request: Request, since_ns: int) -> bool:
        """Return whether any thread succeeded with the same request since a time."""
        # A TDH.VP.ENTER belongs to one vCPU, which only its own thread runs.
        is_shared = request.leaf != "TDH.VP.ENTER"
        return is_shared and self._succeeded_ns.get(request.key, -1) >= since_ns

    def add_attempt(self, request: Request, call: Call) -> None:
        """Add a completed attempt."""
        thread = request.thread
        if request.calls and thread.n_entries != request.n_entries:
            request.segments += 1
        thread.n_calls += 1
        self._add(request, call)
        if request.outcome == "succeeded":
            self._succeeded_ns[request.key] = call.end_ns

    def add_entry(self, request: Request, call: Call) -> None:
        """Add a completed TDH.VP.ENTER."""
        request.thread.n_calls += 1
        request.thread.n_entries += 1
        self._add(request, call)

    def _add(self, request: Request, call: Call) -> None:
        request.n_entries = request.thread.n_entries
        request.turn = request.thread.n_calls
        request.calls.append(call)
        self.calls.append(call)
        if call.status & abi.HIGH_HALF in RETRYABLE:
            self._pending[request.identity] = request
            return
        if self._pending.get(request.identity) is request:
            del self._pending[request.identity]
        request.outcome = "failed" if call.status & abi.ERROR_BIT else "succeeded"
        if request.leaf == "TDH.MEM.RANGE.UNBLOCK" and request.outcome == "succeeded":
            self._undo(request, call.end_ns)

    def _undo(self, unblock: Request, now: int) -> None:
        """End the pending requests on a range that is no longer blocked."""
        of_range = unblock.td, unblock.gpa, unblock.level
        for request in list(self._pending.values()):
            if request.leaf in NEED_BLOCK and of_range == (request.td, request.gpa, request.level):
                request.undone = now, self._outcome_if_given_up(request)
                del self._pending[request.identity]

    def abandon(self, request: Request) -> None:
        """Record that the caller gives up the operation; it may retry it later."""
        request.given_up = True

    def count_act(self, tid: int, side: str, now: int) -> None:
        """Count an act of an actor: an action of a worker, a refused fault, a TDCALL."""
        seen = self.acts.setdefault((tid, side), [0, now, now])
        seen[0] += 1
        seen[2] = now

    def truncate(self, end_ns: int) -> None:
        """Drop calls and events after the end of the run, and determine outcomes of requests.

        A pending request is resolved_elsewhere if another thread succeeded with it after its first
        attempt, else abandoned.  It is cut if its thread may still retry it: the thread began no
        other request since, or made no more calls of the leaf since than it made before it retried
        another request; unless the range was unblocked, or another thread completed the request.
        """
        self.calls = [call for call in self.calls if call.end_ns <= end_ns]
        self.events = [event for event in self.events if event.ts_ns <= end_ns]
        self.loader_calls = [call for call in self.loader_calls if call.end_ns <= end_ns]
        self.stale_returns = [call for call in self.stale_returns if call.end_ns <= end_ns]
        for request in self.requests:
            if request.calls and request.calls[-1].end_ns > end_ns:
                request.calls.pop()
                request.outcome = ""
            if request.undone is not None and request.undone[0] > end_ns:
                request.undone = None
        self.requests = [request for request in self.requests if request.calls]
        begun = {(request.thread, _is_entry(request)): request for request in self.requests}
        turns = _Turns(self.requests)
        for request in self.requests:
            if not request.outcome:
                request.outcome = self._pending_outcome(request, begun, turns)

    def _pending_outcome(
        self, request: Request, begun: Mapping[tuple[Thread, bool], Request], turns: _Turns
    ) -> str:
        """Return the outcome of a request that was pending at the end of the run.

        Args:
            request: The request.
            begun: Last request of each thread, by whether it is an entry.
            turns: Numbers of calls before threads retry requests.
        """
        if request.undone is not None:
            return request.undone[1]
        kinds = (False,) if request.leaf in FAULT_LEAVES else (False, True)
        last_ns = request.calls[-1].start_ns
        later = (begun.get((request.thread, is_entry)) for is_entry in kinds)
        if not any(other is not None and other.calls[0].start_ns > last_ns for other in later):
            return "cut"
        if turns.may_retry(request) and not self._was_settled(request, last_ns):
            return "cut"
        return self._outcome_if_given_up(request)

    def _outcome_if_given_up(self, request: Request) -> str:
        """Return the outcome if the caller gives up now: resolved_elsewhere or abandoned."""
        is_settled = self._was_settled(request, request.calls[0].start_ns)
        return "resolved_elsewhere" if is_settled else "abandoned"


class _Turns:
    """Numbers of calls of a leaf that threads make before they retry a request.

    Args:
        requests: All requests of a run, with their calls.
    """

    def __init__(self, requests: list[Request]) -> None:
        self._n_calls: dict[tuple[Thread, str], int] = {}
        """Calls of each thread, by leaf."""
        self._place: dict[int, int] = {}
        """Ordinal of each call among those of its thread and leaf, by its id."""
        self._max_calls: dict[str, int] = {}
        """By leaf: maximum number of its calls between two attempts that are not consecutive."""
        turn: dict[int, int] = {}
        n_of_thread: dict[Thread, int] = {}
        made = [(call.start_ns, request, call) for request in requests for call in request.calls]
        for _, request, call in sorted(made, key=lambda one: one[0]):
            thread, leaf = request.thread, request.leaf
            turn[id(call)] = n_of_thread[thread] = n_of_thread.get(thread, 0) + 1
            n = self._n_calls[thread, leaf] = self._n_calls.get((thread, leaf), 0) + 1
            self._place[id(call)] = n
        for request in requests:
            for one, other in pairwise(request.calls):
                if turn[id(other)] > turn[id(one)] + 1:
                    between = self._place[id(other)] - self._place[id(one)] - 1
                    self._max_calls[request.leaf] = max(
                        self._max_calls.get(request.leaf, -1), between
                    )

    def may_retry(self, request: Request) -> bool:
        """Return whether some request of the leaf was retried after as many calls as since then."""
        n_calls = self._n_calls[request.thread, request.leaf]
        return n_calls - self._place[id(request.calls[-1])] <= self._max_calls.get(request.leaf, -1)


def _is_entry(request: Request) -> bool:
    return request.leaf == "TDH.VP.ENTER"
