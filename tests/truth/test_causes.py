"""Causes, broken rules and verdicts of traces written by hand from the module's rules."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import polars as pl
import pytest

import tdxtrace
from tdxtrace.tables.trace import Findings

HERE = Path(__file__).parent
AUG, BLOCK = 6, 7


def found(name: str, generation: str | None = None) -> Findings:
    return tdxtrace.analyze(tdxtrace.read_trace(HERE / f"{name}.txt"), generation=generation)


def causes(findings: Findings) -> Counter[str]:
    return Counter(findings.busy_causes.filter(pl.col("rank") == 1)["cause"])


def rules(findings: Findings) -> Counter[str]:
    return Counter(findings.broken_rules["rule"])


def verdicts(findings: Findings) -> set[tuple[str, str]]:
    return set(findings.verdicts.select("verdict", "rule").iter_rows())


@pytest.mark.parametrize("generation", [None, "B"])
def test_a_loop_beside_its_holder_is_no_kick(generation: str | None) -> None:
    findings = found("loop-with-holder", generation)
    (chain,) = findings.retry_chains.filter(leaf=BLOCK).to_dicts()
    assert (chain["n_attempts"], chain["n_busy"], chain["outcome"]) == (15, 14, "succeeded")
    assert causes(findings) == {"host_conflict": 14}
    (aug,) = findings.busy_causes.filter(rank=1)["holder_seq"].unique()
    assert findings.broken_rules["evidence_seq"].unique().to_list() == [aug]
    # The last busy answer ends in the microsecond in which the AUG does.
    assert rules(findings) == {"mmu_lock_excludes": 13}
    assert verdicts(findings) == {
        ("BUG", "mmu_lock_excludes"),
        ("UNDECIDED", "mmu_lock_excludes"),
    }


def test_a_timeout_is_not_of_a_request_after_which_another_call_took_the_entry() -> None:
    """TDH.MEM.SEPT.RD cleared the bit, by a function that no kernel in wrappers.csv has."""
    findings = found("hp-timeout-cleared-by-read", "C")
    (left,) = findings.abandoned_requests.to_dicts()
    assert left["consequence"] == "none_seen"
    assert rules(findings) == {}
    assert "BUG" not in {verdict for verdict, _ in verdicts(findings)}


def test_a_timeout_of_host_priority_is_not_of_a_request_just_left() -> None:
    findings = found("hp-timeout-too-early")
    assert findings.abandoned_requests["consequence"].to_list() == ["none_seen"]
    assert "BUG" not in findings.verdicts["verdict"]


def test_an_aug_that_succeeded_shows_that_the_td_was_built() -> None:
    findings = found("aug-after-unseen-finalize")
    assert rules(findings) == {}
    assert causes(findings) == {"unexplained": 1}
    assert "BUG" not in findings.verdicts["verdict"]


@pytest.mark.parametrize("generation", [None, "B"])
def test_an_aug_inside_a_block_breaks_mmu_lock(generation: str | None) -> None:
    findings = found("aug-vs-block-same-td", generation)
    (row,) = findings.broken_rules.to_dicts()
    calls = findings.busy_causes.filter(rank=1).to_dicts()
    assert (row["rule"], row["leaf"]) == ("mmu_lock_excludes", AUG)
    assert [(c["cause"], c["holder_leaf"]) for c in calls] == [("host_conflict", BLOCK)]
    assert row["evidence_seq"] == calls[0]["holder_seq"]
    assert verdicts(findings) == {("BUG", "mmu_lock_excludes")}


@pytest.mark.parametrize("generation", [None, "C"])
def test_host_priority_keeps_a_guest_out_of_the_next_999_tries(generation: str | None) -> None:
    findings = found("C-guest-1000-in-300ms", generation)
    assert causes(findings) == {"unexplained": 1000}
    assert set(findings.verdicts["verdict"]) == {"UNDECIDED"}
