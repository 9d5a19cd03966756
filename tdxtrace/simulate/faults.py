"""What goes wrong in a capture: losses with the tools' own markers, and worse without."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Final

from tdxtrace.errors import QueryError
from tdxtrace.simulate.draws import Draws
from tdxtrace.simulate.engine import Run
from tdxtrace.simulate.observe import Capture, Observer, Seen
from tdxtrace.simulate.recording import Lost, Recording

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
    """One fault and its size."""

    kind: str
    amount: float


def fault_of(text: str) -> Fault:
    """Read a fault as ``KIND=AMOUNT``.

    Raises:
        QueryError: If it is none, or its amount is no number or out of range.
    """
    kind, equals, amount = text.partition("=")
    if kind not in FAULTS:
        near = difflib.get_close_matches(kind, FAULTS, n=1, cutoff=0)[0]
        raise QueryError(f"no fault {kind!r}; nearest: {near}; all: {', '.join(FAULTS)}")
    try:
        number = float(amount)
    except ValueError:
        raise QueryError(f"not a fault: {text!r}; write {kind}=0.1") from None
    most = 1_000_000 if kind == "clock" else 0.9
    if not equals or not 0 <= number <= most:
        raise QueryError(f"fault {kind!r} is {amount!r}, not within 0 to {most}")
    return Fault(kind, number)


def record(run: Run, capture: Capture, faults: tuple[Fault, ...]) -> Recording:
    """Record a run: observe it, and let go wrong what is to go wrong."""
    events = Observer(run, capture).events()
    n_cpus = run.scenario.cpus
    recording = Recording(list(events), n_cpus, run.scenario.kernel, len(events))
    draws = Draws(run.seed, _ACTOR)
    for fault in faults:
        _APPLY[fault.kind](recording, fault.amount, draws)
    kept = {id(seen) for seen in recording.events()}
    recording.dropped = {id(seen) for seen in events if id(seen) not in kept}
    # What is dropped stays alive, so that its identity is nobody else's.
    recording.graveyard = [seen for seen in events if id(seen) in recording.dropped]
    return recording


def _lose(recording: Recording, share: float, draws: Draws) -> None:
    """Drop runs of events of one CPU, a marker before the next event that was kept."""
    open_gaps: dict[int, Lost] = {}
    left: dict[int, int] = {}
    items: list[Seen | Lost] = []
    begin = share / (1 - share) / _GAP_EVENTS if share < 1 else 1.0
    for item in recording.items:
        if isinstance(item, Lost):
            items.append(item)
            continue
        cpu = item.cpu
        if left.get(cpu, 0) == 0 and cpu not in open_gaps and draws.chance(begin):
            left[cpu] = 1 + draws.exponential(_GAP_EVENTS)
        if left.get(cpu, 0) > 0:
            left[cpu] -= 1
            gap = open_gaps.setdefault(cpu, Lost(item.ts_ns, cpu, 0))
            open_gaps[cpu] = Lost(gap.ts_ns, cpu, gap.n_events + 1)
            continue
        gap_here = open_gaps.pop(cpu, None)
        if gap_here is not None:
            counted = draws.chance(0.9)
            items.append(Lost(item.ts_ns, cpu, gap_here.n_events, item.tid, item.comm, counted))
        items.append(item)
    recording.items = items


def _overwrite(recording: Recording, share: float, _: Draws) -> None:
    _drop_ends(recording, share, oldest=True)


def _fill(recording: Recording, share: float, _: Draws) -> None:
    before = recording.n_written
    _drop_ends(recording, share, oldest=False)
    # What found no room was never written: entries-written does not count it.
    recording.n_written = before - (before - len(recording.events()))


def _drop_ends(recording: Recording, share: float, oldest: bool) -> None:
    by_cpu: dict[int, list[Seen]] = {}
    for seen in recording.events():
        by_cpu.setdefault(seen.cpu, []).append(seen)
    gone: set[int] = set()
    for events in by_cpu.values():
        n = int(len(events) * share)
        part = events[:n] if oldest else events[len(events) - n :]
        gone.update(id(seen) for seen in part)
    recording.items = [item for item in recording.items if id(item) not in gone]


def _truncate(recording: Recording, share: float, _: Draws) -> None:
    recording.cut_share = share


def _skew(recording: Recording, amount_us: float, _: Draws) -> None:
    shift = int(amount_us * 1000)
    for seen in recording.events():
        seen.ts_ns += shift if seen.cpu % 2 else 0
    # trace merges the CPUs' buffers by their stamps, right or wrong.
    recording.items.sort(key=lambda item: (item.ts_ns, item.cpu))


def _miss_returns(recording: Recording, share: float, draws: Draws) -> None:
    recording.items = [
        item
        for item in recording.items
        if isinstance(item, Lost) or item.spec.kind != "return" or not draws.chance(share)
    ]


_APPLY: Final = {
    "lost": _lose,
    "overwritten": _overwrite,
    "full": _fill,
    "truncated": _truncate,
    "clock": _skew,
    "returns": _miss_returns,
}
