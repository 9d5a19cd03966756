"""Compare simulated with published figures: the tables of sample_traces/README.md.

Run it by hand: python tests/bench/realism.py.  The left column is what was published
(sources beside it), the right what a scenario gives; nothing here is a test, because no
public number has a spread to test against.
"""

from __future__ import annotations

import csv
import dataclasses
import statistics
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

from tdxtrace.simulate import engine, scenario
from tdxtrace.simulate.engine import Run
from tdxtrace.simulate.journal import Request
from tdxtrace.simulate.module.abi import EXIT_CPUID, is_busy
from tdxtrace.simulate.module.state import Call

SAMPLES = Path(__file__).parents[2] / "sample_traces"


def _run(name: str, vcpus: int | None = None, **changes: object) -> Run:
    made = scenario.named(name).with_vcpus(vcpus).with_(**changes)
    return engine.run(made, 1)


def _median_us(times_ns: list[int]) -> float:
    return statistics.median(times_ns) / 1000 if times_ns else float("nan")


def _by_thread(run: Run) -> dict[int, list[Call]]:
    calls: dict[int, list[Call]] = defaultdict(list)
    for call in sorted(run.journal.calls, key=lambda c: c.start_ns):
        if call.thread is not None and not call.in_irq:
            calls[call.thread.tid].append(call)
    return calls


def _round_trip(run: Run, asked: int) -> float:
    """From the end of an entry that asked for this exit to the next, and both ways through."""
    gaps = []
    for calls in _by_thread(run).values():
        for one, two in pairwise(calls):
            if one.vmcall_reason == asked and two.leaf == "TDH.VP.ENTER":
                gaps.append(two.start_ns - one.end_ns)
    times = run.scenario.durations()
    through = sum(
        span.median
        for span in (
            times.leave_guest,
            times.out_of_module,
            times.into_module,
            times.epoch_window,
            times.enter_guest,
            times.handle_ve,
        )
    )
    return _median_us(gaps) + through / 1000


def _fault(run: Run) -> float:
    """From a fault's exit through AUG to the next entry, and both ways through the module."""
    took = []
    for calls in _by_thread(run).values():
        for one, two, three in zip(calls, calls[1:], calls[2:], strict=False):
            is_fault = one.leaf == "TDH.VP.ENTER" and one.status == 48
            if is_fault and two.leaf == "TDH.MEM.PAGE.AUG" and three.leaf == "TDH.VP.ENTER":
                took.append(three.start_ns - one.end_ns)
    times = run.scenario.durations()
    spans = (times.leave_guest, times.out_of_module, times.into_module, times.enter_guest)
    return _median_us(took) + sum(s.median for s in spans) / 1000


def _per_page(run: Run, leaf: str) -> float:
    ends = sorted(c.end_ns for c in run.journal.calls if c.leaf == leaf)
    return (ends[-1] - ends[0]) / max(1, len(ends) - 1) / 1000 if len(ends) > 1 else float("nan")


def public_quantities() -> None:
    """Print each public number beside what the simulator gives."""
    busy = [c for c in _run("hostile_guest", policy="endless").journal.calls if is_busy(c.status)]
    boot = _run("boot_storm", 1, duration_ms=20)
    rows = [
        (
            "failed SEAMCALL",
            ">= 0.74 us (guess)",
            _median_us([c.end_ns - c.start_ns for c in busy]),
        ),
        ("CPUID through KVM", "3.85 us", _round_trip(_run("quiet", duration_ms=200), EXIT_CPUID)),
        ("private fault, quiet", "8 us", _fault(boot)),
        ("accept and AUG, per page", "14.3 us", _per_page(boot, "TDH.MEM.PAGE.AUG")),
    ]
    for vcpus, public in ((4, 15.3), (32, 18.4), (64, 52.8)):
        taken = _per_page(_run("removal", vcpus, duration_ms=20), "TDH.MEM.PAGE.REMOVE")
        rows.append((f"page removal, {vcpus} vCPUs", f"{public} us", taken))
    torn = _run("lifecycle", no_entropy=0.0)
    one_td = [c for c in torn.journal.calls if c.td is not None and c.td.number == 0]
    only = dataclasses.replace(torn, journal=torn.journal)
    only.journal.calls = one_td
    rows.append(
        ("page reclaim at teardown", "4.5 to 5.1 us", _per_page(only, "TDH.PHYMEM.PAGE.RECLAIM"))
    )
    for what, public_text, simulated in rows:
        print(f"{what:28} {public_text:>20} {simulated:8.2f} us")


def how_often() -> None:
    """Print the shares of busy that mails only describe in words."""
    for name in ("balloon", "conversion_churn", "memslot_deletion"):
        run = _run(name)
        counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        for call in run.journal.calls:
            counts[call.leaf][0] += 1
            counts[call.leaf][1] += is_busy(call.status)
        result = ", ".join(
            f"{leaf.removeprefix('TDH.MEM.')} {busy}/{n}"
            for leaf, (n, busy) in sorted(counts.items())
            if leaf.endswith(("TRACK", "BLOCK", "REMOVE", "AUG"))
        )
        print(f"{name:20} busy: {result}; armed: {len(run.journal.episodes)}")


def _spread(values: list[float]) -> str:
    if not values:
        return "none"
    cuts = sorted(values)
    at = [cuts[min(len(cuts) - 1, int(len(cuts) * q))] for q in (0.5, 0.9, 0.99)]
    return f"n {len(cuts)}, p50 {at[0]:g}, p90 {at[1]:g}, p99 {at[2]:g}, max {cuts[-1]:g}"


def _gaps(requests: list[Request]) -> list[float]:
    return [
        (two.start_ns - one.end_ns) / 1000
        for request in requests
        for one, two in pairwise(request.calls)
    ]


def beside_the_rig() -> None:
    """Print attempts and gaps of the rig's two samples beside those of scenarios."""
    for sample in ("contended", "zerostep"):
        with (SAMPLES / f"{sample}.truth.csv").open() as file:
            rows = [row for row in csv.DictReader(file) if int(row["attempts"]) > 1]
        attempts = [float(row["attempts"]) for row in rows]
        gaps = [
            (int(start) - int(end)) / 1000
            for row in rows
            if row.get("attempt_start_ns")
            for end, start in zip(
                row["attempt_end_ns"].split(";"),
                row["attempt_start_ns"].split(";")[1:],
                strict=False,
            )
        ]
        print(f"rig {sample}: attempts {_spread(attempts)}; gaps us {_spread(gaps)}")
    for name, generation in (("hostile_guest", "B"), ("zero_step_attack", "B")):
        run = _run(name, generation=generation, policy="endless")
        retried = [r for r in run.journal.requests if len(r.calls) > 1]
        attempts = [float(len(r.calls)) for r in retried]
        print(f"sim {name}: attempts {_spread(attempts)}; gaps us {_spread(_gaps(retried))}")


if __name__ == "__main__":
    public_quantities()
    how_often()
    beside_the_rig()
