"""Chains and episodes of real captures, compared with the log of the traced program."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import polars as pl
import pytest
from support import rig
from support.effort import times
from support.rig import CAPTURES, SAMPLES
from support.texts import is_accounted_for, read_text

from tdxtrace.ingest.read import read_trace
from tdxtrace.pipeline import analyze
from tdxtrace.tables.trace import Findings, Trace

RIG = CAPTURES / "rig"


@dataclass(frozen=True, slots=True)
class Case:
    """A capture, its truth, and what the capture cannot show."""

    text: str
    truth: str
    episodes: str | None = None
    mappings: tuple[str, ...] = ()
    unprobed: tuple[str, ...] = ()
    blind: tuple[str, ...] = ()
    is_relative: bool = False
    is_lossy: bool = False

    @property
    def ops(self) -> list[rig.Op]:
        """What happened, of what was probed."""
        probed = [name for name in rig.LEAVES if name not in self.unprobed]
        return rig.read_ops(_path(self.truth), probed, self.blind)


def _path(name: str) -> Path:
    """A file of the rig, or of the samples."""
    path = SAMPLES / name if "/" not in name else RIG / name
    if not path.exists():
        pytest.skip(f"{path.name}: the captures of the rig are not beside this checkout")
    return path


@cache
def found(case: Case) -> tuple[Trace, Findings]:
    trace = read_trace(_path(case.text), mappings=case.mappings)
    return trace, analyze(trace)


def forms(folder: str, texts: list[str], truth: str = "truth.csv") -> list[Case]:
    return [
        Case(f"{folder}/{text}", f"{folder}/{truth}", is_relative="latency-" in text)
        for text in texts
    ]


STYLES = Case(
    "styles/trace.txt",
    "styles/truth.csv",
    mappings=("p_0x4240=tdh_mem_page_remove", "r_0x4240=tdh_mem_page_remove"),
    unprobed=("tdh_mem_sept_add", "tdh_phymem_page_wbinvd_hkid"),
    blind=("tdh_mem_page_remove",),
)
TRACEFS = forms(
    "tracefs-default",
    [
        f"trace{how}.txt"
        for how in ("", ".tgid", ".no-irq-info", ".fields", ".latency-format", ".latency-verbose")
    ],
)
TRACE_CMD = forms("tracecmd-v7", [f"report{how}.txt" for how in ("", "-R", "-l", "-t", "--raw-ts")])
TRACE_CMD_6 = forms("tracecmd-v6", ["report.txt", "report-t.txt"])
PERF = forms("perf", [f"script{how}.txt" for how in ("", "--ns", "-F", "-F-pid-ip-sym")])
QEMU = forms("qemu-names", ["trace.tgid.txt"])
QEMU_PERF = forms("qemu-names", ["perf.script.txt"], "truth_perf.csv")
SAMPLE_CASES = [
    Case("contended.txt", "contended.truth.csv"),
    Case("zerostep.txt", "zerostep.truth.csv"),
]
LOSSLESS = [
    *SAMPLE_CASES,
    *forms("contended", ["trace.txt"]),
    *forms("giveup", ["trace.txt"]),
    Case("zerostep/trace.txt", "zerostep/truth.csv"),
    *forms("noise", ["trace.txt"]),
    *forms("tracefs-pipe", ["trace_pipe.txt"]),
    *QEMU,
    *QEMU_PERF,
    *TRACEFS,
    *TRACE_CMD,
    *TRACE_CMD_6,
    *PERF,
    STYLES,
]
LOSSY = [
    Case("lost-tracefs/trace.overwrite.txt", "lost-tracefs/truth_overwrite.csv", is_lossy=True),
    Case("lost-tracefs/trace.nooverwrite.txt", "lost-tracefs/truth_nooverwrite.csv", is_lossy=True),
    Case("lost-tracefs/trace_pipe.txt", "lost-tracefs/truth_pipe.csv", is_lossy=True),
    Case("lost-tracecmd/report.txt", "lost-tracecmd/truth.csv", is_lossy=True),
]


def of_text(case: Case) -> str:
    return case.text


@pytest.mark.parametrize("case", LOSSLESS, ids=of_text)
def test_every_chain_is_exact(case: Case) -> None:
    _, findings = found(case)
    ops = case.ops
    score = rig.compare(findings.retry_chains, ops, is_relative=case.is_relative)
    assert score.problems[:5] == []
    assert score.exact == len(ops) == findings.retry_chains.height > 100


@pytest.mark.parametrize("case", LOSSY, ids=of_text)
def test_with_lost_events_only_cut_chains_differ(case: Case) -> None:
    _, findings = found(case)
    score = rig.compare_lossy(findings.retry_chains, case.ops)
    assert score.problems[:5] == []
    assert score.exact + score.cut == findings.retry_chains.height
    # Marking everything would be right as well, and useless.
    assert score.cut < 0.1 * findings.retry_chains.height


@pytest.mark.parametrize("case", [c for c in LOSSY if "nooverwrite" not in c.text], ids=of_text)
def test_losses_in_the_text_are_in_the_table(case: Case) -> None:
    _, findings = found(case)
    assert findings.losses.filter(pl.col("severity") == "data_loss").height > 0


@pytest.mark.parametrize("case", [*LOSSLESS, *LOSSY], ids=of_text)
def test_tables_are_valid_and_lines_accounted_for(case: Case) -> None:
    trace, findings = found(case)
    trace.check()
    findings.check()
    assert is_accounted_for(trace)
    assert findings.retry_chains["n_attempts"].sum() == trace.seamcalls.height


@pytest.mark.parametrize("case", LOSSLESS, ids=of_text)
def test_a_capture_without_losses_has_none_in_the_table(case: Case) -> None:
    _, findings = found(case)
    assert findings.losses.filter(pl.col("severity") != "info").is_empty()


@pytest.mark.parametrize(
    "group", [TRACEFS, TRACE_CMD, TRACE_CMD_6, PERF], ids=lambda group: group[0].text.split("/")[0]
)
def test_one_capture_has_the_same_chains_in_every_text_format(group: list[Case]) -> None:
    columns = ["tid", "leaf", "td_id", "vp_id", "gpa", "level", "n_attempts", "n_busy"]
    columns += ["n_segments", "outcome", "final_status", "identity", "cut_by"]
    tables = [found(case)[1].retry_chains.select(columns) for case in group]
    for case, table in zip(group[1:], tables[1:], strict=True):
        assert table.equals(tables[0]), case.text


@pytest.mark.parametrize(
    ("text", "truth"),
    [
        ("zerostep.txt", "zerostep/truth_zerostep.csv"),
        ("zerostep/trace.txt", "zerostep/truth_zerostep.csv"),
        ("contended.txt", "contended/truth_zerostep.csv"),
        ("giveup/trace.txt", "giveup/truth_zerostep.csv"),
        ("noise/trace.txt", "noise/truth_zerostep.csv"),
        ("perf/script.txt", "perf/truth_zerostep.csv"),
        ("tracecmd-v7/report.txt", "tracecmd-v7/truth_zerostep.csv"),
        ("tracefs-pipe/trace_pipe.txt", "tracefs-pipe/truth_zerostep.csv"),
        ("lost-tracecmd/report.txt", "lost-tracecmd/truth_zerostep.csv"),
    ],
)
def test_zero_step_episodes_are_those_of_the_log(text: str, truth: str) -> None:
    trace = read_trace(_path(text))
    episodes = rig.read_episodes(_path(truth))
    steps = analyze(trace).zero_steps.filter(pl.col("form") == "busy_sept").sort("tid", "start_ns")
    result = steps.select("tid", "n_refused", "n_emulated").rows()
    assert result == [(e.tid, e.n_refused, e.n_emulated) for e in episodes]
    for row, episode in zip(steps.iter_rows(named=True), episodes, strict=True):
        assert episode.armed_ns - rig.CLOCK_NS <= row["start_ns"]
        assert row["start_ns"] <= episode.first_busy_ns + rig.CLOCK_NS
        assert row["end_ns"] <= episode.cleared_ns + rig.CLOCK_NS
        assert row["n_faults_before"] >= 6
        assert row["ended"] == "entered"


def test_the_sample_has_the_episodes_that_its_readme_names() -> None:
    steps = analyze(read_trace(SAMPLES / "zerostep.txt")).zero_steps
    assert (steps.height, steps["n_refused"].sum()) == (8, 830)
    assert steps["strength"].unique().to_list() == ["proof"]


def test_every_sample_with_a_truth_is_scored_here() -> None:
    texts = {case.text for case in SAMPLE_CASES}
    assert texts == {f.name.replace(".truth.csv", ".txt") for f in SAMPLES.glob("*.truth.csv")}


# Samples with events removed: affected chains are cut, and no other is wrong.

STAMP = re.compile(r"\[(\d+)\] \S+ +(\d+)\.(\d+): ")


@cache
def lines_of(name: str) -> tuple[list[str], list[str]]:
    """Headers and events of a sample."""
    lines = (SAMPLES / name).read_text().splitlines(keepends=True)
    return [x for x in lines if x.startswith("#")], [x for x in lines if not x.startswith("#")]


@cache
def sample_ops(name: str) -> list[rig.Op]:
    return rig.read_ops(SAMPLES / name.replace(".txt", ".truth.csv"))


def score_of(name: str, events: list[str]) -> tuple[rig.Score, Findings]:
    findings = analyze(read_text("".join(events)))
    return rig.compare_lossy(findings.retry_chains, sample_ops(name)), findings


@pytest.mark.parametrize("share", [0.02, 0.25, 0.75])
@pytest.mark.parametrize("name", ["contended.txt", "zerostep.txt"])
def test_a_trace_started_midway_is_cut_and_not_wrong(name: str, share: float) -> None:
    _, events = lines_of(name)
    score, findings = score_of(name, events[int(share * len(events)) :])
    assert score.problems[:5] == []
    assert score.exact > 20
    assert score.cut <= 3 * findings.retry_chains["tid"].n_unique()
    assert "trace_start" in findings.retry_chains["cut_by"].to_list()
    assert "lost_events" not in findings.retry_chains["cut_by"].to_list()


@pytest.mark.parametrize("share", [0.1, 0.55, 0.99])
@pytest.mark.parametrize("name", ["contended.txt", "zerostep.txt"])
def test_a_trace_ended_midway_is_cut_and_not_wrong(name: str, share: float) -> None:
    head, events = lines_of(name)
    score, findings = score_of(name, [*head, *events[: int(share * len(events))]])
    assert score.problems[:5] == []
    assert score.exact > 20
    # A vCPU may be in the middle of a fault and of an entry.
    assert score.cut <= 2 * findings.retry_chains["tid"].n_unique()
    assert set(findings.retry_chains["cut_by"].drop_nulls()) <= {"trace_end"}


def with_gap(events: list[str], cpu: int, first: int, n: int) -> list[str]:
    """The events without ``n`` of one CPU from its ``first`` on, and a marker in their place."""
    mine = [k for k, text in enumerate(events) if f"[{cpu:03}]" in text]
    lost = mine[first : first + n]
    kept = [text for k, text in enumerate(events) if k not in set(lost) and k < mine[first + n]]
    after = events[mine[first + n] :]
    return [*kept, f"CPU:{cpu} [LOST {n} EVENTS]\n", *after]


@pytest.mark.parametrize("seed", range(times(16)))
@pytest.mark.parametrize("name", ["contended.txt", "zerostep.txt"])
def test_lost_events_cut_affected_chains_only(name: str, seed: int) -> None:
    luck = random.Random(seed)
    head, events = lines_of(name)
    cpu, n = luck.randrange(2), luck.choice([1, 2, 7, 50, 300])
    n_events = sum(f"[{cpu:03}]" in text for text in events)
    events = with_gap(events, cpu, luck.randrange(50, n_events - n - 50), n)
    score, findings = score_of(name, [*head, *events])
    assert score.problems[:5] == []
    # Of each thread at most the fault and the entry before the gap, and after it the first call
    # and the first of each leaf of a vCPU.
    cut = findings.retry_chains.filter(pl.col("cut_by") == "lost_events")
    assert cut.is_empty() or cut.group_by("tid").len()["len"].max() in range(6)
    gap = findings.losses.filter(kind="lost_events").row(0, named=True)
    over = findings.retry_chains.filter(
        (pl.col("end_ns") < gap["start_ns"]) & pl.col("outcome").is_in(["succeeded", "failed"])
    )
    assert over.height > 0
    settled = pl.col("final_status").is_not_null() & (pl.col("n_busy") == 0)
    assert cut.filter((pl.col("end_ns") < gap["start_ns"]) & settled).is_empty()


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_an_overwritten_buffer_is_cut_and_not_wrong(share: float) -> None:
    """Each CPU has its own buffer: what each one kept begins at another time."""
    name = "contended.txt"
    _, events = lines_of(name)
    starts = {0: share, 1: share + 0.1}
    kept = [
        text
        for k, text in enumerate(events)
        if (at := STAMP.search(text)) is not None and k >= starts[int(at[1])] * len(events)
    ]
    head = f"# tracer: nop\n#\n# entries-in-buffer/entries-written: {len(kept)}/{len(events)}\n"
    score, findings = score_of(name, [head, *kept])
    assert score.problems[:5] == []
    assert score.exact > 20
    assert "lost_events" in findings.retry_chains["cut_by"].to_list()


@pytest.mark.parametrize("seed", range(times(8)))
def test_missed_returns_are_reported_and_make_no_chain_wrong(seed: int) -> None:
    """A return probe without a free instance does not fire; kprobe_profile counts it."""
    luck = random.Random(seed)
    name = "contended.txt"
    head, events = lines_of(name)
    missed = {k for k, text in enumerate(events) if "_exit:" in text and luck.random() < 0.01}
    kept = [text for k, text in enumerate(events) if k not in missed]
    score, findings = score_of(name, [*head, *kept])
    assert score.problems[:5] == []
    assert score.cut >= len(missed) // 2
    result = findings.losses.filter(kind="unpaired_entry").row(0, named=True)
    assert result["n_events"] > 0


def test_without_arguments_chains_are_joined_by_thread() -> None:
    name = "contended.txt"
    head, events = lines_of(name)
    bare = [re.sub(r" (?:td|gpa|level|vp|args|hkid|page)=\S+", "", text) for text in events]
    findings = analyze(read_text("".join([*head, *bare])))
    chains = findings.retry_chains
    assert chains["n_attempts"].sum() == sum("_exit:" in text for text in events)
    memory = chains.filter(pl.col("leaf").is_in([3, 6, 7, 29]))
    assert memory["identity"].unique().to_list() == ["thread"]
    assert memory["gpa"].drop_nulls().is_empty()
