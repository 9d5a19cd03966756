"""Policies replayed on small scenarios."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from support.story import Story, story, without

from tdxtrace.analysis.busy_answers import busy_answers
from tdxtrace.analysis.retry_chains import retry_chains
from tdxtrace.compiler import compiled
from tdxtrace.errors import InputError, QueryError, TableError
from tdxtrace.intervals import interval_of_sum
from tdxtrace.recommend import stops
from tdxtrace.recommend.policy_definitions import (
    ANY_LEAF,
    DEFAULTS,
    DoublingLimit,
    LeafPolicy,
    policy_named,
)
from tdxtrace.recommend.policy_file import read_policies
from tdxtrace.recommend.replay import policies
from tdxtrace.tables.findings import RETRY_CHAINS
from tdxtrace.tables.limits import BUSY_ANSWERS, POLICIES
from tdxtrace.tdx.leaves import leaf_table


def replay(scenario: Story, *names: str, calls: pl.DataFrame | None = None) -> pl.DataFrame:
    calls = scenario.seamcalls if calls is None else calls
    chains = retry_chains(calls, scenario.losses)
    chosen = [policy_named(name) for name in names] or None
    return POLICIES.check(policies(chains, busy_answers(calls, chains), chosen))


def row_of(text: str, name: str, leaf: int = 6) -> dict[str, Any]:
    return replay(story(text), name).row(by_predicate=pl.col("leaf") == leaf, named=True)


@pytest.mark.parametrize(("calls", "exceeding"), [(1, 2), (2, 2), (3, 1), (4, 0)])
def test_a_request_exceeds_a_limit_if_it_needs_more_calls(calls: int, exceeding: int) -> None:
    row = row_of("S1 B2 B2 S2 B3 B3 B3 S3", f"fixed-{calls}")
    assert (row["n_requests"], row["n_retried"]) == (3, 2)
    assert row["n_exceeding"] == exceeding
    assert row["exceeding_low"] <= exceeding / 3 <= row["exceeding_high"]
    assert row["exceeding_ratio"] in (None, pytest.approx(exceeding / 3))


def test_a_request_that_was_cut_before_the_limit_is_undecided_and_after_it_is_not() -> None:
    text = "S1 " * 20 + "2/B2 2/B2 2/B2"
    before, after = row_of(text, "fixed-5"), row_of(text, "fixed-3")
    assert (before["n_exceeding"], before["n_undecided"]) == (0, 1)
    assert (after["n_exceeding"], after["n_undecided"]) == (1, 0)
    assert before["exceeding_low"] == 0.0
    assert (
        before["exceeding_high"]
        > row_of("S1 " * 20 + "2/B2 2/B2 2/S2", "fixed-6")["exceeding_high"]
    )
    assert "1 request ended unobserved" in before["not_known"]
    assert "ended unobserved" not in after["not_known"]


def test_an_error_is_an_answer_and_ends_the_retrying() -> None:
    row = row_of("B1 E1 S2", "fixed-2")
    assert (row["n_exceeding"], row["n_undecided"]) == (0, 0)


def test_v1_makes_seventeen_calls_and_only_after_busy_sept() -> None:
    assert row_of("B1 " * 16 + "S1", "v1-series")["n_exceeding"] == 0
    assert row_of("B1 " * 17 + "S1", "v1-series")["n_exceeding"] == 1
    entry = row_of("B1 K1 S1", "v1-series")
    assert (entry["n_exceeding"], entry["n_bugs"]) == (1, 1)


def test_v1_comes_again_for_a_fault_and_dies_of_a_block() -> None:
    fault, block = (
        row_of("B1 " * 20 + "S1", "v1-series"),
        row_of("blockB1 " * 20 + "blockS1", "v1-series", 7),
    )
    assert (fault["then"], fault["n_bugs"], fault["n_vms_killed"]) == ("again", 0, 0)
    assert (block["then"], block["n_bugs"], block["n_vms_killed"]) == ("kill", 1, 1)


@pytest.mark.parametrize(("leaf", "number"), [("block", 7), ("track", 38), ("remove", 29)])
def test_mainline_makes_two_calls_with_a_kick_between(leaf: str, number: int) -> None:
    one = row_of(f"{leaf}B1 {leaf}S1", "mainline", number)
    assert (one["kicks"], one["calls"], one["n_vms_killed"]) == (True, 2, 0)
    assert (one["n_undecided"], one["exceeding_ratio"]) == (0, 0.0)


@pytest.mark.parametrize(("leaf", "number"), [("block", 7), ("track", 38), ("remove", 29)])
def test_the_answer_after_a_kick_is_unknown_for_a_policy_without_kicks(
    leaf: str, number: int
) -> None:
    row = row_of(f"{leaf}B1 {leaf}B1 {leaf}S1 " + f"{leaf}S2 " * 8, "mainline", number)
    assert (row["n_exceeding"], row["n_bugs"], row["n_vms_killed"]) == (0, 0, 0)
    assert (row["n_undecided"], row["exceeding_ratio"], row["exceeding_low"]) == (1, None, 0.0)
    assert row["exceeding_high"] > 1 / 9
    assert (
        "1 request undecided: busy at the call that this policy makes after a kick"
        in row["not_known"]
    )
    assert row["waited_ns"] == 30_000


def test_an_answer_that_mainline_does_not_retry_needs_no_kick_to_be_fatal() -> None:
    row = row_of("trackP trackS", "mainline", 38)
    assert (row["n_exceeding"], row["n_bugs"], row["n_undecided"]) == (1, 1, 0)


@pytest.mark.parametrize("leaf", ["block", "remove"])
def test_a_recording_that_may_have_kicks_says_nothing_of_a_policy_without(leaf: str) -> None:
    number = {"block": 7, "remove": 29}[leaf]
    kicked = f"{leaf}B1 {leaf}S1 {leaf}S2 {leaf}S3"
    row = row_of(kicked, "fixed-5", number)
    assert (row["n_exceeding"], row["n_undecided"], row["exceeding_ratio"]) == (0, 1, None)
    assert "the recorded kernel may have kicked the vCPUs" in row["not_known"]
    once = row_of(kicked, "fixed-1", number)
    assert (once["n_exceeding"], once["n_undecided"]) == (1, 0)
    never = row_of(kicked, "endless", number)
    assert (never["n_exceeding"], never["n_undecided"]) == (0, 0)


def test_a_third_call_shows_that_the_recorded_kernel_does_not_kick() -> None:
    row = row_of("blockB1 blockS1 blockB2 blockB2 blockS2", "fixed-5", 7)
    assert (row["n_undecided"], row["exceeding_ratio"]) == (0, 0.0)
    faults = row_of("B1 S1 B2 S2", "fixed-5")
    assert (faults["n_undecided"], faults["exceeding_ratio"]) == (0, 0.0)


def test_calls_made_at_once_are_more_in_the_same_time() -> None:
    # Each call takes 10 us, and the recorded ones begin every 20 us: the third ends after 50 us.
    text = "B1 B1 B1 S1 S2"
    row = row_of(text, "fixed-5")
    assert (row["n_exceeding"], row["n_undecided"], row["exceeding_ratio"]) == (0, 1, None)
    assert row["exceeding_high"] > 0.5
    assert "1 request undecided: busy for as long as the calls of this policy" in row["not_known"]
    assert row_of(text, "fixed-6")["n_undecided"] == 0
    assert row_of(text, "fixed-3")["n_undecided"] == 0
    assert row_of(text, "budget-1ms")["n_undecided"] == 0
    assert row_of(text, "endless")["n_undecided"] == 0
    # KVM enters again by way of vcpu_run, whatever the policy.
    assert row_of("enterB enterB enterB enterX", "fixed-5", 0)["n_undecided"] == 0


def test_what_follows_a_request_that_was_given_up_may_differ() -> None:
    row = row_of("K1 S1 K2 S2 S1 _ K3 S3", "fixed-1")
    # Page 2 met the guest while the policy had left page 1 reserved for the host, page 3 while
    # it had left page 2.
    assert (row["n_exceeding"], row["n_dependent"], row["exceeding_ratio"]) == (3, 2, None)
    assert (
        "2 requests counted might not have been busy, so the share may be lower" in row["not_known"]
    )
    alone = row_of("K1 S1 S2 S3 S4", "fixed-1")
    assert (alone["n_exceeding"], alone["n_dependent"]) == (1, 0)
    assert alone["exceeding_ratio"] == 0.25
    assert row["exceeding_low"] <= 1 / 7 < 3 / 7 <= row["exceeding_high"]


def test_a_request_for_the_same_page_ends_what_giving_up_changes() -> None:
    row = row_of("K1 S1 S1 K2 S2 S2 K3 S3", "fixed-1")
    assert (row["n_exceeding"], row["n_dependent"]) == (3, 0)


def test_giving_up_changes_nothing_for_another_vm() -> None:
    row = row_of("K1#1 S1#1 2/K2#2 2/S2#2", "fixed-1")
    assert (row["n_exceeding"], row["n_dependent"]) == (2, 0)


def test_where_the_recorded_kernel_gave_up_too_nothing_is_different() -> None:
    # No request for page 1 or 2 follows, and the thread goes on: both were given up.
    row = row_of("K1 K2 S3", "fixed-1")
    assert (row["n_exceeding"], row["n_dependent"], row["n_undecided"]) == (2, 0, 0)


def test_a_dead_vm_makes_no_more_requests_of_any_leaf() -> None:
    text = "blockB1 " * 17 + "blockS1 " + "B2 " * 17 + "S2 S3 " + "2/B7#2 " * 17 + "2/S7#2"
    rows = {row["leaf"]: row for row in replay(story(text), "v1-series").iter_rows(named=True)}
    assert (rows[7]["n_bugs"], rows[7]["n_vms_killed"], rows[7]["n_undecided"]) == (1, 1, 0)
    assert (rows[6]["n_exceeding"], rows[6]["n_undecided"]) == (1, 2)
    assert (
        "2 requests undecided: recorded after this policy had killed the VM" in rows[6]["not_known"]
    )


def test_mainline_retries_faults_and_entries_without_limit_only() -> None:
    scenario = story("B1 " * 40 + "S1 " + "enterB " * 40 + "enterX " + "N2 N2 S2 Y3 S3")
    rows = {row["leaf"]: row for row in replay(scenario, "mainline").iter_rows(named=True)}
    assert (rows[0]["calls"], rows[0]["n_exceeding"]) == (None, 0)
    # RND_NO_ENTROPY is repeated below every wrapper; SYS_BUSY is not looked for.
    assert (rows[6]["n_exceeding"], rows[6]["n_bugs"]) == (1, 1)


def test_leaves_that_share_no_vm_do_not_affect_each_other() -> None:
    busy = "B1 B1 B1 S1 enterD enterD enterD enterC"
    quiet = "2/trackS 2/trackS 2/trackS"
    both = replay(story(f"{busy} {quiet}"))
    alone = pl.concat([replay(story(busy)), replay(story(quiet))])
    shown = ["policy", "leaf"]
    assert both.sort(shown).drop("not_known").equals(alone.sort(shown).drop("not_known"))
    entries = both.filter(policy="fixed-5", leaf=0).row(0, named=True)
    assert entries["waited_ns"] > 0


def test_a_leaf_that_was_never_busy_is_bounded_by_its_number() -> None:
    row = row_of("trackS trackS trackS", "fixed-5", 38)
    assert (row["n_exceeding"], row["n_undecided"], row["n_vms_killed"]) == (0, 0, 0)
    assert (row["exceeding_ratio"], row["exceeding_low"]) == (0, 0)
    # As many again may show some: twice the rule of three, up to whole requests.
    assert row["exceeding_high"] == 1
    many = row_of("trackS " * 100, "fixed-5", 38)
    assert many["exceeding_high"] == math.ceil(100 * (1 - 0.025 ** (1 / 50))) / 100
    assert (row["waited_ns"], row["n_entries_left"], row["raised"]) == (0, 0, None)


def test_endless_never_exceeds_and_leaves_nothing_undecided() -> None:
    row = row_of("B1 B1 S2 3/B3", "endless")
    assert (row["n_exceeding"], row["n_undecided"], row["calls"]) == (0, 0, None)


def test_a_request_without_an_answer_is_undecided() -> None:
    row = row_of("B1 S1 S2 3/U3 4/U4", "fixed-1")
    assert (row["n_exceeding"], row["n_undecided"], row["exceeding_ratio"]) == (1, 2, None)
    assert "undecided: no answer was recorded" in row["not_known"]
    assert row_of("B1 S1 S2 3/U3 4/U4", "endless")["n_undecided"] == 0


def test_a_budget_ends_at_the_first_busy_answer_after_it() -> None:
    # Busy answers return after 10, 30 and 50 us.
    text = "B1 B1 B1 S1"
    assert row_of(text, "budget-50us")["n_exceeding"] == 0
    row = row_of(text, "budget-29us")
    assert (row["n_exceeding"], row["waited_ns"]) == (1, 30_000)


def test_time_is_spent_until_done_or_stopped() -> None:
    text = "S1 B2 B2 B2 S2 B3 S3"
    assert row_of(text, "endless")["waited_ns"] == 60_000
    row = row_of(text, "fixed-2")
    assert row["waited_ns"] == 40_000
    assert row["waited_low_ns"] <= 40_000 <= row["waited_high_ns"]


def test_vms_are_counted_once_by_td_or_process_and_unknown_where_neither_is_seen() -> None:
    parts = [(1, 1), (2, 1), (1, 2)]
    text = " ".join(f"blockB{p}#{td} " * 17 + f"blockS{p}#{td}" for p, td in parts)
    scenario = story(text)
    assert replay(scenario, "v1-series").select("n_bugs", "n_vms_killed").row(0) == (2, 2)
    blind = without(scenario.seamcalls, "td_id")
    assert replay(scenario, "v1-series", calls=blind)["n_vms_killed"].to_list() == [None]
    of_process = blind.with_columns(tgid=pl.lit(77, pl.Int32))
    assert replay(scenario, "v1-series", calls=of_process)["n_vms_killed"].to_list() == [1]


def test_entries_are_left_with_host_priority_where_the_caller_gives_up_on_the_entry() -> None:
    # K: the SEPT entry itself, whose bit stays set; B: the tree.
    assert row_of("K1 K1 K1 S1 K2 K2 K2 S2 B3 B3 B3 S3", "fixed-2")["n_entries_left"] == 2
    assert row_of("K1 K1 K1 S1", "mainline")["n_entries_left"] == 0
    assert row_of("K1 K1 K1 S1", "endless")["n_entries_left"] == 0


def test_policies_have_a_row_for_each_leaf_they_rule() -> None:
    rows = replay(story("B1 S1 trackB trackS"))
    assert rows["policy"].unique(maintain_order=True).to_list() == list(DEFAULTS)
    seed = rows.filter(pl.col("policy") == "seed-loop")
    assert seed["leaf"].to_list() == [6]


@settings(max_examples=30)
@given(st.lists(st.integers(0, 8), min_size=1, max_size=25), st.integers(1, 9))
def test_fixed_limits_equal_a_direct_count(n_busy: list[int], calls: int) -> None:
    text = " ".join(f"B{p} " * n + f"S{p}" for p, n in enumerate(n_busy, 1))
    row = row_of(text, f"fixed-{calls}")
    assert row["n_exceeding"] == sum(n + 1 > calls for n in n_busy)
    assert row["n_retried"] == sum(n > 0 for n in n_busy)
    assert row["waited_ns"] == sum(
        (2 * min(n, calls) - 1) * 10_000 for n in n_busy if min(n, calls)
    )


@settings(max_examples=15)
@given(st.lists(st.integers(0, 8), min_size=1, max_size=25))
def test_a_larger_limit_exceeds_no_more_and_takes_no_less_time(n_busy: list[int]) -> None:
    text = " ".join(f"B{p} " * n + f"S{p}" for p, n in enumerate(n_busy, 1))
    rows = replay(story(text), *(f"fixed-{n}" for n in range(1, 10)))
    assert rows["n_exceeding"].is_sorted(descending=True)
    assert rows["waited_ns"].is_sorted()


def test_a_few_lone_requests_have_the_exact_interval_of_half_as_many() -> None:
    text = " ".join("B1 S1" if n % 50 == 25 else "S1" for n in range(1500))
    row = row_of(text, "fixed-1")
    exact = stats.binomtest(15, 750).proportion_ci(0.95)
    assert row["exceeding_low"] == pytest.approx(exact.low, rel=0.1)
    assert row["exceeding_high"] == pytest.approx(exact.high, rel=0.1)


def test_empty_input_gives_an_empty_table() -> None:
    assert policies(RETRY_CHAINS.empty(), BUSY_ANSWERS.empty()).equals(POLICIES.empty())


def test_columns_that_are_missing_are_named() -> None:
    with pytest.raises(TableError, match="waited_ns"):
        policies(RETRY_CHAINS.empty(), BUSY_ANSWERS.empty().drop("waited_ns"))


def test_the_loops_of_the_replay_do_the_same_when_they_are_compiled() -> None:
    scenario = story("B1 B1 K1 S1 B2 N2 S2 blockB3 blockS3 trackP trackS B4 B4 B4 B4 E4")
    names = ("fixed-2", "mainline", "v1-series")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stops, "choose", lambda _: compiled)
        of_machine = replay(scenario, *names)
    assert of_machine.equals(replay(scenario, *names))


def test_answers_that_lack_some_of_their_requests_are_refused() -> None:
    scenario = story("B1 B1 S1 B2 S2")
    chains = retry_chains(scenario.seamcalls, scenario.losses)
    answers = busy_answers(scenario.seamcalls, chains)
    with pytest.raises(TableError, match="3 busy answers, busy_answers has 2 for these chains"):
        policies(chains, answers[1:])
    # Answers of other chains do no harm.
    assert not policies(chains[1:], answers).is_empty()


def test_another_run_may_show_none_where_a_few_were_seen() -> None:
    row = row_of("B1 S1 " + "S2 " * 200, "fixed-1")
    assert (row["n_exceeding"], row["exceeding_low"]) == (1, 0.0)


# Resampling.


def test_the_interval_of_a_sum_is_reproducible_and_of_nominal_width() -> None:
    import numpy as np

    parts = np.full(400, 5.0)
    low, high = interval_of_sum(parts, 0.95)
    assert interval_of_sum(parts, 0.95) == (low, high)
    # A Poisson number of 400: its standard deviation is 20.
    assert (low, high) == pytest.approx((2000 - 1.96 * 100, 2000 + 1.96 * 100), rel=0.02)
    many = interval_of_sum(np.full(40_000, 0.05), 0.95)
    assert many == pytest.approx((2000 - 19.6, 2000 + 19.6), rel=0.002)
    assert interval_of_sum(np.array([]), 0.95) == (0.0, 0.0)


# Names, and policies of one's own.


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("mainlin", "mainline"),
        ("seedloop", "seed-loop"),
        ("fixed-0", "fixed-N"),
        ("fixed-99999999999", "fixed-N"),
        ("v2-series", "v1-series"),
    ],
)
def test_an_unknown_policy_is_answered_with_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(QueryError, match=f"no policy '{name}'; nearest: {nearest};"):
        policy_named(name)


def test_every_leaf_that_a_known_policy_names_exists() -> None:
    known = {*leaf_table()["name"], ANY_LEAF}
    for name in ("seed-loop", "v1-series", "mainline", "endless"):
        assert set(policy_named(name).rules) <= known


def written(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text)
    return path


def test_a_file_defines_policies_with_all_keys(tmp_path: Path) -> None:
    text = """
        [policy.patient]
        calls = 40
        budget = "2ms"
        answers = "sept"
        then = "again"
        otherwise = "return"
        kicks = true
        leaves = ["tdh_mem_page_aug", "TDH.MEM.TRACK"]
        source = "me"
        [policy.loop]
        initial = 8
        """
    found = read_policies(written(tmp_path, text))
    rule = LeafPolicy(40, 2_000_000, "sept", "again", "return", True)
    assert found["patient"].rules == {"TDH.MEM.PAGE.AUG": rule, "TDH.MEM.TRACK": rule}
    assert found["patient"].source == "me"
    assert found["loop"].rules == {ANY_LEAF: LeafPolicy(doubling=DoublingLimit(initial=8))}
    assert policy_named("patient", found) is found["patient"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[polcy.x]\ncalls = 1", "unknown word 'polcy'; nearest: policy"),
        ("[policy.x]\ncals = 1", "policy 'x': unknown word 'cals'; nearest: calls"),
        ("[policy.x]\nanswers = 'sep'", "answers cannot be 'sep'; nearest: sept"),
        ("[policy.x]\nthen = 'kil'", "then cannot be 'kil'; nearest: kill"),
        ("[policy.x]\ncalls = 0", "calls must be a whole number from 1"),
        ("[policy.x]\ncalls = true", "calls must be a whole number"),
        ("[policy.x]\ncalls = 1.5", "calls must be a whole number"),
        ("[policy.x]\nfactor = 1", "factor must be a whole number from 2"),
        ("[policy.x]\nbudget = 5", "budget must be a time in quotes"),
        ("[policy.x]\nbudget = '5 minutes'", "policy 'x': not a time: '5 minutes'"),
        ("[policy.x]\nkicks = 'yes'", "kicks must be true or false"),
        ("[policy.x]\nleaves = 'TDH.MEM.TRACK'", "leaves must be a list"),
        ("[policy.x]\nleaves = ['TDH.MEM.TRAK']", "nearest known one is TDH.MEM.TRACK"),
        ("[policy.x]\nleaves = ['9999']", "no leaf has the number 9999"),
        ("[policy.x]\nsource = 1", "source must be text"),
        ("[policy]\nx = 1", r"write \[policy.x\]"),
        ("", r"has no policy; begin one with \[policy.NAME\]"),
        ("policy = 1", "has no policy"),
        ("[policy.x", "is not TOML"),
        (f"[policy.x]\ncalls = {'9' * 5000}", "a number is too long"),
        (f"[policy.x]\nanswers = 0x{'f' * 5000}", "more than 64 bits"),
        ("[policy.x]\ncalls = inf", "a number that is not finite"),
        (f"[policy.x]\nleaves = {'[' * 2000}", "too deep"),
        (f"[policy.x]\nanswers{'.a' * 2000} = 1", "nested more than 8 deep"),
        (f"[policy.x]\nbudget = '{'9' * 400}s'", "not a time: '9{39}…"),
        ("[policy.x]\nbudget = '9999999999s'", "not a time"),
    ],
)
def test_a_mistake_is_reported_in_one_line(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(QueryError, match=said) as error:
        read_policies(written(tmp_path, text))
    assert str(error.value).isprintable()


def test_a_file_that_cannot_be_read_is_an_error_of_the_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read"):
        read_policies(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not UTF-8"):
        read_policies(tmp_path / "bad.toml")
    with pytest.raises(InputError, match="longer than 256 KiB"):
        read_policies(Path("/dev/zero"))


def test_hostile_names_of_policies_are_made_safe(tmp_path: Path) -> None:
    with pytest.raises(QueryError) as error:
        read_policies(written(tmp_path, '[policy."\\u001b[31m"]\ncals = 1'))
    assert str(error.value).isprintable()


def test_times_that_add_up_to_more_than_a_column_holds_end_with_it() -> None:
    """A flipped bit of a page's time makes requests that take 146 years."""
    scenario = story("B1 2/B2 3/B3 B1 2/B2 3/B3 S1 2/S2 3/S3")
    is_late = pl.col("start_ns").rank() > 3
    calls = scenario.seamcalls.with_columns(
        pl.when(is_late).then(pl.col(name) + (1 << 62)).otherwise(name).alias(name)
        for name in ("start_ns", "end_ns")
    )
    row = replay(scenario, "fixed-5", calls=calls).row(0, named=True)
    assert row["waited_ns"] > 1 << 62
    assert row["waited_high_ns"] == (1 << 63) - 1
