"""Kernel rules, broken and kept, in small scenarios."""

from __future__ import annotations

import dataclasses

import polars as pl
import pytest
from support.story import STEP_NS, story, without

from tdxtrace.analysis.causes.busy_causes import broken_rules, busy_causes
from tdxtrace.analysis.causes.conflicts import ALL_GENERATIONS, mask_of
from tdxtrace.analysis.causes.evidence import gather_evidence
from tdxtrace.tables.causes import BROKEN_RULES, BUG_RULES
from tdxtrace.tables.trace import Trace
from tdxtrace.tdx.leaves import parse_leaf
from tdxtrace.tdx.locks import bug_rule_table

BEFORE = "9/enterH 9/S5 8/blockS7 8/removeS7"


def broken(text: str, before: str = BEFORE) -> list[tuple[str, int, int | None]]:
    scenario = story(f"{before} {text}")
    table = BROKEN_RULES.check(broken_rules(gather_evidence(scenario.trace, mask=mask_of("B"))))
    return list(table.select("rule", "leaf", "evidence_seq").iter_rows())


def rules(text: str, before: str = BEFORE) -> list[str]:
    return [rule for rule, _, _ in broken(text, before)]


def test_of_several_vcpus_the_last_to_leave_shows_that_none_was_kicked() -> None:
    """Thread 2 leaves while the TRACK is at work: it may have been out when that looked."""
    ((rule, _, evidence),) = broken("2/enter( 3/enter( trackS track( 2/)Q )P 3/)H")
    scenario = story(f"{BEFORE} 2/enter( 3/enter( trackS track( 2/)Q )P 3/)H")
    assert rule == "track_without_kick"
    assert scenario.seamcalls.filter(pl.col("seq") == evidence)["tid"].to_list() == [3]


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
        ("track( 2/enter( )S trackP 2/)H", []),  # it may be of the newer epoch already
        ("trackS 2/enter( trackP 2/)H", []),
        ("2/enter( trackS trackB trackP 2/)H", ["track_without_kick"]),
        ("2/enter( trackS lost trackP 2/)H", []),  # it may have left, and another TRACK passed
        ("lost S9 2/enter( trackS trackP 2/)H", ["track_without_kick"]),
        ("2/enter( lost _ trackS trackP 2/)H", []),  # its return may be a later one's
        ("2/(1 K1 2/)S", ["aug_busy_on_entry"]),
        ("2/enter( K1 2/)H", []),  # a guest may have the entry of a page that is added
        ("2/(1 K2 2/)S", []),
        ("2/(1 K1#1 2/)S", []),
        ("2/sept(1^1 K1 2/)S", []),  # the table above is another entry
        ("2/(1 K1 lost 2/)S", []),
        ("2/(1 K1", []),  # who knows for how long
        ("blockB1 demoteT1", ["dropped_block"]),
        ("blockB1 blockS1 demoteT1", []),
        ("blockB1 demoteT2", []),
        ("blockB1 demoteT1#1", []),
        ("demoteT1", []),
        ("blockB1 2/blockU1 demoteT1", []),  # it may have succeeded
        ("blockB1 lost demoteT1", []),
        ("blockB1 blockS1^1 demoteT1", []),  # the range around it was blocked
        ("blockB1^1 demoteT3^1", ["dropped_block"]),
        ("blockB1^1 demoteT1", ["dropped_block"]),
        # It is blocked since before: what is missing is a TRACK.
        ("blockS1 blockB1 demoteT1", []),
        ("blockS1 trackS removeS1 S1 blockB1 removeT1", ["dropped_block"]),
        ("blockB1 blockE1 demoteT1", ["dropped_block"]),
    ],
)
def test_a_rule_is_broken_or_kept(text: str, expected: list[str]) -> None:
    assert rules(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2/enter( trackS trackP 2/)H", ["strong"]),  # the answer says that one is inside
        ("3/enter( 2/enter( trackS trackP 2/)H 3/)H", ["proof"]),  # thread 3, for long
        ("2/enter( track( 3/enter( )S trackP 2/)H 3/)H", []),  # either of the two
        ("track( 2/enter( )S trackP 2/)H", []),  # nobody who was recorded
        ("2/enter( trackS trackP", []),  # its end was not recorded
    ],
)
def test_an_entry_that_has_just_begun_may_be_of_the_newer_epoch(
    text: str, expected: list[str]
) -> None:
    trace = with_clock(f"{BEFORE} {text}")
    found = broken_rules(gather_evidence(trace, mask=mask_of("B"), entry_ns=STEP_NS + 1))
    assert found.filter(rule="track_without_kick")["confidence"].to_list() == expected


def test_a_probed_common_function_proves_that_unrecorded_calls_were_not_made() -> None:
    # MNG.CREATE was recorded by a probe on __seamcall: FINALIZE would have been too.
    trace = story("createS septB1").trace
    for probe, expected in (("wrapper", []), ("seamcall", BUILDING)):
        calls = trace.seamcalls.with_columns(probe=pl.lit(probe, trace.seamcalls.schema["probe"]))
        found = broken_rules(gather_evidence(dataclasses.replace(trace, seamcalls=calls)))
        assert found["rule"].to_list() == expected


def test_the_evidence_is_the_other_row() -> None:
    scenario = story(f"{BEFORE} blockB1 demoteT1")
    block = scenario.seamcalls.filter(leaf=7)["seq"][-1]
    assert broken("blockB1 demoteT1") == [("dropped_block", 15, block)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # All vCPUs inside exited by an interrupt, none entered again, and it is still busy.
        ("2/enter( 3/enter( blockB1 2/)Q 3/)Q _ blockB1", ["busy_after_kick"]),
        ("2/enter( blockB1 2/)Q _ blockB1 8/reclaimS", ["busy_after_kick"]),
        ("2/enter( trackD 2/)Q trackD", ["busy_after_kick"]),
        # A loop of tries does not stop after two, and a timer interrupts guests beside it.
        ("2/enter( blockB1 2/)Q _ blockB1 blockB1", []),
        ("2/enter( blockB1 2/)Q _ blockB1 5/blockS1", []),  # another thread does it
        ("blockB1 2/enter( blockB1 2/)Q _ blockB1", []),
        ("2/enter( blockB1 2/)Q _ blockB1 blockS1", []),
        # Mainline kills the VM: one that goes on is run by something else.
        ("2/enter( blockB1 2/)Q _ blockB1 2/enterH", []),
        ("2/enter( blockB1 2/)Q _ blockB1 5/septS3 5/enterH", []),
        ("2/enter( blockB1 3/enter( 2/)Q 3/)Q blockB1", ["busy_after_kick"]),
        ("2/enter( 3/enter( blockB1 2/)Q 3/)H _ blockB1", []),
        ("2/enter( 2/)Q blockB1 _ blockB1", []),  # it left before
        ("2/enter( blockB1 2/)Q lost _ blockB1", []),
        ("2/enter( blockB1 lost 2/)Q _ blockB1", []),
        ("2/enter( blockB1 2/)Q 8/S8 lost 8/S8 _ blockB1", []),
        ("2/enter( blockE1 2/)Q _ blockB1", []),
        ("2/enter( trackP 2/)Q trackD", []),  # mainline kills the VM at the first
        ("2/enter( blockB1 2/)Q trackS blockB1", []),  # they are two requests
        ("2/enter( blockB1 2/)Q _ 3/blockB1", []),
        # A vCPU of an unknown TD is inside: of this one, perhaps.
        ("4/S1#1 2/enter( 5/enter( blockB1 2/)Q _ blockB1 5/)H", []),
        ("2/enter( blockB1 2/)H _ blockB1", []),  # it came out by itself
        ("2/enter( blockB1 _ blockB1 2/)Q", []),  # it was still inside
        ("2/enter( blockB1 2/)Q 2/enterH blockB1", []),  # and went in again
        ("2/enter( blockB1 2/)Q _ blockB2", []),  # another page
        ("2/enter( blockB1 2/)Q _ blockS1", []),
        ("2/enter( B1 2/)Q _ B1", []),  # faults are not kicked for
    ],
)
def test_a_second_failure_counts_after_a_kick_only(text: str, expected: list[str]) -> None:
    assert rules(text, "9/S5 8/blockS7 2/septS2 3/septS4") == expected


@pytest.mark.parametrize(
    ("later", "expected"),
    [("", "weak"), ("_ 8/reclaimS", "weak"), ("_7ms 8/reclaimS", "strong")],
)
def test_a_recording_that_ends_after_two_tries_may_hide_a_third(later: str, expected: str) -> None:
    scenario = story(f"9/S5 8/blockS7 2/enter( blockB1 2/)Q _ blockB1 {later}")
    found = broken_rules(gather_evidence(scenario.trace, mask=mask_of("B")))
    assert found.filter(rule="busy_after_kick")["confidence"].to_list() == [expected]


def test_a_vcpu_that_stayed_inside_is_no_proof_where_clocks_may_differ() -> None:
    for clock, expected in (("mono", ["proof"]), ("local", ["strong"])):
        trace = with_clock(f"{BEFORE} 2/enter( trackS trackP 2/)Q", clock)
        found = broken_rules(gather_evidence(trace, mask=mask_of("B")))
        assert found.filter(rule="track_without_kick")["confidence"].to_list() == expected


def test_a_second_failure_beside_a_host_call_is_not_the_guests() -> None:
    text = "5/(2 2/enter( blockB1 2/)Q _ blockB1 5/)S"
    assert set(rules(text, "9/S5 8/blockS7")) == {"mmu_lock_excludes"}


MMU = ["mmu_lock_excludes"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2/block(1 B2 2/)S", MMU),
        ("2/block(1 S2 2/)S", MMU),  # whatever they answer
        ("2/track( S2 2/)S", MMU),
        ("2/remove(1 septS2^1 2/)S", MMU),
        ("2/remove(1 trackS 2/)S", MMU),
        ("2/(1 blockB2 blockB2 blockB2 2/)S", 3 * MMU),
        ("2/block(1 S2 2/)B", MMU),
        ("2/block(1 2/)S S2", []),
        ("2/block(1 S2#1 2/)S", []),  # another TD
        ("2/(1 S2 2/)S", []),  # two faults share the lock
        ("2/sept(1^1 S2 2/)S", []),
        ("2/enter( blockS1 2/)H", []),
        ("2/demote(1 S2 2/)S", []),  # splitting is in no merged kernel
        ("2/unblock(1 S2 2/)S", []),
        ("2/block(1 S2~ 2/)S", []),  # when it began was not recorded
        ("2/block(1 S2", []),  # nor when it ended
        ("2/block(1 lost S2 2/)S", []),  # its return may be that of a later call
    ],
)
def test_zaps_overlap_no_other_call_under_mmu_lock(text: str, expected: list[str]) -> None:
    found = broken_rules(gather_evidence(with_clock(f"9/S5 8/blockS7 {text}"), mask=mask_of("B")))
    assert found["rule"].to_list() == expected


def with_clock(text: str, clock: str = "mono", step_ns: int = 1000) -> Trace:
    trace = story(text).trace
    (source,) = trace.provenance.sources
    source = dataclasses.replace(source, clock=clock, clock_resolution_ns=step_ns)
    return dataclasses.replace(
        trace, provenance=dataclasses.replace(trace.provenance, sources=(source,))
    )


def of_mmu_lock(trace: Trace) -> list[str]:
    table = broken_rules(gather_evidence(trace, mask=mask_of("B")))
    return table.filter(rule="mmu_lock_excludes")["confidence"].to_list()


@pytest.mark.parametrize(
    ("step_ns", "clock", "expected"),
    [
        (1000, "mono", ["proof"]),
        (1000, "global", ["proof"]),
        (1000, "local", []),
        (1, "mono", ["proof"]),
        (9_000, "mono", ["proof"]),
        # AUG begins one step after the BLOCK does and ends two before it.
        (STEP_NS, "mono", ["proof"]),
        (2 * STEP_NS, "mono", []),
    ],
)
def test_the_clock_must_prove_the_overlap(step_ns: int, clock: str, expected: list[str]) -> None:
    assert of_mmu_lock(with_clock("2/block(1 S2 2/)S", clock, step_ns)) == expected


def test_calls_that_touch_do_not_overlap() -> None:
    # The AUG begins before the BLOCK ends, by one step of the clock.
    text = "2/block(1 ( 2/)S )S"
    assert of_mmu_lock(with_clock(text, "mono", STEP_NS // 2)) == ["proof"]
    assert of_mmu_lock(with_clock(text, "mono", STEP_NS)) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2/block(1 S2 2/)S", []),
        ("2/track( removeS1 2/)S", []),
        # One was busy on the tree, which only the other can have held.
        ("9/enterH 2/block(1 B2 2/)S", ["strong"]),
        ("9/enterH 2/(2 blockB1 2/)S", ["strong"]),
        ("2/block(1 B2 2/)S", []),  # or an entry of a vCPU: none was recorded
        # Or one that was armed, some microseconds off.
        ("9/enterH 9/enterB 9/enterH 2/block(1 B2 2/)S", []),
        ("2/block(1 K2 2/)S", []),  # a guest can have held an entry
        ("2/block(1 3/block(3 B2 3/)S 2/)S", []),  # one of two did
    ],
)
def test_if_clocks_may_differ_only_a_busy_answer_proves_the_overlap(
    text: str, expected: list[str]
) -> None:
    for clock in ("local", "unnamed"):
        assert of_mmu_lock(with_clock(text, clock)) == expected


def test_a_holder_in_one_of_the_possible_generations_only_proves_nothing() -> None:
    # REMOVE shares the tree from B on: AUG is busy on it in A only.
    trace = with_clock("9/enterH 9/S5 8/blockS7 2/remove(1 B2 2/)S", "local")
    for mask, expected in ((mask_of("A"), ["mmu_lock_excludes"]), (ALL_GENERATIONS, [])):
        assert broken_rules(gather_evidence(trace, mask=mask))["rule"].to_list() == expected


def test_a_td_that_no_call_of_the_thread_names_proves_nothing() -> None:
    trace = with_clock("2/block(1 S2 2/)S")
    unnamed = trace.seamcalls.with_columns(
        td_id=pl.when(pl.col("tid") != 1).then("td_id"), tgid=pl.lit(None, pl.Int32)
    )
    assert of_mmu_lock(dataclasses.replace(trace, seamcalls=unnamed)) == []
    of_process = unnamed.with_columns(tgid=pl.lit(7, pl.Int32))
    assert of_mmu_lock(dataclasses.replace(trace, seamcalls=of_process)) == ["proof"]


def test_a_fault_after_a_zap_is_no_collision_where_clocks_of_cpus_may_differ() -> None:
    for clock, expected in (("mono", ["proof"]), ("local", [])):
        trace = with_clock(f"{BEFORE} 2/remove(1 K1 2/)S", clock)
        found = broken_rules(gather_evidence(trace, mask=mask_of("B")))
        assert found.filter(rule="aug_busy_on_entry")["confidence"].to_list() == expected


def test_a_level_that_was_not_recorded_names_no_entry() -> None:
    trace = story(f"{BEFORE} 2/sept(1 K1 2/)S").trace
    without_level = dataclasses.replace(trace, seamcalls=without(trace.seamcalls, "level"))
    for given, expected in ((trace, ["aug_busy_on_entry"]), (without_level, [])):
        table = broken_rules(gather_evidence(given, mask=mask_of("B")))
        assert table["rule"].to_list() == expected


def test_no_rule_speaks_of_migration() -> None:
    scenario = story("trackK")
    pause = parse_leaf("TDH.EXPORT.PAUSE")[0]
    calls = scenario.seamcalls.with_columns(leaf=pl.lit(pause, pl.UInt16))
    trace = dataclasses.replace(scenario.trace, seamcalls=calls)
    assert broken_rules(gather_evidence(trace)).is_empty()


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
        ("createS septW1 finalizeS", []),  # the 2M range of a page is not of this TD alone
        ("createS removeK1 finalizeS", []),  # and that may be what it met
        # The trace begins while the TD is built: no creation of it lies between.
        ("createS#1 septB1 finalizeS", BUILDING),
        ("septB1 finalizeS", []),  # of an earlier TD at this address, perhaps
        ("createS#1 septB1 createS finalizeS", []),
        ("createS#1 septB1 8/S8#1 lost 8/S8#1 finalizeS", []),
        ("createS#1 9/septS2 9/enterH septB1 finalizeS", []),
    ],
)
def test_a_td_is_being_built_until_it_is_finalized_or_runs(text: str, expected: list[str]) -> None:
    assert rules(text, "") == expected


def test_a_broken_rule_outranks_the_holder() -> None:
    scenario = story(f"{BEFORE} 2/(1 K1 2/)S")
    (row,) = (
        busy_causes(gather_evidence(scenario.trace, mask=ALL_GENERATIONS)).filter(rank=1).to_dicts()
    )
    assert (row["cause"], row["rule"]) == ("kernel_bug", "aug_busy_on_entry")
    assert (row["holder_tid"], row["lock"]) == (2, "SEPT_ENTRY")


def test_no_rule_is_broken_beside_a_loss() -> None:
    assert rules("2/enter( trackS trackP 2/)Q") == ["track_without_kick"]
    assert rules("2/enter( trackS lost trackP 2/)Q") == []
