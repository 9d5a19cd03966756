"""Causes in real captures, compared with the attempts logged by the traced program."""

from __future__ import annotations

import csv
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.rig import CAPTURES, CLOCK_NS, LEAVES, SAMPLES

from tdxtrace.analysis.causes.busy_causes import busy_causes
from tdxtrace.analysis.causes.conflicts import ALL_GENERATIONS, mask_of
from tdxtrace.analysis.causes.evidence import gather_evidence
from tdxtrace.ingest.read import read_trace
from tdxtrace.tables.causes import BUSY_CAUSES
from tdxtrace.tables.trace import Trace

RIG = CAPTURES / "rig"
# Captures without losses whose truth has the times of every attempt.
CASES = {
    "samples/contended": (SAMPLES / "contended.txt", SAMPLES / "contended.truth.csv"),
    "samples/zerostep": (SAMPLES / "zerostep.txt", SAMPLES / "zerostep.truth.csv"),
    **{
        name: (RIG / name.split("/")[0] / name.split("/")[1], RIG / name.split("/")[0] / truth)
        for name, truth in (
            ("giveup/trace.txt", "truth.csv"),
            ("noise/trace.txt", "truth.csv"),
            ("tracefs-pipe/trace_pipe.txt", "truth.csv"),
            ("tracecmd-v7/report.txt", "truth.csv"),
            ("tracecmd-v6/report.txt", "truth.csv"),
            ("perf/script--ns.txt", "truth.csv"),
            ("qemu-names/trace.tgid.txt", "truth.csv"),
        )
    },
}
# Leaves that take the tree in the program: all of them alone, as the module's 1.0 does.
_ON_TREE = frozenset(LEAVES.values()) - {0, 38, 41}


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt as the program logged it."""

    tid: int
    leaf: int
    start_ns: int
    end_ns: int
    status: int

    @property
    def is_busy(self) -> bool:
        """Whether it was answered busy."""
        return self.status >> 32 in (0x8000_0200, 0x8000_0201)

    @property
    def got_nothing(self) -> bool:
        """Whether it found its first lock held; TRACK has the epoch when it asks for vCPUs."""
        return self.status >> 32 == 0x8000_0200

    def overlaps(self, other: Attempt) -> bool:
        """Whether both overlap in time, by the program's clock."""
        return self.start_ns < other.end_ns and other.start_ns < self.end_ns


def logged(path: Path) -> dict[tuple[int, int], list[Attempt]]:
    """Attempts by thread and leaf, in order."""
    found: dict[tuple[int, int], list[Attempt]] = defaultdict(list)
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            tid, leaf, at = int(row["tid"]), LEAVES[row["function"]], int(row["start_ns"])
            columns = (row["attempt_start_ns"], row["attempt_end_ns"], row["statuses"])
            for begin, end, status in zip(*(text.split(";") for text in columns), strict=True):
                attempt = Attempt(tid, leaf, at + int(begin), at + int(end), int(status, 16))
                found[tid, leaf].append(attempt)
    for attempts in found.values():
        attempts.sort(key=lambda attempt: attempt.start_ns)
    return found


def by_seq(trace: Trace, truth: dict[tuple[int, int], list[Attempt]]) -> dict[int, Attempt]:
    """The logged attempt that each row of the capture stands for."""
    rows: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    calls = trace.seamcalls.sort("start_ns", "seq").select("tid", "leaf", "seq", "status")
    for tid, leaf, seq, status in calls.iter_rows():
        rows[tid, leaf].append((seq, status))
    found = {}
    for key, seen in rows.items():
        assert [status for _, status in seen] == [attempt.status for attempt in truth[key]]
        found.update({seq: a for (seq, _), a in zip(seen, truth[key], strict=True)})
    return found


def captured(name: str) -> tuple[Trace, dict[int, Attempt]]:
    """A capture and what the program logged of it, by row."""
    path, truth = CASES[name]
    if not path.exists():
        pytest.skip(f"{name}: the captures of the rig are not beside this checkout")
    trace = read_trace(path)
    return trace, by_seq(trace, logged(truth))


@pytest.mark.parametrize("name", CASES)
def test_causes_agree_with_what_the_program_logged(name: str) -> None:
    trace, real = captured(name)
    answers = BUSY_CAUSES.check(busy_causes(gather_evidence(trace, mask=ALL_GENERATIONS))).filter(
        rank=1
    )
    assert answers.height == sum(attempt.is_busy for attempt in real.values()) > 10
    wrong = []
    for row in answers.filter(cause="host_conflict").iter_rows(named=True):
        attempt, holder = real[row["seq"]], real[row["holder_seq"]]
        if not attempt.overlaps(holder) or holder.got_nothing:
            wrong.append(row)
    assert wrong == []
    assert answers.filter(cause="host_conflict").height > 0


@pytest.mark.parametrize("name", CASES)
def test_a_logged_holder_is_rarely_missed(name: str) -> None:
    trace, real = captured(name)
    # The program takes the tree as generation A does, beside what it does otherwise.
    answers = busy_causes(gather_evidence(trace, mask=mask_of("A"))).filter(rank=1)
    working = [a for a in real.values() if a.leaf in _ON_TREE and not a.is_busy]
    held, missed = 0, 0
    for row in answers.filter(resource="SEPT tree").iter_rows(named=True):
        attempt = real[row["seq"]]
        others = [
            other
            for other in working
            if other.tid != attempt.tid
            # The program reads its clock some way after the call came back, so what only
            # meets the end of its interval may have begun when the answer was long there.
            and other.start_ns < attempt.start_ns - CLOCK_NS
            and other.end_ns > attempt.end_ns + CLOCK_NS
        ]
        held += bool(others)
        missed += bool(others) and row["cause"] == "unexplained"
    assert missed <= 0.02 * held
