"""Verdicts and their evidence."""

from __future__ import annotations

from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.logs import WORDS, with_log
from support.story import story

from tdxtrace import analyze
from tdxtrace.analysis.verdicts.busy import on_broken_rules, on_busy
from tdxtrace.analysis.verdicts.rules import rule_sources
from tdxtrace.tables.causes import BROKEN_RULES, BUSY_CAUSES
from tdxtrace.tables.trace import Trace
from tdxtrace.tables.verdicts import VERDICTS

FAULT = "enterX ?1 "
CHURN = "2/blockS1 " + 7 * FAULT + "{} 2/unblockS1 enterC "
KEPT_OUT = 7 * FAULT + "enterB "


def given_on(trace: Trace, **options: Any) -> pl.DataFrame:  # noqa: ANN401
    return VERDICTS.check(analyze(trace, **options).verdicts)


def verdicts_of(text: str, subject: str, **options: Any) -> list[tuple[str, str]]:  # noqa: ANN401
    """Verdict and explanation of each group about a subject."""
    found = given_on(story(text).trace, **options).filter(pl.col("subject") == subject)
    return [(str(a), b) for a, b in found.select("verdict", "what").rows()]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (7 * (FAULT + "out14 ") + "enterB enterC", ("EXPECTED", "memory_fault_ignored")),
        ("2/(1 " + 7 * FAULT + "2/)S enterB enterC", ("EXPECTED", "frozen_spte")),
        ("2/blockS1 " + 7 * FAULT + "enterB 2/removeS1", ("EXPECTED", "invalidation")),
        (7 * (FAULT + "K1 ") + "enterB enterC", ("EXPECTED", "left_loop")),
        (7 * FAULT + "enterB enterC", ("UNDECIDED", "unknown")),
        # Blocked for nothing once or twice, for however long.
        (CHURN.format("enterB"), ("UNDECIDED", "block_churn")),
        (CHURN.format(60 * "enterB "), ("UNDECIDED", "block_churn")),
        (2 * CHURN.format(7 * "enterB "), ("UNDECIDED", "block_churn")),
        # Kept out as often, but for a reason that accuses nobody.
        (7 * (FAULT + "out14 ") + 60 * "enterB ", ("EXPECTED", "memory_fault_ignored")),
        ("2/blockS1 " + 7 * FAULT + 60 * "enterB ", ("UNDECIDED", "unknown")),
    ],
)
def test_zero_steps(text: str, expected: tuple[str, str]) -> None:
    assert verdicts_of(text, "zero_step") == [expected]


def rounds(text: str, n: int = 5) -> tuple[str, str]:
    """The verdict on ``n`` times this, of which zero-step episodes come."""
    (found,) = verdicts_of(n * (text + " "), "zero_step")
    return found


CHURNED = ("HOSTILE", "block_churn")


@pytest.mark.parametrize(
    "text",
    [
        "2/blockS1 2/trackS " + KEPT_OUT + "2/unblockS1 enterC",
        # Three times is enough, and more refusals or another exit make no difference.
        "2/blockS1 2/trackS " + KEPT_OUT + "enterB enterB 2/unblockS1 enterH",
        # Busy answers that the host tried again are no reason to unblock.
        "2/blockB1 2/blockS1 2/trackD 2/trackS " + KEPT_OUT + "2/unblockB1 2/unblockS1 enterC",
        # The guest's steps between the rounds show no exit but faults.
        "2/blockS1 2/trackS " + KEPT_OUT + "2/unblockS1 enterQ",
        # A 2 MB range: the faults are inside it.
        "S512^1 2/blockS512^1 2/trackS "
        + KEPT_OUT.replace("?1", "?700")
        + "2/unblockS512^1 enterC",
        "S0^2 2/blockS0^2 2/trackS " + KEPT_OUT.replace("?1", "?7000") + "2/unblockS0^2 enterC",
        # The vCPU's own thread blocks after an exit that asks for nothing, and unblocks when the
        # vCPU has been kept out.
        "enterQ blockS1 trackS " + KEPT_OUT + "enterX ?1 unblockS1 enterQ",
        # An install that cannot succeed while the page is blocked.
        "2/blockS1 2/trackS " + 7 * (FAULT + "K1 ") + "enterB 2/unblockS1 enterC",
        # A hypercall that was served before.
        "3/enterC 3/exit3 3/enterC 2/blockS1 2/trackS " + KEPT_OUT + "2/unblockS1 enterC",
        # It looked at other pages.
        "2/blockS1 2/trackS 2/septrdS600 " + KEPT_OUT + "2/unblockS1 enterC",
        # Calls that failed elsewhere: another TD's, another range's by another thread.
        "S9 2/blockS1 2/trackS 3/removeE1#7 3/promoteJ9000^1 " + KEPT_OUT + "2/unblockS1 enterC",
    ],
)
def test_blocking_a_range_without_purpose_is_hostile(text: str) -> None:
    assert rounds(text, 3) == CHURNED
    assert rounds(text) == CHURNED


def test_a_host_that_splits_and_merges_in_turn_is_hostile() -> None:
    turn = "2/blockS512^1 2/trackS " + KEPT_OUT.replace("?1", "?700") + "2/{}S512^1 enterC "
    both = turn.format("demote") + turn.format("promote")
    # The first of either is no repetition, but none that can be called innocent.
    assert verdicts_of(3 * both, "zero_step") == [CHURNED, ("UNDECIDED", "block_undone")]
    assert verdicts_of(2 * both, "zero_step")[0] == ("UNDECIDED", "block_churn")
    # The same move of a page again and again.
    moved = verdicts_of(
        5 * ("2/blockS1 2/trackS " + KEPT_OUT + "2/relocateS1 enterC "), "zero_step"
    )
    assert moved == [CHURNED, ("EXPECTED", "invalidation")]
    # Once each: a guest whose pages were split for a migration, and merged after it.
    assert rounds(both, 1) == ("EXPECTED", "invalidation")
    # The same split of ever new pages is what a host does that splits all.
    text = "".join(
        f"2/blockS{512 * n}^1 2/trackS {KEPT_OUT.replace('?1', f'?{512 * n + 5}')}"
        f"2/demoteS{512 * n}^1 enterC "
        for n in range(1, 7)
    )
    assert rounds(text, 1) == ("EXPECTED", "invalidation")


UNDONE = ("UNDECIDED", "block_undone")


@pytest.mark.parametrize(
    "text",
    [
        # The host tried to merge, split, remove or move it, and failed.
        "2/blockS512^1 2/trackS {} 2/promoteJ512^1 2/promoteJ512^1 2/promoteJ512^1 2/unblockS512^1",
        "2/blockS512^1 2/trackS {} 2/demoteB512^1 2/unblockS512^1",
        "2/blockS1 2/trackS {} 2/removeE1 2/unblockS1",
        "2/blockS1 2/trackS {} 2/removeB1 2/unblockS1",
        # Another thread did, or on a part of the range, or on a larger one, or returned never.
        "2/blockS512^1 2/trackS {} 3/promoteJ512^1 2/unblockS512^1",
        "2/blockS512^1 2/trackS {} 3/removeE600 2/unblockS512^1",
        "2/blockS1 2/trackS {} 3/promoteJ0^2 2/unblockS1",
        "2/blockS1 2/trackS {} 3/removeU1 2/unblockS1",
        # It looked at what it wanted to merge.
        "2/blockS512^1 2/trackS {} 2/septrdS600 2/septrdS601 2/unblockS512^1",
        # Without arguments: it may have been this range.
        "2/blockS1 2/trackS {} 3/removeE~ 2/unblockS1",
        # It could not track, or not block the rest of what it wanted to, and took all back.
        "2/blockS1 2/trackP {} 2/unblockS1",
        "2/blockS1 2/blockK2 2/blockK2 2/trackS {} 2/unblockS1",
        "2/blockS1 2/blockS2 2/trackS {} 2/removeE2 2/unblockS1 2/unblockS2",
        # The guest asked for it: it left with a TDCALL, and the vCPU's thread blocked.
        "3/enterC 3/blockS1 3/trackS {} 2/unblockS1",
        # ... or userspace served its hypercall meanwhile, whoever blocks.
        "3/enterC 3/exit3 2/blockS1 2/trackS {} 2/unblockS1 3/enterC",
        # A vCPU's thread unblocked it for a fault, the first that the vCPU had there.
        "2/blockS1 2/trackS {} 3/enterX 3/?1 3/unblockS1 3/enterC",
    ],
)
def test_blocking_a_range_with_a_possible_purpose_is_not_hostile(text: str) -> None:
    page = "?700" if "S512^1" in text else "?1"
    assert rounds(text.format(KEPT_OUT.replace("?1", page)) + " enterC") == UNDONE


@pytest.mark.parametrize("end", ["unblockS1", "removeS1"])
@pytest.mark.parametrize("text", ["{} lost 2/", "lost@0 {} 2/"])
def test_no_verdict_on_a_block_where_events_may_be_lost(text: str, end: str) -> None:
    text = "2/blockS1 2/trackS " + text.format(KEPT_OUT) + end + " enterC"
    assert rounds(text) == ("UNDECIDED", "unknown")


def test_one_range_after_the_other_is_not_repeated() -> None:
    text = " ".join(
        f"2/blockS{page} 2/trackS {KEPT_OUT.replace('?1', f'?{page}')} 2/unblockS{page} enterC"
        for page in range(1, 7)
    )
    assert rounds(text, 1) == ("UNDECIDED", "block_churn")


def test_rounds_that_refused_no_entry_do_not_count() -> None:
    quiet = 9 * "2/blockS1 2/trackS 2/unblockS1 enterC "
    faulted = 9 * ("2/blockS1 2/trackS " + FAULT + "2/unblockS1 enterC ")
    assert verdicts_of(quiet + faulted + CHURN.format("enterB"), "zero_step") == [
        ("UNDECIDED", "block_churn")
    ]


def test_the_share_of_entries_that_ran_guest_code_is_given() -> None:
    text = 4 * ("2/blockS1 2/trackS " + 7 * FAULT + "enterB enterD 2/unblockS1 enterC ")
    found = given_on(story("enterC " + text).trace).filter(subject="zero_step")
    # 9 of 41: four TDCALLs and one before; the first fault of each round may come after some code.
    assert " 22 % of these vCPUs' entries ran guest code" in found["sentence"].item()
    text = text.replace("enterD ", "").replace("enter", ">").replace(">B", ">F")
    found = given_on(story(">C " + text).trace).filter(subject="zero_step")
    # By KVM's events alone, and where a TRACK was near by a clock that is not named, some are weak.
    assert found.height == 2
    assert found["sentence"].str.contains(" 24 % of these vCPUs' entries ran guest code").all()


@pytest.mark.parametrize("generation", ["A", "B", "C"])
@pytest.mark.parametrize("leaf", ["block", "remove", "demote"])
def test_a_guest_is_never_called_hostile(leaf: str, generation: str) -> None:
    """A vCPU is inside all the while, and nobody else is seen: still a TDCALL is not."""
    text = f"S9 2/blockS8 2/removeS8 3/enter( {200 * f'2/{leaf}K1 '} 3/)C 2/S7"
    found = given_on(story(text).trace, generation=generation)
    assert "HOSTILE" not in found["verdict"].cast(pl.String)


def test_weak_evidence_gives_no_accusation() -> None:
    # KVM's own events only: an exit that came too fast, which may be anything.
    text = 5 * ("2/blockS1 " + 7 * ">W ?1 " + 60 * ">Wf ?1 " + "2/unblockS1 >C ")
    found = verdicts_of(text, "zero_step")
    assert found
    assert {verdict for verdict, _ in found} == {"UNDECIDED"}


def test_weak_signs_beside_an_attack_are_no_part_of_it() -> None:
    seen = KEPT_OUT.replace("enter", "4/>").replace("?1", "4/?1").replace(">B", ">F")
    text = "2/blockS1 " + KEPT_OUT + seen + "2/unblockS1 enterC 4/>C "
    assert verdicts_of("4/>C " + 4 * text, "zero_step") == [
        CHURNED,
        ("UNDECIDED", "block_churn, weak signs"),
    ]


PENDING = "2/blockS9 S1 " + 7 * FAULT + "enterB enterC"


OLD, NEW = "though it could take a #VE", "only where the TD takes no #VE"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, OLD),
        ({"module": "1.5.16"}, OLD),
        ({"generation": "B"}, OLD),
        ({"generation": "C"}, NEW),
        ({"module": "1.5.24"}, NEW),
    ],
)
def test_a_pending_page_gives_no_accusation(options: dict[str, str], words: str) -> None:
    (row,) = given_on(story(PENDING).trace, **options).filter(subject="zero_step").to_dicts()
    assert (row["verdict"], row["what"]) == ("UNDECIDED", "pending_page")
    assert words in row["sentence"]
    assert "SEPT_VE_DISABLE" in row["decided_by"]


@pytest.mark.parametrize(("version", "words"), [("1.5.08", OLD), ("1.5.24", NEW)])
def test_the_release_may_come_from_the_log(version: str, words: str) -> None:
    said = {"message": "module_version", "module_version": version}
    found = given_on(with_log(story(PENDING), said)).filter(subject="zero_step")
    assert words in found["sentence"].item()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("blockK1 trackS 2/demoteT1", ("BUG", "later_call_failed")),
        ("removeK1 trackS _20ms enterZ", ("BUG", "host_priority_timeout")),
        ("removeK1 trackS 2/removeS1", ("EXPECTED", "settled_later")),
        ("blockK1 trackS _ S2", ("UNDECIDED", "none_seen")),
    ],
)
def test_abandoned_requests(text: str, expected: tuple[str, str]) -> None:
    assert verdicts_of(text, "abandoned") == [expected]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cachewbI cachewbS", ("EXPECTED", "resumable, progress seen")),
        ("demoteJ1 trackS _ S1", ("UNDECIDED", "restartable, progress not_seen")),
        ("S1 cachewbI", ("UNDECIDED", "resumable, progress unknown")),
        ("S9 >X ?1 _5ms >C", ("UNDECIDED", "local_retry, progress seen")),
    ],
)
def test_loops(text: str, expected: tuple[str, str]) -> None:
    assert verdicts_of(text, "loop") == [expected]


@pytest.mark.parametrize(
    ("said", "verdict", "words"),
    [
        # Yan Zhao's selftest: two vCPUs initialised at once.
        ({"leaf": 22, "status": 0x8000_0200_0000_0080}, "BUG", "TDH.VP.INIT"),
        ({"leaf": 22, "status": 0x8000_0200_0000_0001}, "BUG", "keep its calls apart"),
        ({"leaf": 6, "status": 0x8000_0200_0000_0002}, "BUG", "keep its calls apart"),
        # RCX of TRACK is the TDR.
        ({"leaf": 38, "status": 0x8000_0200_0000_0001}, "BUG", "keep its calls apart"),
        ({"leaf": 38, "status": 0x8000_0200_0000_00A9}, "UNDECIDED", "message alone"),
        ({"leaf": 15, "status": 0xC000_0B08_0000_0001}, "BUG", "block and track"),
        # A SEPT entry may be the guest's, a tree may be anybody's.
        ({"leaf": 6, "status": 0x8000_0200_0000_0001}, "UNDECIDED", "message alone"),
        ({"leaf": 7, "status": 0x8000_0200_0000_0092}, "UNDECIDED", "message alone"),
        ({"leaf": 28, "status": 0xC000_0300_0000_0001}, "UNDECIDED", "message alone"),
        ({"leaf": 22, "status": 0xC000_0300_0000_0080}, "UNDECIDED", "message alone"),
        ({"leaf": 0, "status": 0x9000_0205_0000_0000, "message": "vp_enter_ret"}, "UNDECIDED", ""),
        ({"message": "crashing"}, "UNDECIDED", "crashing"),
    ],
)
def test_messages(said: dict[str, Any], verdict: str, words: str) -> None:
    found = given_on(with_log(story("S1"), said, said))
    row = found.filter(pl.col("subject") == "message").row(0, named=True)
    assert (row["verdict"], row["n_rows"], row["evidence"]) == (verdict, 2, "1 2")
    assert words in row["sentence"]


BASE: dict[str, Any] = {
    "source": 0,
    "seq": 1,
    "rank": 1,
    "end_ns": 0,
    "leaf": 6,
    "td_id": 1,
    "n_tied": 1,
}
BASE |= {"status": 0x8000_0200_0000_0001, "resource": "SEPT entry", "generations": "BC"}


def causes(*rows: dict[str, Any]) -> pl.DataFrame:
    return pl.DataFrame([BASE | row for row in rows], schema=BUSY_CAUSES.schema)


@pytest.mark.parametrize(
    ("row", "verdict"),
    [
        ({"cause": "guest", "confidence": "strong"}, "EXPECTED"),
        ({"cause": "guest", "confidence": "weak"}, "UNDECIDED"),
        ({"cause": "armed_entry", "confidence": "weak"}, "EXPECTED"),
        ({"cause": "host_conflict", "confidence": "proof", "holder_seq": 2}, "EXPECTED"),
        ({"cause": "unexplained", "confidence": "none", "advice": "look"}, "UNDECIDED"),
        ({"cause": "kernel_bug", "confidence": "proof", "rule": "tdr_busy"}, "BUG"),
        # A rule that may have been broken accuses nobody.
        ({"cause": "kernel_bug", "confidence": "weak", "rule": "tdr_busy"}, "UNDECIDED"),
    ],
)
def test_busy_answers(row: dict[str, Any], verdict: str) -> None:
    other = {"cause": "kernel_bug", "confidence": "proof", "rule": "tdr_busy", "rank": 2}
    found = VERDICTS.check(on_busy(causes(row, other), BROKEN_RULES.empty()))
    assert found["verdict"].to_list() == [verdict]
    assert found["n_rows"].to_list() == [1]


def test_a_broken_rule_is_reported_once() -> None:
    busy = causes({"cause": "kernel_bug", "confidence": "proof", "rule": "tdr_busy"})
    base: dict[str, Any] = {"source": 0, "end_ns": 0, "leaf": 6, "status": 1}
    rows = [
        base | {"seq": 1, "rule": "tdr_busy", "confidence": "proof"},
        base | {"seq": 2, "rule": "dropped_block", "confidence": "strong"},
        base | {"seq": 3, "rule": "dropped_block", "confidence": "weak"},
    ]
    broken = pl.DataFrame(rows, schema=BROKEN_RULES.schema)
    found = VERDICTS.check(on_broken_rules(broken, busy))
    assert found.select("verdict", "what", "evidence").rows() == [
        ("BUG", "dropped_block", "2"),
        ("UNDECIDED", "dropped_block, not sure", "3"),
    ]


@pytest.mark.parametrize("text", ["2/block(1 B2 2/)S", "( 2/block(1 )B 2/)S"])
def test_calls_that_mmu_lock_keeps_apart_are_accused_once(text: str) -> None:
    found = given_on(story(f"9/enterH 9/S5 8/blockS7 {text}").trace)
    assert found.select("verdict", "rule", "n_rows").rows() == [("BUG", "mmu_lock_excludes", 1)]


def test_a_conflict_that_mmu_lock_excludes_is_not_expected() -> None:
    row = {"cause": "host_conflict", "confidence": "weak", "holder_seq": 2, "holder_leaf": 7}
    rows = causes(row | {"td_id": 5, "holder_td_id": 5}, row | {"td_id": 5, "holder_td_id": 6})
    rows = rows.with_columns(seq=pl.Series([1, 3], dtype=pl.UInt64))
    found = VERDICTS.check(on_busy(rows, BROKEN_RULES.empty()))
    assert found.select("verdict", "rule").rows() == [
        ("UNDECIDED", "mmu_lock_excludes"),
        ("EXPECTED", "locks_never_wait"),
    ]


def test_the_worst_comes_first_and_every_rule_has_a_source() -> None:
    text = 3 * CHURN.format("enterB ") + "blockK1 trackS 2/demoteT1 cachewbI cachewbS"
    found = given_on(story(text).trace)
    order = {"BUG": 0, "HOSTILE": 1, "UNDECIDED": 2, "EXPECTED": 3}
    ranks = [order[v] for v in found["verdict"].cast(pl.String)]
    assert ranks == sorted(ranks)
    assert set(ranks) == {0, 1, 2, 3}
    assert all(rule_sources()[row["rule"]] == row["rule_source"] for row in found.to_dicts())


def test_at_most_five_rows_are_named() -> None:
    text = " ".join(f"blockK{page} trackS" for page in range(1, 9)) + " _ S9"
    row = given_on(story(text).trace).filter(pl.col("subject") == "abandoned").row(0, named=True)
    assert (row["n_rows"], len(row["evidence"].split())) == (8, 5)


@settings(max_examples=20)
@given(WORDS)
def test_verdicts_conform_and_name_existing_rows(words: list[str]) -> None:
    trace = story(" ".join(words)).trace
    found = analyze(trace)
    for row in VERDICTS.check(found.verdicts).iter_rows(named=True):
        table = getattr(found, row["evidence_table"])
        seq = "seq" if "seq" in table.columns else "first_seq"
        named = {int(number) for number in row["evidence"].split()}
        assert named
        assert named <= set(table[seq])


QUIET = st.lists(
    st.sampled_from("S1 S2 blockS1 trackS removeS1 enterC enterQ".split()), max_size=20
)


@settings(max_examples=20)
@given(QUIET)
def test_a_trace_in_which_nothing_was_busy_has_no_verdicts(words: list[str]) -> None:
    assert given_on(story(" ".join(words)).trace).is_empty()


def test_a_selection_narrows_the_verdicts() -> None:
    from tdxtrace.analysis.selection import Selection

    trace = story("blockK1 trackS 2/demoteT1 removeK2 trackS _ S1").trace
    found = analyze(trace, Selection(leaves=("TDH.MEM.RANGE.BLOCK",))).verdicts
    assert set(found.filter(pl.col("subject") == "abandoned")["leaf"]) == {7}


RECLAIM = {"leaf": 28, "status": 0xC000_0300_0000_0001}
WARNED = {"message": "warning", "function": "__tdx_reclaim_page"}


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ([WARNED | RECLAIM], ["warning: PAGE_METADATA_INCORRECT 0x1"]),
        # KVM prints the failure and warns: one failure, told once.
        ([RECLAIM, WARNED | RECLAIM], ["seamcall_failed: PAGE_METADATA_INCORRECT 0x1"]),
        # Another one, of which only the warning was not suppressed.
        (
            [RECLAIM | {"leaf": 29}, WARNED | RECLAIM],
            [
                "seamcall_failed: PAGE_METADATA_INCORRECT 0x1",
                "warning: PAGE_METADATA_INCORRECT 0x1",
            ],
        ),
        # A status of which a message would accuse the kernel, in a register alone.
        ([WARNED | {"leaf": 22, "status": 0x8000_0200_0000_0080}], ["warning: OPERAND_BUSY 0x80"]),
        # A warning that shows no status accuses nobody, nor does what only speaks of TDX.
        ([WARNED], []),
        ([{"message": "other"}], []),
    ],
)
def test_a_warning_that_shows_its_status_is_a_failure(
    said: list[dict[str, Any]], expected: list[str]
) -> None:
    found = given_on(with_log(story("S1"), *said)).filter(subject="message")
    assert sorted(found["what"]) == expected
    assert set(found["verdict"]) <= {"UNDECIDED"}
