"""Traces written by hand from the rules of the module and of KVM: zero-step episodes."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import polars as pl
import pytest

import tdxtrace
from tdxtrace.tables.trace import Findings

HERE = Path(__file__).parent


@cache
def findings(name: str) -> Findings:
    return tdxtrace.analyze(tdxtrace.read_trace(str(HERE / name)))


def test_a_booting_guest_under_kvms_tracepoints_has_no_sure_episode() -> None:
    """No SEAMCALL is probed, and no page was faulted on twice: a TRACK may have been in flight."""
    found = findings("stock-boot-pure.txt")
    assert set(found.zero_steps["strength"]) <= {"weak"}
    assert found.vm_stats["zero_steps"].sum() == 0
    assert found.vcpu_stats["zero_steps"].sum() == 0
    assert not {"BUG", "HOSTILE"} & set(found.verdicts["verdict"].cast(pl.String))


def of_zero_steps(name: str) -> dict[str, Any]:
    (row,) = findings(name).verdicts.filter(pl.col("subject") == "zero_step").to_dicts()
    return row


@pytest.mark.parametrize("name", ["churn-4k.txt", "churn-2M-page-inside.txt"])
def test_a_page_blocked_and_given_back_twelve_times_is_churned(name: str) -> None:
    """At 2 MB the faults are at 0x37000 inside the range: judged like the same at 4 KB."""
    assert findings(name).zero_step_causes["cause"].unique().to_list() == ["block_churn"]
    assert findings(name).zero_step_causes["share"].unique().to_list() == [1.0]
    row = of_zero_steps(name)
    assert (row["verdict"], row["n_rows"]) == ("HOSTILE", 12)
    assert "up to 12 times" in row["sentence"]


def test_episodes_are_counted_for_the_only_td() -> None:
    counted = findings("churn-4k.txt").vm_stats.filter(pl.col("td_id").is_not_null())
    assert counted["zero_steps"].to_list() == [12]


def test_entries_that_ended_in_the_fault_at_once_ran_no_guest_code() -> None:
    """Of 252 entries 12 ended in HLT; the others in the fault or refused."""
    assert (
        "only 5 % of these vCPUs' entries ran guest code"
        in of_zero_steps("churn-4k.txt")["sentence"]
    )


def test_a_host_that_tried_to_merge_pages_and_gave_up_is_not_hostile() -> None:
    row = of_zero_steps("promote-given-up-hi.txt")
    assert (row["verdict"], row["what"], row["n_rows"]) == ("UNDECIDED", "block_undone", 15)
    given = findings("promote-given-up-hi.txt").verdicts
    assert not {"BUG", "HOSTILE"} & set(given["verdict"].cast(pl.String))
