"""Bits 61 and 60 of a status, which the module sets at run time, do not change findings."""

from __future__ import annotations

import polars as pl
import pytest
from support.story import Story, story

from tdxtrace.pipeline import analyze
from tdxtrace.tables.trace import Findings

FAULTS = "enterX S1 " * 7
STORIES = [
    f"{FAULTS} enterB enterB enterC",
    f"{FAULTS} ( enterB )S",
    "trackS blockK1 2/enterZ 3/blockS1 blockK2 trackS",
    "2/(7 B1 2/)S S1",
    "demoteJ1 demoteJ1 demoteS1",
    "cachewbI! cachewbI! cachewbS!",
]


def found(scenario: Story, bits: int) -> Findings:
    for row in scenario.calls:
        if row["status"] is not None and row["status"] >> 63:
            row["status"] |= bits
    return analyze(scenario.trace)


@pytest.mark.parametrize("bits", [1 << 60, 1 << 61, 3 << 60])
@pytest.mark.parametrize("text", STORIES)
def test_bits_set_at_run_time_change_no_answer(text: str, bits: int) -> None:
    plain, marked = found(story(text), 0), found(story(text), bits)
    tables = "retry_chains zero_steps vcpu_stats vm_stats busy_causes abandoned_requests".split()
    for name in [*tables, "progress_loops", "entry_waits", "step_thresholds"]:
        rows = [getattr(of, name) for of in (plain, marked)]
        words = [c for c, kind in rows[0].schema.items() if c.endswith("status")]
        one, other = (table.drop(words) for table in rows)
        assert one.equals(other), name


@pytest.mark.parametrize("text", STORIES[:3])
def test_the_stories_contain_busy_answers(text: str) -> None:
    of = found(story(text), 0)
    answers = [of.zero_steps, of.busy_causes.filter(pl.col("cause") != "unexplained")]
    assert any(table.height for table in [*answers, of.abandoned_requests])
