"""Faults of a capture: lost events with or without the tools' markers, and damaged files."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Final

from tdxtrace.errors import QueryError
from tdxtrace.simulate.engine import Run
from tdxtrace.simulate.record.probes import Capture, ProbeRecorder
from tdxtrace.simulate.record.recording import LostEvents, Recording, TraceEvent
from tdxtrace.simulate.thread import RandomStream

FAULTS: Final = {
    "lost": "share of the events that go missing, in gaps with the tool's marker (0 to 0.9)",
    "overwritten": "share of the oldest events that each CPU's buffer overwrote, without a marker",
    "full": "share of the newest events that found each CPU's buffer full, without a marker",
    "truncated": "share of the written file that is cut off its end",
    "clock": "microseconds that the clock of every odd CPU is ahead",
    "returns": "share of the return probes that missed (kretprobe maxactive)",
}
_ACTOR: Final = 1 << 31
_GAP_EVENTS: Final = 40
"""Mean length of one gap; a ring-buffer page of 4 KB holds about 60 of these events."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault of a capture and its size."""

    kind: str
    amount: float


def parse_fault(text: str) -> Fault:
    """Parse ``KIND=AMOUNT``.

    Raises:
        QueryError: If the kind is unknown, or the amount is not a number or out of range.
    """
    kind, equals, amount = text.partition("=")
    if kind not in FAULTS:
        nearest = difflib.get_close_matches(kind, FAULTS, n=1, cutoff=0)[0]
        raise QueryError(f"no fault {kind!r}; nearest: {nearest}; all: {', '.join(FAULTS)}")
    try:
        number = float(amount)
    except ValueError:
        raise QueryError(f"not a fault: {text!r}; write {kind}=0.1") from None
    max_amount = 1_000_000 if kind == "clock" else 0.9
    if not equals or not 0 <= number <= max_amount:
        raise QueryError(f"fault {kind!r} is {amount!r}, not within 0 to {max_amount}")
    return Fault(kind, number)


def record(run: Run, capture: Capture, faults: tuple[Fault, ...]) -> Recording:
    """Record a run and apply faults to the recording."""
    events = ProbeRecorder(run, capture).events()
    n_cpus = run.scenario.cpus
    recording = Recording(list(events), n_cpus, run.scenario.kernel, len(events))
    random = RandomStream(run.seed, _ACTOR)
    for fault in faults:
        _APPLY[fault.kind](recording, fault.amount, random)
    return recording


def _lose(recording: Recording, share: float, random: RandomStream) -> None:
    """Drop sequences of events of one CPU, with a marker before its next event."""
    open_gaps: dict[int, LostEvents] = {}
    left: dict[int, int] = {}
    items: list[TraceEvent | LostEvents] = []
    begin = share / (1 - share) / _GAP_EVENTS if share < 1 else 1.0
    for item in recording.items:
        if isinstance(item, LostEvents):
            items.append(item)
            continue
        cpu = item.cpu
        if left.get(cpu, 0) == 0 and cpu not in open_gaps and random.chance(begin):
            left[cpu] = 1 + random.exponential(_GAP_EVENTS)
        if left.get(cpu, 0) > 0:
            left[cpu] -= 1
            gap = open_gaps.setdefault(cpu, LostEvents(item.ts_ns, cpu, 0))
            open_gaps[cpu] = LostEvents(gap.ts_ns, cpu, gap.n_events + 1)
            continue
        gap_here = open_gaps.pop(cpu, None)
        if gap_here is not None:
            counted = random.chance(0.9)
            items.append(
                LostEvents(item.ts_ns, cpu, gap_here.n_events, item.tid, item.comm, counted)
            )
        items.append(item)
    recording.items = items


def _overwrite(recording: Recording, share: float, _: RandomStream) -> None:
    _drop_ends(recording, share, oldest=True)


def _fill(recording: Recording, share: float, _: RandomStream) -> None:
    _drop_ends(recording, share, oldest=False)
    # entries-written does not count events that did not fit.
    recording.n_written = len(recording.events())


def _drop_ends(recording: Recording, share: float, oldest: bool) -> None:
    by_cpu: dict[int, list[TraceEvent]] = {}
    for event in recording.events():
        by_cpu.setdefault(event.cpu, []).append(event)
    gone: set[int] = set()
    for events in by_cpu.values():
        n = int(len(events) * share)
        part = events[:n] if oldest else events[len(events) - n :]
        gone.update(id(event) for event in part)
    recording.items = [item for item in recording.items if id(item) not in gone]


def _truncate(recording: Recording, share: float, _: RandomStream) -> None:
    recording.cut_share = share


def _skew(recording: Recording, amount_us: float, _: RandomStream) -> None:
    shift = int(amount_us * 1000)
    for event in recording.events():
        event.ts_ns += shift if event.cpu % 2 else 0
    # The buffers of CPUs are merged by timestamp, even if it is wrong.
    recording.items.sort(key=lambda item: (item.ts_ns, item.cpu))


def _miss_returns(recording: Recording, share: float, random: RandomStream) -> None:
    recording.items = [
        item
        for item in recording.items
        if isinstance(item, LostEvents) or item.spec.kind != "return" or not random.chance(share)
    ]


_APPLY: Final = {
    "lost": _lose,
    "overwritten": _overwrite,
    "full": _fill,
    "truncated": _truncate,
    "clock": _skew,
    "returns": _miss_returns,
}
