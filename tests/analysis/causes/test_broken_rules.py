"""Kernel rules, broken and kept, in small scenarios."""

from __future__ import annotations

import pytest
from support.story import story

from tdxtrace.analysis.causes.busy_causes import broken_rules, busy_causes
from tdxtrace.analysis.causes.conflicts import ALL_GENERATIONS, mask_of
from tdxtrace.analysis.causes.evidence import gather_evidence
from tdxtrace.tables.causes import BROKEN_RULES, BUG_RULES
from tdxtrace.tdx.locks import bug_rule_table

BEFORE = "9/enterH 9/S5 8/blockS7 8/removeS7"


def broken(text: str, before: str = BEFORE) -> list[tuple[str, int, int | None]]:
    told = story(f"{before} {text}")
    table = BROKEN_RULES.check(broken_rules(gather_evidence(told.trace, mask=mask_of("B"))))
    return list(table.select("rule", "leaf", "evidence_seq").iter_rows())


def rules(text: str, before: str = BEFORE) -> list[str]:
    return [rule for rule, _, _ in broken(text, before)]


def test_every_rule_has_its_text_and_its_source() -> None:
    table = bug_rule_table()
    assert table["rule"].to_list() == list(BUG_RULES)
    assert (table["statement"].str.len_chars() >= 40).all()
    assert table["source"].null_count() == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("flushK", ["tdvpr_busy"]),
        ("trackK", ["tdr_busy"]),
        # A vCPU that ran since before the TRACK before: it was not kicked.
        ("2/enter( trackS trackP 2/)Q", ["track_without_kick"]),
        ("2/enter( trackS 2/)Q 2/enter( trackP 2/)H", []),
        ("2/enter( trackP 2/)H", []),  # there was no TRACK before that is known
        ("2/(1 K1 2/)S", ["aug_busy_on_entry"]),
        ("2/enter( K1 2/)H", []),  # a guest may have the entry of a page that is added
        ("2/(1 K2 2/)S", []),
        ("blockB1 demoteT1", ["dropped_block"]),
        ("blockB1 blockS1 demoteT1", []),
        ("blockB1 demoteT2", []),
        ("demoteT1", []),
    ],
)
def test_a_rule_is_broken_or_kept(text: str, expected: list[str]) -> None:
    assert rules(text) == expected


def test_the_evidence_is_the_other_row() -> None:
    told = story(f"{BEFORE} blockB1 demoteT1")
    block = told.seamcalls.filter(leaf=7)["seq"][-1]
    assert broken("blockB1 demoteT1") == [("dropped_block", 15, block)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # All vCPUs inside exited by an interrupt, none entered again, and it is still busy.
        ("2/enter( 3/enter( blockB1 2/)Q 3/)Q _ blockB1", ["busy_after_kick"]),
        ("2/enter( blockB1 2/)H _ blockB1", []),  # it came out by itself
        ("2/enter( blockB1 _ blockB1 2/)Q", []),  # it was still inside
        ("2/enter( blockB1 2/)Q 2/enterH blockB1", []),  # and went in again
        ("2/enter( blockB1 2/)Q _ blockB2", []),  # another page
        ("2/enter( blockB1 2/)Q _ blockS1", []),
        ("2/enter( B1 2/)Q _ B1", []),  # faults are not kicked for
    ],
)
def test_a_second_failure_counts_after_a_kick_only(text: str, expected: list[str]) -> None:
    assert rules(text, "9/S5 8/blockS7") == expected


BUILDING = ["busy_before_finalize"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("createS septB1 finalizeS", BUILDING),
        ("createS B1 finalizeS", BUILDING),  # whatever it is, it came before
        # FINALIZE is recorded of another TD, so this one was not finalized yet.
        ("createS#1 finalizeS#1 createS septB1", BUILDING),
        ("createS septB1", []),  # but not in this trace: it may not have been probed
        ("createS#1 finalizeS#1 createS lost septB1", []),  # or it was lost
        ("createS#1 finalizeS#1 createS B1", []),  # KVM adds pages to a finalized TD only
        # It runs, so its FINALIZE is missing.
        ("createS#1 finalizeS#1 createS 9/septS2 septB1 9/enterH", []),
        ("createS S2 septB1", []),
        ("createS trackS septB1", []),
        ("createS 9/enterH septB1", []),
        ("createB septB1", []),
        # The trace begins while the TD is built: no creation of it lies between.
        ("createS#1 septB1 finalizeS", BUILDING),
        ("septB1 finalizeS", []),  # of an earlier TD at this address, perhaps
        ("createS#1 septB1 createS finalizeS", []),
        ("createS#1 9/septS2 9/enterH septB1 finalizeS", []),
    ],
)
def test_a_td_is_being_built_until_it_is_finalized_or_runs(text: str, expected: list[str]) -> None:
    assert rules(text, "") == expected


def test_a_broken_rule_outranks_the_holder() -> None:
    told = story(f"{BEFORE} 2/(1 K1 2/)S")
    (row,) = (
        busy_causes(gather_evidence(told.trace, mask=ALL_GENERATIONS)).filter(rank=1).to_dicts()
    )
    assert (row["cause"], row["rule"]) == ("kernel_bug", "aug_busy_on_entry")
    assert (row["holder_tid"], row["lock"]) == (2, "SEPT_ENTRY")


def test_no_rule_is_broken_beside_a_loss() -> None:
    assert rules("2/enter( trackS trackP 2/)Q") == ["track_without_kick"]
    assert rules("2/enter( trackS lost trackP 2/)Q") == []
