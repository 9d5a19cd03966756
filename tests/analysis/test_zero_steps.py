"""Zero-step episodes, and similar traces without one."""

from __future__ import annotations

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.story import Story, story, without

from tdxtrace.analysis.zero_steps import ARMING_FAULT, zero_steps
from tdxtrace.errors import TableError
from tdxtrace.tables.events import HOST_EVENTS
from tdxtrace.tables.findings import ZERO_STEPS
from tdxtrace.tdx.exit_reasons import STEPPING_EPF_THRESHOLD


def steps_of(scenario: Story) -> pl.DataFrame:
    tables = (
        scenario.seamcalls,
        scenario.vm_entries,
        scenario.page_faults,
        scenario.host_events,
        scenario.losses,
    )
    return ZERO_STEPS.check(zero_steps(*tables))


def episodes(text: str) -> list[str]:
    """Each episode in words: form, strength, refusals, faults before them, how it ended."""
    rows = steps_of(story(text))
    columns = ("form", "strength", "n_refused", "n_faults_before", "ended")
    return [
        f"{form} ({strength}) {n} after {before}, {ended}"
        for form, strength, n, before, ended in rows.select(columns).rows()
    ]


def test_the_threshold_is_the_modules() -> None:
    assert STEPPING_EPF_THRESHOLD == 6
    assert ARMING_FAULT == 7


# TDH.VP.ENTER itself was probed: proof.

FAULT = "enterX B1 "


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("enterC enterX S1 enterC", []),
        ("enterB enterC", ["busy_sept (proof) 1 after 0, entered"]),
        (6 * FAULT + "enterB enterB enterC", ["busy_sept (proof) 2 after 6, entered"]),
        ("enterC " + 7 * FAULT + "enterB enterC", ["busy_sept (proof) 1 after 7, entered"]),
        # Any other operand is other contention.
        (6 * FAULT + "enterD enterK enterC", []),
        ("enterB enterD enterB enterC", ["busy_sept (proof) 2 after 0, entered"]),
        # Two bits of a status are not part of its code.
        ("enterG enterC", ["busy_sept (proof) 1 after 0, entered"]),
        # Other leaves meet the same lock without any zero-step.
        ("B1 B1 S1 blockB1 blockS1 septB1 septS1", []),
    ],
)
def test_a_busy_sept_of_an_entry_is_an_episode(text: str, expected: list[str]) -> None:
    assert episodes(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # Only an instruction that was executed is progress.
        ("enterB enterC enterB enterC", ["1 after 0", "1 after 0"]),
        ("enterB enterH enterB enterC", ["1 after 0", "1 after 0"]),
        ("enterB enterQ enterB enterC", ["2 after 0"]),
        ("enterB enterX enterB enterC", ["2 after 0"]),
        ("enterB enterX B1 enterB enterC", ["2 after 0"]),
        ("enterB enterX S1 enterB enterC", ["2 after 0"]),
        # The timeout of host priority comes after a TDCALL of the guest.
        ("enterB enterZ enterB enterC", ["1 after 0", "1 after 0"]),
        # A fault on a page, the page installed, another fault: past the first one.
        ("enterX B1 enterB enterX S1 enterX B2 enterB enterC", ["1 after 1", "1 after 1"]),
        ("enterX S1 enterX B2 enterX B2 enterB enterC", ["1 after 2"]),
        ("enterX septS1 enterX B2 enterB enterC", ["1 after 1"]),
        # The precursor is counted since the last progress.
        (4 * FAULT + "enterC " + 3 * FAULT + "enterB enterC", ["1 after 3"]),
        (4 * FAULT + "enterQ " + 3 * FAULT + "enterB enterC", ["1 after 7"]),
    ],
)
def test_progress_of_the_vcpu_ends_an_episode(text: str, expected: list[str]) -> None:
    result = [
        e.removeprefix("busy_sept (proof) ").removesuffix(", entered") for e in episodes(text)
    ]
    assert result == expected


@pytest.mark.parametrize(
    ("text", "ended"),
    [
        ("enterB enterX", "entered"),
        ("enterB enterC", "entered"),
        ("enterB B1 enterD enterC", "entered"),
        ("enterB", "cut"),
        ("enterB enterB", "cut"),
        ("enterB S1 S2", "left"),
        ("enterB 2/enterC", "cut"),
    ],
)
def test_an_episode_says_how_it_ended(text: str, ended: str) -> None:
    assert steps_of(story(text))["ended"].to_list() == [ended]


@pytest.mark.parametrize(
    ("reason", "errno", "after", "expected"),
    [
        (17, None, 7, 0),
        # Any other way to userspace, or an error of KVM_RUN itself, says nothing of the entry.
        (10, None, 7, 1),
        (17, 4, 7, 1),
        # It belongs to the entry before it.
        (17, None, 6, 1),
        (17, None, 8, 1),
    ],
)
def test_an_internal_error_is_no_zero_step(
    reason: int, errno: int | None, after: int, expected: int
) -> None:
    scenario = story(7 * ">X " + ">F >X >X", {1: 40})
    entry = scenario.vm_entries.row(after, named=True)
    event = {
        **{"source": 0, "seq": 10**6, "ts_ns": entry["end_ns"] + 1, "cpu": 0, "tid": 1},
        **{"event": "kvm_userspace_exit", "reason": reason, "errno": errno, "n_lines": 1},
    }
    schema = HOST_EVENTS.empty().schema
    events = pl.DataFrame([dict.fromkeys(schema) | event], schema=schema)
    resolve_elsewhere = events.with_columns(tid=pl.lit(2, pl.Int32))
    tables = (scenario.seamcalls, scenario.vm_entries, scenario.page_faults)
    assert zero_steps(*tables, events).filter(form="failed_vmentry").height == expected
    assert zero_steps(*tables, resolve_elsewhere).filter(form="failed_vmentry").height == 1


def test_an_episode_has_its_vcpu_time_and_page() -> None:
    scenario = story("enterX B7#3 enterX B8#3 enterB enterX enterB enterC", {1: 40})
    episode = steps_of(scenario).row(0, named=True)
    calls = scenario.calls
    assert episode == {
        "source": 0,
        "first_seq": calls[4]["seq"],
        "last_seq": calls[6]["seq"],
        "tid": 1,
        "tgid": 40,
        "td_id": 0x7D003,
        "vp_id": 0x5B001,
        "vcpu_id": None,
        "start_ns": calls[4]["start_ns"],
        "end_ns": calls[6]["start_ns"],
        "form": "busy_sept",
        "strength": "proof",
        "n_refused": 2,
        "n_emulated": 1,
        "n_faults_before": 2,
        "gpa": 0x8000,
        "ended": "entered",
    }


def test_vcpus_do_not_disturb_each_other() -> None:
    text = "2/enterC enterX B1 enterB 2/enterB 2/enterC enterB 2/enterX 2/B1 enterC 2/enterB"
    rows = steps_of(story(text)).select("tid", "n_refused", "n_faults_before", "ended").rows()
    assert rows == [(1, 2, 1, "entered"), (2, 1, 0, "entered"), (2, 1, 1, "cut")]


# Only KVM's own events were recorded of the vCPU.

KVM_FAULT = ">X ?1 "
# Another thread's TRACK shows that TDH.MEM.TRACK is probed.
PROBED = "9/trackS >C "


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (PROBED + 7 * KVM_FAULT + ">F >F >C", ["failed_vmentry (strong) 2 after 7, entered"]),
        (PROBED + 9 * KVM_FAULT + ">F >X", ["failed_vmentry (strong) 1 after 9, entered"]),
        # The trace shows seven faults in a row, whatever was before it.
        ("9/trackS " + 7 * KVM_FAULT + ">F >C", ["failed_vmentry (strong) 1 after 7, entered"]),
        # Too few, and the trace reaches back to the last progress: not the mitigation.
        (PROBED + 6 * KVM_FAULT + ">F >F >C", []),
        (PROBED + ">F >C", []),
        (">M " + 6 * KVM_FAULT + ">F >F >C", []),
        (PROBED + 6 * KVM_FAULT + ">H " + 6 * KVM_FAULT + ">F >C", []),
        # Too few, but the trace does not tell what was before.
        ("9/trackS " + 6 * KVM_FAULT + ">F >F >C", ["failed_vmentry (weak) 2 after 6, entered"]),
        (">F >C", ["failed_vmentry (weak) 1 after 0, entered"]),
        # Interrupts at the same RIP do not reset the module's count.
        (
            PROBED + 3 * KVM_FAULT + ">Q " + 4 * KVM_FAULT + ">F >C",
            ["failed_vmentry (strong) 1 after 7, entered"],
        ),
    ],
)
def test_a_failed_entry_after_seven_faults_is_an_episode(text: str, expected: list[str]) -> None:
    assert episodes(text) == expected


ARMED = PROBED + 7 * KVM_FAULT
NEW_PAGES = "".join(f">X ?{page} " for page in range(1, 30))


@pytest.mark.parametrize(
    "text",
    [
        # No SEAMCALL is probed, or others than TRACK: a TRACK can have been in flight.
        ">C " + 7 * KVM_FAULT + ">F >C",
        "2/S9 2/blockS9 >C " + 7 * KVM_FAULT + ">F >C",
        # A booting guest touches one new page after the other: no page is faulted on seven times.
        PROBED + NEW_PAGES + ">F >C",
        PROBED + 6 * KVM_FAULT + NEW_PAGES.replace("?1 ", "?99 ") + ">F >C",
        # Shared pages: the module does not count them.
        PROBED + 7 * f">X ?{1 << 35} " + ">F >C",
        PROBED + 7 * f">X ?{1 << 39} " + ">F >C",
        # Which pages was not recorded.
        PROBED + 7 * ">X " + ">F >C",
        # Other calls that hold what every entry takes: OP_STATE, the TDR.
        ARMED + "2/exporttrack( >F 2/)S >C",
        ARMED + "2/init( >F 2/)S >C",
        # A TRACK whose entry or return was not recorded may have been in flight.
        ARMED + ">F 2/trackS~ >C",
        "2/trackU " + ARMED + ">F >C",
        # Events were lost while it was refused.
        ARMED + ">F lost >C",
        ARMED + "lost >F >C",
        "8/S9@5 " + ARMED + "lost@5 >F >C 8/S9@5",
        # It was not entered again.
        ARMED + ">F",
        # The refusal that nothing else explains comes before the seventh fault.
        "9/trackS " + 3 * KVM_FAULT + ">F " + 4 * KVM_FAULT + "lost >F >C",
    ],
)
def test_a_refused_entry_with_another_possible_reason_is_weak_evidence(text: str) -> None:
    found = episodes(text)
    assert len(found) == 1
    assert found[0].startswith("failed_vmentry (weak)")


@pytest.mark.parametrize(
    "text",
    [
        ARMED + "2/block( >F 2/)S >C",
        # The TRACK was over, and the thread made another call since.
        "2/trackU 2/S9 " + ARMED + ">F >C",
        "lost " + ARMED + ">F >C",
        ARMED + ">F >C lost >C",
        # The record begins within the run; a refusal before the seventh fault of it shows nothing.
        "9/trackS " + 3 * KVM_FAULT + ">F " + 4 * KVM_FAULT + ">F >C",
        # The trace ends while it is kept out: it was entered again after all refusals but the last.
        ARMED + ">F >F >F",
        # Two pages in turn, of one instruction.
        PROBED + 7 * ">X ?1 >X ?2 " + ">F >C",
    ],
)
def test_a_refused_entry_without_another_possible_reason_is_strong_evidence(text: str) -> None:
    (found,) = episodes(text)
    assert found.startswith("failed_vmentry (strong)")


def test_single_steps_that_executed_nothing_are_no_episode() -> None:
    """TDXdown (CCS 2024): 0.8 % of the entries executed nothing, without an EPT violation."""
    steps = 200 * ">Qf "
    assert episodes(PROBED + steps + ">X ?1 S1 " + steps + ">X ?2 S2 " + steps + ">C") == []
    seamcalls = steps.replace(">Qf", "enterQ")
    assert episodes("enterC " + seamcalls + "enterX S1 " + seamcalls + "enterC") == []


def test_a_failed_entry_without_another_one_after_it_was_no_busy() -> None:
    """KVM enters again at once after busy; after an error it returns to userspace."""
    assert all("strong" not in episode for episode in episodes(ARMED + ">F"))


def test_pages_that_were_installed_are_progress() -> None:
    faults = "".join(f">X ?{page} S{page} " for page in range(1, 9))
    assert episodes(PROBED + faults + ">F >C") == []
    assert episodes(PROBED + 8 * ">X ?1 B1 " + ">F >C") == [
        "failed_vmentry (strong) 1 after 8, entered"
    ]


@pytest.mark.parametrize(
    ("text", "n"),
    [
        (ARMED + "2/track( >F 2/)S >C", 0),
        (ARMED + "2/trackS >F >C", 1),
        (ARMED + ">F 2/trackS >C", 1),
        (ARMED + "2/track( >F 2/)S >F >C", 1),
        ("2/track( " + ARMED + "2/)S >F >C", 1),
        # One that was never seen to return is no reason to doubt everything after it.
        ("2/trackU " + ARMED + ">F >C", 1),
        # BLOCK takes the tree and not the epoch.
        (ARMED + "2/block( >F 2/)S >C", 1),
    ],
)
def test_a_track_in_flight_explains_a_failed_entry(text: str, n: int) -> None:
    assert steps_of(story(text))["n_refused"].sum() == n


@pytest.mark.parametrize(
    ("processes", "n"),
    [({1: 10, 2: 10}, 0), ({1: 10, 2: 11}, 1), ({1: 10}, 0), ({2: 11}, 0), ({}, 0)],
)
def test_a_track_of_another_vm_explains_nothing(processes: dict[int, int], n: int) -> None:
    scenario = story(ARMED + "2/track( >F 2/)S >C", processes)
    assert steps_of(scenario)["n_refused"].sum() == n


def test_a_track_of_another_source_explains_nothing() -> None:
    scenario = story(ARMED + "2/track( >F 2/)S >C")
    resolve_elsewhere = scenario.seamcalls.with_columns(source=pl.lit(1, pl.UInt16))
    assert zero_steps(resolve_elsewhere, scenario.vm_entries, scenario.page_faults).height == 1


def test_a_vcpu_whose_entries_were_probed_is_not_counted_twice() -> None:
    scenario = story(ARMED + "enterB >F enterC >C 2/>C " + ARMED.replace(">", "2/>") + "2/>F 2/>C")
    forms = steps_of(scenario).select("tid", "form").rows()
    assert forms == [(1, "busy_sept"), (2, "failed_vmentry")]


def test_a_stock_episode_names_the_vcpu_and_the_last_page() -> None:
    scenario = story(ARMED + ">X ?9 >F _ >F >C")
    episode = steps_of(scenario).row(0, named=True)
    assert (episode["vcpu_id"], episode["gpa"]) == (1, 0x9000)
    refused = [row for row in scenario.entries if row["exit_reason"] == 0xFFFF_FFFF]
    assert (episode["first_seq"], episode["last_seq"]) == tuple(r["seq"] for r in refused)
    assert (episode["start_ns"], episode["end_ns"]) == tuple(r["end_ns"] for r in refused)


# Exits that the module emulates look like faults by writing that come back at once.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (ARMED + ">Wf ?1 >Wf ?1 >C", ["emulated_ept_violation (weak) 2 after 8, entered"]),
        (ARMED + KVM_FAULT + ">Wf ?1 >C", ["emulated_ept_violation (weak) 1 after 9, entered"]),
        # Too slow, by reading, too early, on another page, or installed in between.
        (ARMED + ">W ?1 >W ?1 >C", []),
        (ARMED + ">Xf ?1 >Xf ?1 >C", []),
        (PROBED + 6 * KVM_FAULT + ">Wf ?1 >C", []),
        (ARMED + ">Wf ?2 >Wf ?3 >Wf ?4 >C", []),
        (ARMED + "S1 >Wf ?2 >C", []),
        (">C >Wf ?1 >Wf ?1 >C", []),
    ],
)
def test_exits_without_executed_instructions_are_weak_evidence(
    text: str, expected: list[str]
) -> None:
    assert episodes(text) == expected


def test_weak_signs_do_not_hide_strong_ones() -> None:
    result = episodes(ARMED + ">Wf ?1 >F >C")
    assert result == [
        "emulated_ept_violation (weak) 1 after 8, entered",
        "failed_vmentry (strong) 1 after 8, entered",
    ]


def test_entries_whose_exit_is_missing_are_no_refusals() -> None:
    assert episodes(ARMED + ">U >U >C") == []


# Laws.

few = settings(max_examples=25)
letters = st.sampled_from("XXXXBBBDCQ")
calls = st.builds("{}enter{}".format, st.sampled_from(["", "2/"]), letters)
installs = st.builds("{}{}{}".format, *map(st.sampled_from, (["", "2/"], "BS", "12")))
entries = st.builds("{}>{}".format, st.sampled_from(["3/", "4/"]), st.sampled_from("XXXXXFFCQ"))
faults = st.builds("{}?{}".format, st.sampled_from(["3/", "4/"]), st.sampled_from("12"))
tracks = st.sampled_from(["5/trackS", "_"])
stories = st.lists(st.one_of(calls, installs, entries, faults, tracks), max_size=60).map(" ".join)


@few
@given(stories)
def test_every_busy_sept_is_in_one_episode(text: str) -> None:
    scenario = story(text)
    n = scenario.seamcalls.filter(pl.col("leaf") == 0, pl.col("status") == 0x8000_0200_0000_0092)
    proof = steps_of(scenario).filter(pl.col("strength") == "proof")
    assert proof["n_refused"].sum() == n.height
    failed = scenario.vm_entries.filter(pl.col("exit_reason") == 0xFFFF_FFFF)
    stock = steps_of(scenario).filter(pl.col("form") == "failed_vmentry")
    assert stock["n_refused"].sum() <= failed.height


@few
@given(stories, st.integers(0, 99))
def test_the_order_of_rows_does_not_matter(text: str, seed: int) -> None:
    scenario = story(text)
    tables = (scenario.seamcalls, scenario.vm_entries, scenario.page_faults)
    shuffled = zero_steps(*(t.sample(fraction=1, shuffle=True, seed=seed) for t in tables))
    assert shuffled.equals(steps_of(scenario))


@few
@given(stories, st.integers(-(10**8), 10**15))
def test_shifting_all_times_shifts_only_times(text: str, shift: int) -> None:
    scenario = story(text)
    moved = pl.col("start_ns", "end_ns") + shift
    faults = scenario.page_faults.with_columns(pl.col("ts_ns") + shift)
    later = zero_steps(
        scenario.seamcalls.with_columns(moved), scenario.vm_entries.with_columns(moved), faults
    )
    assert later.equals(steps_of(scenario).with_columns(moved))


@few
@given(stories)
def test_another_vcpu_changes_nothing(text: str) -> None:
    scenario = story(text)
    mine = pl.col("tid").is_in([1, 3, 5])
    alone = zero_steps(
        scenario.seamcalls.filter(mine),
        scenario.vm_entries.filter(mine),
        scenario.page_faults.filter(mine),
    )
    assert alone.equals(steps_of(scenario).filter(mine))


def test_empty_input_gives_an_empty_table() -> None:
    nothing = steps_of(story(""))
    assert nothing.is_empty()
    assert nothing.schema == ZERO_STEPS.schema


def test_columns_that_are_missing_are_named() -> None:
    scenario = story("enterB")
    with pytest.raises(TableError, match="vm_entries"):
        zero_steps(scenario.seamcalls, scenario.vm_entries.drop("tid"), scenario.page_faults)


def test_a_capture_without_arguments_still_shows_the_episode() -> None:
    scenario = story(6 * FAULT + "enterB enterC")
    calls = without(scenario.seamcalls, "td_id", "vp_id", "gpa", "tgid")
    episode = zero_steps(calls, scenario.vm_entries, scenario.page_faults).row(0, named=True)
    assert (episode["n_refused"], episode["n_faults_before"]) == (1, 6)
    assert (episode["gpa"], episode["vp_id"], episode["td_id"]) == (None, None, None)
