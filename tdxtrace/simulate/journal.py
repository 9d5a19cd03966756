"""What happened, as it happens: calls, requests, who was refused by whom, events."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from tdxtrace.simulate.words import (
    ERROR_BIT,
    HIGH_HALF,
    INTERRUPTED_BUSY,
    INTERRUPTED_RESTARTABLE,
    INTERRUPTED_RESUMABLE,
    OPERAND_BUSY,
    PREVIOUS_TLB_EPOCH_BUSY,
    RND_NO_ENTROPY,
)

if TYPE_CHECKING:
    from tdxtrace.simulate.state import Call
    from tdxtrace.simulate.threads import Thread

# A host that gets one of these issues the same call again, now or after a kick; the
# resource is what it waits for, where no lock is.
UNSETTLED: Final = {
    OPERAND_BUSY: "",
    PREVIOUS_TLB_EPOCH_BUSY: "PREVIOUS_EPOCH",
    RND_NO_ENTROPY: "ENTROPY",
    INTERRUPTED_RESUMABLE: "INTERRUPT",
    INTERRUPTED_RESTARTABLE: "INTERRUPT",
    INTERRUPTED_BUSY: "TREE_PRIORITY",
}


class Event(NamedTuple):
    """One line that is no SEAMCALL: a tracepoint of KVM, or a line of the kernel log."""

    ts_ns: int
    cpu: int
    thread: Thread
    name: str
    fields: tuple[object, ...]


@dataclass(slots=True, eq=False)
class Request:
    """What one caller wants done once, and the attempts at it."""

    number: int
    leaf: str
    thread: Thread
    td: int
    vcpu: int
    gpa: int
    level: int
    calls: list[Call]
    segments: int = 1
    entered: int = 0
    """vCPU entries of the thread up to the latest attempt."""
    outcome: str = ""
    """Empty while it is open."""

    @property
    def key(self) -> tuple[int, str, int, int]:
        """What makes another call a call for the same thing."""
        return self.td, self.leaf, self.gpa, self.level


class Action(NamedTuple):
    """Something the policy did: a kick, a warning, a bug, giving up."""

    ts_ns: int
    thread: Thread
    td: int
    action: str
    leaf: str
    detail: int


@dataclass(slots=True)
class Episode:
    """One time the zero-step gate of a vCPU was armed, until RIP moved on."""

    thread: Thread
    td: int
    vcpu: int
    rip: int
    gpa: int
    armed_ns: int
    n_faults: int
    n_busy: int = 0
    n_emulated: int = 0
    first_refused_ns: int | None = None
    last_refused_ns: int | None = None
    cleared_ns: int | None = None


class Journal:
    """Everything that is worth telling of a run, in the order it became known."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.events: list[Event] = []
        self.requests: list[Request] = []
        self.actions: list[Action] = []
        self.episodes: list[Episode] = []
        self.epochs: list[tuple[int, int, int]] = []
        """Time, TD and number of each epoch that TRACK began."""
        self._left: dict[tuple[int, str, int, int], list[Request]] = {}
        self._settled: dict[tuple[int, str, int, int], int] = {}

    def open(self, leaf: str, thread: Thread, td: int, vcpu: int, page: tuple[int, int]) -> Request:
        """Begin a request; ``page`` is its guest page and level, (-1, -1) if it has none."""
        request = Request(len(self.requests), leaf, thread, td, vcpu, *page, [])
        self.requests.append(request)
        return request

    def answered(self, request: Request, call: Call) -> bool:
        """Add an attempt and its answer; returns whether it settled the request."""
        thread = request.thread
        if request.calls and thread.n_entries != request.entered:
            request.segments += 1
        request.entered = thread.n_entries
        thread.n_calls += 1
        request.calls.append(call)
        self.calls.append(call)
        if thread.pending is not None and thread.pending is not request:
            self.leave(thread.pending)
        thread.pending = None
        if call.status & HIGH_HALF in UNSETTLED:
            thread.pending = request
            return False
        if call.status & ERROR_BIT:
            request.outcome = "failed"
            return True
        request.outcome = "succeeded"
        self._settle(request.key, call.end_ns)
        return True

    def leave(self, request: Request) -> None:
        """The caller went on to something else without having its request settled."""
        if request.outcome or not request.calls:
            return
        if request.thread.pending is request:
            request.thread.pending = None
        request.outcome = "abandoned"
        if self._settled.get(request.key, -1) >= request.calls[0].start_ns:
            request.outcome = "resolved_elsewhere"
        elif request.leaf != "TDH.VP.ENTER":
            self._left.setdefault(request.key, []).append(request)

    def entered(self, request: Request, call: Call) -> bool:
        """Add a TDH.VP.ENTER and its answer; returns whether it settled the request.

        It leaves another request of its thread open: a fault's goes on after it.
        """
        request.thread.n_calls += 1
        request.thread.n_entries += 1
        request.calls.append(call)
        self.calls.append(call)
        if call.status & HIGH_HALF in UNSETTLED:
            return False
        request.outcome = "failed" if call.status & ERROR_BIT else "succeeded"
        return True

    def _settle(self, key: tuple[int, str, int, int], end_ns: int) -> None:
        self._settled[key] = end_ns
        for request in self._left.pop(key, ()):
            request.outcome = "resolved_elsewhere"

    def cut_off(self, end_ns: int) -> None:
        """End of the run: drop what lies behind it; what is still open is cut."""
        self.calls = [call for call in self.calls if call.end_ns <= end_ns]
        self.events = [event for event in self.events if event.ts_ns <= end_ns]
        for request in self.requests:
            if request.calls and request.calls[-1].end_ns > end_ns:
                request.calls.pop()
                request.outcome = ""
            request.outcome = request.outcome or "cut"
        self.requests = [request for request in self.requests if request.calls]
