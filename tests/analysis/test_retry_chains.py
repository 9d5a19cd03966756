"""Retry chains of small scenarios, and properties of any scenario."""

from __future__ import annotations

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.story import STATUS, Story, story, without

from tdxtrace.analysis.busy_answers import busy_answers
from tdxtrace.analysis.retry_chains import retry_chains
from tdxtrace.errors import TableError
from tdxtrace.tables.findings import RETRY_CHAINS


def chains_of(scenario: Story) -> pl.DataFrame:
    return RETRY_CHAINS.check(retry_chains(scenario.seamcalls, scenario.losses))


def ends(text: str, processes: dict[int, int] | None = None) -> list[str]:
    """How each chain of a story went: attempts and outcome, the first to begin first."""
    rows = chains_of(story(text, processes)).sort("start_ns", "first_seq")
    return [
        f"{n} {outcome}" + (f" by {why}" if why else "")
        for n, outcome, why in rows.select("n_attempts", "outcome", "cut_by").rows()
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("S", ["1 succeeded"]),
        ("S S", ["1 succeeded", "1 succeeded"]),
        ("B S", ["2 succeeded"]),
        ("B B B B B B S", ["7 succeeded"]),
        ("B S S", ["2 succeeded", "1 succeeded"]),
        ("B S B S", ["2 succeeded", "2 succeeded"]),
        ("E", ["1 failed"]),
        ("B B E", ["3 failed"]),
        ("E S", ["1 failed", "1 succeeded"]),
        ("T S", ["1 failed", "1 succeeded"]),
        ("S1 B1 S1", ["1 succeeded", "2 succeeded"]),
    ],
)
def test_a_chain_ends_with_the_first_answer_that_is_not_retryable(
    text: str, expected: list[str]
) -> None:
    assert ends(text) == expected


@pytest.mark.parametrize("busy", "BKDPYNIJ")
def test_every_retryable_answer_joins(busy: str) -> None:
    chain = chains_of(story(f"{busy} {busy} S")).row(0, named=True)
    assert (chain["n_attempts"], chain["n_busy"], chain["outcome"]) == (3, 2, "succeeded")


def test_retryable_answers_join_whatever_their_mix() -> None:
    assert ends("B K N I J Y D P S") == ["9 succeeded"]


@pytest.mark.parametrize(
    "status", [0xC000_0B0A_0000_0001, 0x8000_0702_0000_0000, 0x9000_0205_0000_0000]
)
def test_an_error_that_is_not_retryable_joins_nothing(status: int) -> None:
    scenario = story("E1 S1")
    scenario.calls[0]["status"] = status
    rows = chains_of(scenario).select("n_attempts", "n_busy", "outcome", "final_status").rows()
    assert rows == [(1, 0, "failed", status), (1, 0, "succeeded", 0)]


@pytest.mark.parametrize("bit", [1 << 60, 1 << 61, 3 << 60])
def test_bits_that_the_module_sets_at_run_time_do_not_hide_a_busy(bit: int) -> None:
    scenario = story("B S")
    scenario.calls[0]["status"] |= bit
    assert chains_of(scenario)["n_attempts"].to_list() == [2]


def test_a_chain_has_its_place_time_and_duration() -> None:
    scenario = story("B7#2 K7#2 S7#2")
    chain = chains_of(scenario).row(0, named=True)
    calls = scenario.seamcalls
    assert chain == {
        "source": 0,
        "first_seq": calls["seq"][0],
        "last_seq": calls["seq"][2],
        "leaf": 6,
        "tid": 1,
        "tgid": None,
        "td_id": 0x7D002,
        "vp_id": None,
        "gpa": 0x7000,
        "level": 0,
        "start_ns": calls["start_ns"][0],
        "end_ns": calls["end_ns"][2],
        "took_ns": calls["end_ns"][2] - calls["start_ns"][0],
        "n_attempts": 3,
        "n_busy": 2,
        "n_segments": 1,
        "outcome": "succeeded",
        "final_status": 0,
        "identity": "request",
        "cut_by": None,
        "settled_seq": None,
        "begin_lost": False,
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("B _ S", ["2 succeeded"]),
        ("B _300us S", ["2 succeeded"]),
        ("B _7s S", ["2 succeeded"]),
        ("blockB _20ms blockS", ["2 succeeded"]),
        ("B@1 B@2 S@3", ["3 succeeded"]),
        ("B@1>2 S@2>1", ["2 succeeded"]),
    ],
)
def test_neither_a_pause_nor_a_move_to_another_cpu_ends_a_chain(
    text: str, expected: list[str]
) -> None:
    assert ends(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # The fault path leaves its loop, enters the guest, and the guest faults again.
        ("B enterX S", ["2 succeeded", "1 succeeded"]),
        ("B enterX B enterX S", ["3 succeeded", "1 succeeded", "1 succeeded"]),
        ("B enterB enterX S", ["2 succeeded", "2 succeeded"]),
        ("B enterQ enterX S", ["2 succeeded", "1 succeeded", "1 succeeded"]),
        ("septB enterX septS", ["2 succeeded", "1 succeeded"]),
        # ... or faults elsewhere first, in turn.
        ("B1 B2 B1 B2 S1 S2", ["3 succeeded", "3 succeeded"]),
        ("B1 B2 S2 S1", ["2 succeeded", "2 succeeded"]),
        ("B1 enterX B2 enterX S1 S2", ["2 succeeded", "1 succeeded", "2 succeeded", "1 succeeded"]),
        ("B1 S2 S1", ["2 succeeded", "1 succeeded"]),
        ("B1 S2 B1 S3 E1", ["3 failed", "1 succeeded", "1 succeeded"]),
        ("B1 septS1^1 S1", ["2 succeeded", "1 succeeded"]),
        ("B1 blockS1 S1", ["2 succeeded", "1 succeeded"]),
        ("B1 _7s S2 _7s S1", ["2 succeeded", "1 succeeded"]),
        # The vCPU is entered again after what its thread had to do first.
        ("enterB S1 enterX", ["2 succeeded", "1 succeeded"]),
        ("enterB*1 enterX*2 enterX*1", ["2 succeeded", "1 succeeded"]),
        ("enterB*1 enterB*2 enterX*1 enterC*2", ["2 succeeded", "2 succeeded"]),
        # Other leaves are no different.
        ("blockB enterX blockS", ["2 succeeded", "1 succeeded"]),
        ("trackP enterX trackS", ["2 succeeded", "1 succeeded"]),
        ("blockB1 trackS blockS1", ["2 succeeded", "1 succeeded"]),
        ("blockB1 blockS2 blockB1 blockS1", ["3 succeeded", "1 succeeded"]),
        ("demoteJ1 S2 demoteJ1 demoteS1", ["3 succeeded", "1 succeeded"]),
        ("B1#1 B1#2 S1#1 S1#2", ["2 succeeded", "2 succeeded"]),
        ("B1 S1 S2 B1 S1", ["2 succeeded", "1 succeeded", "2 succeeded"]),
        # Nobody comes back.
        ("B1 S2", ["1 abandoned", "1 succeeded"]),
        ("B1 B1 B2 S2", ["2 abandoned", "2 succeeded"]),
    ],
)
def test_other_calls_of_the_thread_do_not_end_a_chain(text: str, expected: list[str]) -> None:
    assert ends(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # Another thread settled it, so that who wants it later wants it anew.
        ("B1 2/S1 S2 S1", ["1 resolved_elsewhere", *3 * ["1 succeeded"]]),
        ("B1 2/S1 enterX S1", ["1 resolved_elsewhere", *3 * ["1 succeeded"]]),
        ("blockB1 2/blockS1 S2 _5s blockS1", ["1 resolved_elsewhere", *3 * ["1 succeeded"]]),
        ("trackP 2/trackS S1 trackS", ["1 resolved_elsewhere", *3 * ["1 succeeded"]]),
        ("B1 S2 B1 2/S1 S2 S1", ["2 resolved_elsewhere", *4 * ["1 succeeded"]]),
        # ... before it began, on another page, TD or level, or in vain.
        ("2/S1 B1 S2 S1", ["1 succeeded", "2 succeeded", "1 succeeded"]),
        ("B1 2/S3 S2 S1", ["2 succeeded", "1 succeeded", "1 succeeded"]),
        ("B1 2/S1#2 S2 S1", ["2 succeeded", "1 succeeded", "1 succeeded"]),
        ("B1 2/S1^1 S2 S1", ["2 succeeded", "1 succeeded", "1 succeeded"]),
        ("B1 2/E1 S2 S1", ["2 succeeded", "1 failed", "1 succeeded"]),
        ("B1 2/B1 S2 S1 2/S1", ["2 succeeded", "2 succeeded", "1 succeeded"]),
        # The caller's loop had not looked.
        ("B1 2/S1 S1", ["2 succeeded", "1 succeeded"]),
        # A vCPU has one thread at a time.
        ("enterB*1 2/enterX*1 S2 enterX*1", ["2 succeeded", "1 succeeded", "1 succeeded"]),
    ],
)
def test_a_chain_does_not_go_on_after_another_thread_settled_the_request(
    text: str, expected: list[str]
) -> None:
    assert ends(text) == expected


@pytest.mark.parametrize(
    "text", ["B1 enterX S1", "B1 S2 S1", "B1 2/S2 enterX S1", "trackP S1 trackS", "B1 enterX E1"]
)
def test_a_call_whose_entry_was_not_recorded_does_not_settle_itself(text: str) -> None:
    scenario = story(text)
    calls = without(scenario.seamcalls, "start_ns", "start_cpu")
    chains = RETRY_CHAINS.check(retry_chains(calls, scenario.losses)).sort("first_seq")
    assert chains["n_attempts"][0] == 2
    assert chains["outcome"][0] in ("succeeded", "failed")
    assert chains["settled_seq"].null_count() == chains.height


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # Going on with what was open is no sign that the caller does not come back.
        ("B1 B2 B1 B2", ["2 cut by trace_end", "2 cut by trace_end"]),
        ("B1 B2 B1 S2", ["2 cut by trace_end", "2 succeeded"]),
        ("B1 B2 S2", ["1 abandoned", "2 succeeded"]),
        ("B1 enterX enterB enterX", ["1 cut by trace_end", "1 succeeded", "2 succeeded"]),
    ],
)
def test_a_request_is_abandoned_if_its_thread_began_another(text: str, expected: list[str]) -> None:
    assert ends(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # Unblocked by its own thread, or by another between two attempts in a row.
        ("promoteJ1 unblockS1 promoteJ1 promoteS1", ["1 abandoned", "1 succeeded", "2 succeeded"]),
        ("demoteJ1 2/unblockS1 demoteS1", ["1 abandoned", "1 succeeded", "1 succeeded"]),
        ("removeB1 2/unblockS1", ["1 abandoned", "1 succeeded"]),
        ("relocateB1 2/unblockS1", ["1 abandoned", "1 succeeded"]),
        # What comes after it settles nothing, and what came before did.
        ("removeB1 2/unblockS1 2/removeS1", ["1 abandoned", "1 succeeded", "1 succeeded"]),
        ("removeB1 2/removeS1 2/unblockS1", ["1 resolved_elsewhere", "1 succeeded", "1 succeeded"]),
        ("removeB1 2/unblockS1 lost S2", ["1 abandoned", "1 succeeded", "1 cut by lost_events"]),
        # Innocent: another range or level, an UNBLOCK that failed, a leaf that needs no block.
        ("promoteJ1 unblockS2 promoteS1", ["2 succeeded", "1 succeeded"]),
        ("promoteJ1^1 unblockS1^0 promoteS1^1", ["2 succeeded", "1 succeeded"]),
        ("promoteJ1 unblockE1 promoteS1", ["2 succeeded", "1 failed"]),
        ("promoteJ1 2/unblockB1 promoteS1", ["2 succeeded", "1 cut by trace_end"]),
        ("B1 2/unblockS1 S1", ["2 succeeded", "1 succeeded"]),
    ],
)
def test_an_unblock_ends_requests_that_need_a_blocked_range(text: str, expected: list[str]) -> None:
    assert ends(text) == expected


# Thread 2 comes back to a page after two calls of the leaf: at pages 8 and 9.
COMES_BACK = "2/B7 2/S8 2/S9 2/S7"


@pytest.mark.parametrize(
    ("text", "n_cut", "n_else"),
    [
        # What may go on with a request of before the loss: five calls of the leaf, as two calls
        # between are what was seen, and twice as many what there may be.
        ("S1 lost S2 S3 S4 S5 S6 S20", 5, 1),
        ("midway S2 S3 S4 S5 S6 S20", 5, 1),
        # Also where other calls come first and between.
        ("S1 lost trackS S2 trackS trackS S3 S4 S5 S6 S20", 6, 2),
        # Nothing was lost; requests of other leaves.
        ("S1 S2 S3 S4 S5", 0, 0),
        ("S1 S2 S3 S4 lost trackS trackS septS1 septS2", 2, 2),
    ],
)
def test_after_a_loss_a_thread_may_continue_open_requests(
    text: str, n_cut: int, n_else: int
) -> None:
    def cut(words: str) -> int:
        rows = chains_of(story(words)).filter(pl.col("tid") == 1)
        return rows.filter(pl.col("outcome") == "cut").height

    assert cut(f"{text} {COMES_BACK}") == n_cut
    # A thread that tries again at once shows nothing of that.
    assert cut(f"{text} 2/B7 2/S7 2/S8 2/S9") == n_else


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("B1 S2", "cut"),
        ("B1 S2 S3", "cut"),
        ("B1 S2 S3 S4", "abandoned"),
        ("B1 septS2 septS3 septS4", "cut"),
        # Settled by another thread: it does not come back to that.
        ("B1 S2 3/S1", "resolved_elsewhere"),
        ("promoteB1 S2", "abandoned"),
    ],
)
def test_before_the_end_a_thread_may_continue_requests_as_it_did_earlier(
    text: str, expected: str
) -> None:
    rows = chains_of(story(f"{COMES_BACK} {text}")).filter(pl.col("tid") == 1)
    assert rows.sort("start_ns")["outcome"][0] == expected


def test_segments_count_the_stretches_between_entries() -> None:
    scenario = story("B B enterX B enterX enterX S")
    chain = chains_of(scenario).filter(pl.col("leaf") == 6).row(0, named=True)
    assert (chain["n_attempts"], chain["n_segments"]) == (4, 3)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("B1 2/B1 S1 2/S1", ["2 succeeded", "2 succeeded"]),
        ("1/B1 2/S2 1/S1", ["2 succeeded", "1 succeeded"]),
        ("9/B1 8/blockS1 9/S1", ["2 succeeded", "1 succeeded"]),
        ("B1#1 S1#2", ["1 abandoned", "1 succeeded"]),
        ("B1^0 S1^1", ["1 abandoned", "1 succeeded"]),
        ("trackP#1 trackS#2", ["1 abandoned", "1 succeeded"]),
        ("enterD*1 enterX*2", ["1 abandoned", "1 succeeded"]),
        ("wbinvdK1 wbinvdS2", ["1 abandoned", "1 succeeded"]),
        ("wbinvdK1 wbinvdS1", ["2 succeeded"]),
        ("createN createN createS", ["3 succeeded"]),
        ("trackB trackP trackS", ["3 succeeded"]),
        ("initK initS", ["2 succeeded"]),
        ("demoteJ1 demoteJ1 demoteS1", ["3 succeeded"]),
    ],
)
def test_threads_tds_pages_levels_and_leaves_distinguish_requests(
    text: str, expected: list[str]
) -> None:
    assert ends(text) == expected


def test_entries_of_a_vcpu_make_a_chain_and_an_exit_ends_it() -> None:
    assert ends("enterB enterD enterX enterH enterC") == ["3 succeeded", *2 * ["1 succeeded"]]


def test_time_in_the_guest_is_not_part_of_an_entry() -> None:
    scenario = story("enterB enterC")
    chain = chains_of(scenario).row(0, named=True)
    first, last = scenario.calls
    assert chain["took_ns"] == last["start_ns"] - first["start_ns"]
    assert chain["end_ns"] == last["end_ns"]


# How chains that their caller left end.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # Another thread finds the page in the wanted state.
        ("B1 2/S1 S2", ["1 resolved_elsewhere", "1 succeeded", "1 succeeded"]),
        ("B1 S2 2/S1", ["1 resolved_elsewhere", "1 succeeded", "1 succeeded"]),
        ("B1 S2 2/B1 2/S1", ["1 resolved_elsewhere", "1 succeeded", "2 succeeded"]),
        ("B1 B1 S2 _5s 2/S1", ["2 resolved_elsewhere", "1 succeeded", "1 succeeded"]),
        # It did so before this one began, on another page, level, TD or leaf, or failed.
        ("2/S1 B1 S2", ["1 succeeded", "1 abandoned", "1 succeeded"]),
        ("B1 2/S3 S2", ["1 abandoned", "1 succeeded", "1 succeeded"]),
        ("B1 2/S1^1 S2", ["1 abandoned", "1 succeeded", "1 succeeded"]),
        ("B1 2/S1#2 S2", ["1 abandoned", "1 succeeded", "1 succeeded"]),
        ("B1 2/blockS1 S2", ["1 abandoned", "1 succeeded", "1 succeeded"]),
        ("B1 2/E1 S2", ["1 abandoned", "1 failed", "1 succeeded"]),
        # A vCPU has no second caller, and another vCPU's entry, or another page's, settles nothing.
        ("enterD*1 S2 2/S3 2/enterX*2", ["1 abandoned", *3 * ["1 succeeded"]]),
        ("wbinvdK1 S2 2/S3 2/wbinvdS2", ["1 abandoned", *3 * ["1 succeeded"]]),
        ("enterD*1 S1 2/enterX*1", ["1 abandoned", "1 succeeded", "1 succeeded"]),
        # Of TRACK, the TD is the request.
        ("trackP S1 2/trackS", ["1 resolved_elsewhere", "1 succeeded", "1 succeeded"]),
        ("trackP S1 2/trackS#2", ["1 abandoned", "1 succeeded", "1 succeeded"]),
    ],
)
def test_a_request_given_up_is_settled_elsewhere_or_abandoned(
    text: str, expected: list[str]
) -> None:
    assert ends(text) == expected


def test_the_call_that_settled_it_is_named() -> None:
    scenario = story("B1 S2 2/B1 2/S1 3/S1")
    chain = chains_of(scenario).row(0, named=True)
    assert chain["outcome"] == "resolved_elsewhere"
    assert chain["settled_seq"] == scenario.calls[3]["seq"]
    assert chain["final_status"] == STATUS["B"]


def test_a_success_settles_even_if_the_start_of_its_own_chain_was_lost() -> None:
    scenario = story("B1@1 S2@1 2/S3@2 lost@2 2/S1@2 S4@1")
    by_page = {row["gpa"] >> 12: row for row in chains_of(scenario).iter_rows(named=True)}
    assert by_page[1]["tid"] in (1, 2)
    rows = chains_of(scenario).filter(gpa=0x1000).sort("start_ns").select("tid", "outcome").rows()
    assert rows == [(1, "resolved_elsewhere"), (2, "cut")]


def test_two_threads_on_one_page_are_two_requests() -> None:
    assert ends("B1 2/B1 B1 2/B1 2/S1 B1 S1") == ["4 succeeded", "3 succeeded"]


# What interrupts the record.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("B", ["1 cut by trace_end"]),
        ("B B", ["2 cut by trace_end"]),
        ("N", ["1 cut by trace_end"]),
        ("B1 2/S2 _ 2/S2", ["1 cut by trace_end", "1 succeeded", "1 succeeded"]),
        ("B enterX enterX", ["1 cut by trace_end", "1 succeeded", "1 succeeded"]),
        ("enterB", ["1 cut by trace_end"]),
        ("E", ["1 failed"]),
        ("S U", ["1 succeeded", "1 cut by trace_end"]),
        ("B U", ["2 cut by trace_end"]),
        ("2/track( B1 S1", ["1 cut by trace_end", "2 succeeded"]),
    ],
)
def test_the_end_of_the_trace_cuts_open_chains(text: str, expected: list[str]) -> None:
    assert ends(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("midway S1 S2", ["1 cut by trace_start", "1 succeeded"]),
        ("midway B1 S1 S2", ["2 cut by trace_start", "1 succeeded"]),
        (
            "midway S1 2/B2 2/S2 2/S3",
            ["1 cut by trace_start", "2 cut by trace_start", "1 succeeded"],
        ),
        ("midway E1 S1", ["1 cut by trace_start", "1 succeeded"]),
        # A call in progress then has no entry.
        ("midway B~ S1 S2", [*2 * ["1 cut by trace_start"], "1 succeeded"]),
        # A fault's chain may have begun before the entry that is seen first.
        ("midway enterX S1 S2", [*2 * ["1 cut by trace_start"], "1 succeeded"]),
    ],
)
def test_the_start_of_a_trace_that_began_midway_cuts_each_threads_first_chain(
    text: str, expected: list[str]
) -> None:
    assert ends(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("B lost S", [*2 * ["1 cut by lost_events"]]),
        ("B@1 lost@1 S@1", [*2 * ["1 cut by lost_events"]]),
        ("B B lost B S", [*2 * ["2 cut by lost_events"]]),
        # Complete before the gap; and, after it, whatever follows the first chain.
        ("S1 lost S2 S3", ["1 succeeded", "1 cut by lost_events", "1 succeeded"]),
        ("E1 lost E2 E3", ["1 failed", "1 cut by lost_events", "1 failed"]),
        ("S1 lost B2 S2 B3 S3", ["1 succeeded", "2 cut by lost_events", "2 succeeded"]),
        # A call that moved to or from the CPU of the gap, or thereby could have.
        ("B@1>2 lost@2 S@2", [*2 * ["1 cut by lost_events"]]),
        ("B@2>1 lost@1 S@2", [*2 * ["1 cut by lost_events"]]),
        ("B@1 lost@2 S@2", [*2 * ["1 cut by lost_events"]]),
        # Inside a call the thread cannot be told to have stayed.
        ("( lost )S", ["1 cut by lost_events"]),
        ("B1 ( lost )S S2", [*2 * ["1 cut by lost_events"], "1 succeeded"]),
        # Two gaps.
        ("B lost B lost S", [*3 * ["1 cut by lost_events"]]),
        # The fault's chain is open across an entry, and so is the gap's harm.
        ("B enterX lost S", ["1 cut by lost_events", "1 succeeded", "1 cut by lost_events"]),
        ("B lost enterX S", [*3 * ["1 cut by lost_events"]]),
    ],
)
def test_a_loss_cuts_the_chains_that_could_reach_into_it(text: str, expected: list[str]) -> None:
    assert ends(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("B@1 2/S2@2 lost@2 S@1 2/S2@2", ["2 succeeded", "1 succeeded", "1 cut by lost_events"]),
        (
            "B@1>2 2/S2@3 lost@3 S@2>1 2/S3@3",
            ["2 succeeded", "1 succeeded", "1 cut by lost_events"],
        ),
    ],
)
def test_a_loss_on_another_cpu_cuts_nothing(text: str, expected: list[str]) -> None:
    assert ends(text) == expected


def test_the_second_chain_after_a_gap_is_whole() -> None:
    result = ends("B1@1 S1@1 lost@1 B2@1 S2@1 B3@1 S3@1")
    assert result == ["2 succeeded", "2 cut by lost_events", "2 succeeded"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("overwritten S1 S2", ["1 cut by lost_events", "1 succeeded"]),
        ("overwritten@1 S1@1 2/S2@2", ["1 cut by lost_events", "1 succeeded"]),
        ("B1@1 full@1 S2@2", ["1 cut by lost_events", "1 cut by lost_events"]),
        ("S1@1 full@1 2/S2@2", ["1 succeeded", "1 succeeded"]),
    ],
)
def test_a_buffer_that_was_overwritten_or_full_cuts_like_a_gap(
    text: str, expected: list[str]
) -> None:
    assert ends(text) == expected


@pytest.mark.parametrize(
    "text", ["B U B S", "B U S", "U S", "B U enterX S", "blockB blockU blockB blockS"]
)
def test_a_missing_status_cuts_the_chains_of_its_request(text: str) -> None:
    requests = chains_of(story(text)).filter(pl.col("leaf") != 0)
    assert requests["outcome"].unique().to_list() == ["cut"]
    assert requests["cut_by"].unique().to_list() == ["lost_events"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # The next attempt may have been lost, however much later.
        (
            "B1 S2 lost S3 S4",
            ["1 cut by lost_events", "1 succeeded", "1 cut by lost_events", "1 succeeded"],
        ),
        ("B1 S2 lost S1", ["1 cut by lost_events", "1 succeeded", "1 cut by lost_events"]),
        # It was settled before.
        (
            "B1@1 2/S1@2 S2@1 lost@1 S3@1 S4@1",
            ["1 resolved_elsewhere", "1 succeeded", "1 succeeded", "1 cut by lost_events"],
        ),
        (
            "B1@1 S2@1 lost@1 2/S1@2 S3@1 S4@1",
            ["1 cut by lost_events", "1 succeeded", "1 succeeded", "1 cut by lost_events"],
        ),
        # What a vCPU's thread had open may go on after other calls.
        ("S1 lost septS1 S2 S3", ["1 succeeded", *2 * ["1 cut by lost_events"], "1 succeeded"]),
        ("enterX lost S2 enterX", ["1 succeeded", *2 * ["1 cut by lost_events"]]),
    ],
)
def test_a_loss_cuts_what_was_open_whatever_came_in_between(text: str, expected: list[str]) -> None:
    assert ends(text)[: len(expected)] == expected


def test_a_missing_answer_does_not_harm_the_request_after_it() -> None:
    result = ends("U1 B2 S2")
    assert result == ["1 cut by lost_events", "2 succeeded"]


# What the capture does not say.


def identities(calls: pl.DataFrame) -> list[tuple[str, int]]:
    result = RETRY_CHAINS.check(retry_chains(calls, story("").losses))
    return result.select("identity", "n_attempts").rows()


@pytest.mark.parametrize(
    ("missing", "text", "expected"),
    [
        ((), "B1 B1 S1", [("request", 3)]),
        (("td_id",), "B1 B1 S1", [("gpa", 3)]),
        (("gpa", "level"), "B1 B1 S1", [("td", 3)]),
        (("td_id", "gpa", "level"), "B1 B1 S1", [("thread", 3)]),
        (("level",), "B1 S1", [("request", 2)]),
        # Where the page is not known, only the answer tells requests apart.
        (("gpa",), "B1 B2 S2", [("td", 3)]),
        (("gpa",), "S1 B2 S2", [("td", 1), ("td", 2)]),
        (("gpa",), "B1#1 S1#2", [("td", 1), ("td", 1)]),
        (("td_id",), "B1#1 S1#2", [("gpa", 2)]),
        (("td_id",), "trackP trackS", [("thread", 2)]),
        (("vp_id",), "enterB*1 enterX*1", [("thread", 2)]),
        ((), "trackP trackS", [("request", 2)]),
        ((), "enterB enterX", [("request", 2)]),
        ((), "cachewbI cachewbS", [("request", 2)]),
    ],
)
def test_missing_arguments_show_in_identity(
    missing: tuple[str, ...], text: str, expected: list[tuple[str, int]]
) -> None:
    assert identities(without(story(text).seamcalls, *missing)) == expected


def test_calls_without_a_thread_go_by_cpu() -> None:
    calls = without(story("B1@1 2/B1@2 S1@1 2/S1@2").seamcalls, "tid")
    assert identities(calls) == [("request", 2), ("request", 2)]


def test_calls_without_thread_and_cpu_are_still_counted() -> None:
    calls = without(story("B1@1 S1@1").seamcalls, "tid", "cpu", "start_cpu")
    assert sum(n for _, n in identities(calls)) == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # Its own request, or another that came in turn, or one that began after the other was left.
        ("B1 B~ S1", [*2 * ["cut"]]),
        ("B1 B~ S2", [*3 * ["cut"]]),
        ("B1 S~", [*2 * ["cut"]]),
        ("B1 B~ B~ S~", [*4 * ["cut"]]),
        ("B1 enterX S~", ["cut", "succeeded", "cut"]),
        ("B~ S1", [*2 * ["cut"]]),
        ("B~ S1 S2", [*2 * ["cut"], "succeeded"]),
        ("B1 B2 B~ S2 S1", [*2 * ["cut"]]),
        # It may be the next attempt of a request that was left, or of one that follows.
        ("B1 septS2 S~ S1", ["cut", "succeeded", "cut"]),
        ("B1 septS2 S~ S3", ["cut", "succeeded", "cut", "succeeded"]),
        ("S1 S~ S2", [*3 * ["succeeded"]]),
        ("B~ septS1 S1", ["cut", "succeeded", "cut"]),
        ("B1 B~ septS1 S1", ["cut", "cut", "succeeded"]),
        # Nothing is open.
        ("B1 S1 S~ B2 S2", ["succeeded", "succeeded", "succeeded"]),
        # Of another leaf, or of another thread.
        ("B1 septS~ S1 septS2", ["succeeded", "succeeded", "succeeded"]),
        ("B1 2/S~ S1 2/S2", ["succeeded", "succeeded", "succeeded"]),
    ],
)
def test_a_call_that_names_no_request_cuts_those_that_it_may_belong_to(
    text: str, expected: list[str]
) -> None:
    result = chains_of(story(text)).sort("start_ns", "first_seq")
    assert result["outcome"].to_list()[: len(expected)] == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # TDH.VP.FLUSH and TDH.PHYMEM.CACHE.WB come by IPI on top of whatever runs.
        ("flushK*9! B1 flushS*9!", ["2 succeeded", "1 cut by trace_end"]),
        ("B1 flushS*9! S1", ["2 succeeded", "1 succeeded"]),
        ("B1 2/flushS*9! S1", ["2 succeeded", "1 succeeded"]),
        ("cachewbI! 2/cachewbI! 3/cachewbS!", ["3 succeeded"]),
        ("cachewbI@1! cachewbS@2!", ["1 cut by trace_end", "1 succeeded"]),
    ],
)
def test_calls_made_by_ipi_belong_to_their_cpu(text: str, expected: list[str]) -> None:
    assert ends(text) == expected


def test_ipi_leaves_go_by_cpu_also_without_flags() -> None:
    calls = without(story("cachewbI 2/cachewbI 3/cachewbS").seamcalls, "in_irq")
    assert identities(calls) == [("request", 3)]


def test_the_idle_task_is_one_of_each_cpu() -> None:
    calls = without(
        story("0/wbinvdK1@1 0/wbinvdK1@2 0/wbinvdS1@1 0/wbinvdS1@2").seamcalls, "in_irq"
    )
    assert identities(calls) == [("request", 2), ("request", 2)]


def test_a_leaf_that_a_thread_issued_itself_goes_by_thread() -> None:
    assert ends("flushK*9 2/B1 flushS*9 2/S1") == ["2 succeeded", "2 succeeded"]


def test_the_td_is_filled_in_where_the_thread_or_its_process_used_one_only() -> None:
    scenario = story("S1 enterX 2/enterX 3/enterX", {1: 10, 2: 10, 3: 11})
    tds = dict(chains_of(scenario).filter(leaf=0).select("tid", "td_id").rows())
    assert tds == {1: 0x7D000, 2: 0x7D000, 3: None}
    two = story("S1#1 S1#2 enterX")
    assert chains_of(two).filter(leaf=0)["td_id"].to_list() == [None]


def test_time_orders_calls_and_not_the_place_in_the_file() -> None:
    """perf script may print what each CPU recorded one after the other."""
    scenario = story("B1@1 B1@2 S1@1")
    by_cpu = scenario.seamcalls.with_columns(seq=pl.Series([2, 6, 4], dtype=pl.UInt64))
    chains = RETRY_CHAINS.check(retry_chains(by_cpu, scenario.losses))
    assert chains.select("first_seq", "last_seq", "n_attempts", "outcome").rows() == [
        (2, 4, 3, "succeeded"),
    ]


@pytest.mark.parametrize("known", [0, 1, 2])
def test_one_call_with_a_process_names_that_of_the_chain(known: int) -> None:
    scenario = story("B1 B1 S1")
    scenario.calls[known]["tgid"] = 40
    assert chains_of(scenario)["tgid"].to_list() == [40]


def test_a_reused_thread_id_is_another_thread() -> None:
    scenario = story("B1 enterB S1 enterX", {1: 40})
    scenario.calls[2]["tgid"] = scenario.calls[3]["tgid"] = 50
    rows = chains_of(scenario).select("leaf", "tgid", "n_attempts").rows()
    assert rows == [(6, 40, 1), (0, 40, 1), (6, 50, 1), (0, 50, 1)]


@pytest.mark.parametrize("unknown", [(), (0,), (2,), (0, 1, 2, 3)])
def test_busy_answers_are_those_of_the_chains_whatever_is_known_of_processes(
    unknown: tuple[int, ...],
) -> None:
    scenario = story("B1 S1 B1 B1 S2", {1: 40})
    scenario.calls[2]["tgid"] = scenario.calls[3]["tgid"] = scenario.calls[4]["tgid"] = 50
    for row in unknown:
        scenario.calls[row]["tgid"] = None
    chains = chains_of(scenario)
    assert busy_answers(scenario.seamcalls, chains).height == chains["n_busy"].sum()


def test_sources_are_kept_apart() -> None:
    scenario = story("B1 B1 S1")
    calls = scenario.seamcalls
    other = calls.with_columns(source=pl.lit(1, pl.UInt16))
    both = pl.concat([calls.head(2), other.tail(1)])
    rows = retry_chains(both, scenario.losses).select("source", "n_attempts", "outcome").rows()
    assert rows == [(0, 2, "cut"), (1, 1, "succeeded")]


def test_a_loss_of_one_source_does_not_cut_another() -> None:
    scenario = story("B lost S")
    losses = scenario.losses.with_columns(source=pl.lit(1, pl.UInt16))
    assert retry_chains(scenario.seamcalls, losses)["n_attempts"].to_list() == [2]


def test_columns_that_are_missing_are_named() -> None:
    scenario = story("S")
    with pytest.raises(TableError, match="column 'gpa' is missing"):
        retry_chains(scenario.seamcalls.drop("gpa"), scenario.losses)


# Laws.

few = settings(max_examples=25)
calls = st.builds(
    "{}{}{}{}{}{}".format,
    st.sampled_from(["", "2/", "3/"]),
    st.sampled_from(["", "", "", "sept", "block", "track", "enter", "cachewb"]),
    st.sampled_from("BBBSSENK"),
    st.sampled_from(["1", "2"]),
    st.sampled_from(["", "", "@1", "@2", "@1>2", "~", "!"]),
    st.sampled_from(["", "", "#1"]),
)
unreturned = st.builds("{}U{}".format, st.sampled_from(["", "2/", "block"]), st.sampled_from("12"))
losses = st.sampled_from(["lost@1", "lost@2", "lost", "overwritten@1", "full@2"])
pauses = st.sampled_from(["_", "_5s"])
seen = st.one_of(calls, calls, calls, calls, unreturned, pauses)
whole_stories = st.lists(seen, max_size=40).map(" ".join)
stories = st.lists(st.one_of(seen, seen, seen, losses), max_size=40).map(" ".join)


@few
@given(stories)
def test_every_call_is_in_one_chain(text: str) -> None:
    scenario = story(text)
    chains = chains_of(scenario)
    calls = scenario.seamcalls
    assert chains["n_attempts"].sum() == calls.height
    assert chains["n_busy"].sum() <= calls["status"].is_not_null().sum()
    seqs = set(calls["seq"])
    assert set(chains["first_seq"]) <= seqs
    assert set(chains["last_seq"]) <= seqs
    assert chains["last_seq"].is_unique().all()


@few
@given(stories, st.integers(0, 99))
def test_the_order_of_rows_does_not_matter(text: str, seed: int) -> None:
    scenario = story(text)
    shuffled = scenario.seamcalls.sample(fraction=1, shuffle=True, seed=seed)
    assert retry_chains(shuffled, scenario.losses).equals(chains_of(scenario))


@few
@given(stories, st.integers(-(10**9), 10**15))
def test_shifting_all_times_shifts_only_times(text: str, shift: int) -> None:
    scenario = story(text)
    moved = pl.col("start_ns", "end_ns") + shift
    later = retry_chains(
        scenario.seamcalls.with_columns(moved), scenario.losses.with_columns(moved)
    )
    assert later.equals(chains_of(scenario).with_columns(moved))


@few
@given(whole_stories, st.integers(0, 99))
def test_equal_timestamps_are_ordered_by_line(text: str, seed: int) -> None:
    """A clock of jiffies, or one that counts, gives many calls one time."""
    scenario = story(text)
    still = pl.col("start_ns", "end_ns") // 10**15
    shuffled = scenario.seamcalls.with_columns(still).sample(fraction=1, shuffle=True, seed=seed)
    chains = retry_chains(shuffled, scenario.losses)
    timeless = ["first_seq", "last_seq", "tid", "leaf", "gpa", "n_attempts", "n_busy", "n_segments"]
    assert chains.select(timeless).equals(chains_of(scenario).select(timeless))


@few
@given(stories)
def test_renaming_tds_renames_tds(text: str) -> None:
    scenario = story(text)
    renamed = pl.col("td_id") * 3 + 5
    chains = retry_chains(scenario.seamcalls.with_columns(renamed), scenario.losses)
    assert chains.equals(chains_of(scenario).with_columns(renamed))


@few
@given(stories)
def test_renaming_threads_renames_threads(text: str) -> None:
    scenario = story(text)
    renamed = (10 - pl.col("tid")).alias("tid")
    chains = retry_chains(scenario.seamcalls.with_columns(renamed), scenario.losses)
    assert chains.equals(chains_of(scenario).with_columns(renamed))


@few
@given(
    st.lists(
        st.tuples(
            # Calls with arguments show that those without have lost them.
            (seen | losses).filter(lambda w: "~" not in w),
            calls.filter(lambda w: not set(w) & set("~!c")),
        ),
        max_size=30,
    )
)
def test_calls_of_another_td_and_thread_change_at_most_the_certainty(
    mixed: list[tuple[str, str]],
) -> None:
    """They may show that requests are left for others in between: near a loss more are cut."""
    foreign = [f"9/{word.rpartition('/')[2].partition('#')[0]}#9" for _, word in mixed]
    words = [word for pair in zip((w for w, _ in mixed), foreign, strict=True) for word in pair]
    scenario = story(" ".join(words))
    alone = scenario.seamcalls.filter(pl.col("tid") != 9)
    with_others = chains_of(scenario).filter(pl.col("tid") != 9)
    expected = RETRY_CHAINS.check(retry_chains(alone, scenario.losses))
    key = ("first_seq", "last_seq", "n_attempts", "leaf", "td_id")
    assert with_others.select(key).equals(expected.select(key))
    assert (with_others["begin_lost"] >= expected["begin_lost"]).all()
    trusted = with_others["outcome"] != "cut"
    assert (
        with_others.drop("begin_lost")
        .filter(trusted)
        .equals(expected.drop("begin_lost").filter(trusted))
    )


@few
@given(stories)
def test_a_chain_that_is_not_cut_would_be_there_without_any_loss(text: str) -> None:
    """Losses only ever take away trust: they make no chain that was not there."""
    scenario = story(text)
    key = ("first_seq", "last_seq", "n_attempts", "leaf")
    trusted = chains_of(scenario).filter(pl.col("outcome") != "cut").select(key)
    all_there = retry_chains(scenario.seamcalls, scenario.losses.clear()).select(key)
    assert trusted.join(all_there, on=key, how="anti").is_empty()


@few
@given(whole_stories, st.integers(1, 30))
def test_losing_the_beginning_never_makes_a_wrong_chain(text: str, n: int) -> None:
    """Cut off the first calls, say so: what is not marked must be what really happened."""
    scenario = story(text)
    whole = chains_of(scenario)
    calls = scenario.seamcalls
    kept = calls.tail(max(calls.height - n, 0))
    if kept.is_empty() or kept.height == calls.height:
        return
    start = story("midway S").losses.with_columns(
        pl.lit(kept.select(pl.coalesce("start_ns", "end_ns").min()).item(), pl.Int64).alias(
            "end_ns"
        )
    )
    key = ["last_seq", "leaf", "n_attempts", "final_status"]
    trusted = retry_chains(kept, start).filter(pl.col("outcome").is_in(["succeeded", "failed"]))
    assert trusted.join(whole, on=key, how="anti", nulls_equal=True).is_empty()


def test_empty_input_gives_an_empty_table() -> None:
    nothing = story("")
    chains = retry_chains(nothing.seamcalls, nothing.losses)
    assert chains.is_empty()
    assert chains.schema == RETRY_CHAINS.schema
