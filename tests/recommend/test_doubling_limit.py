"""The doubling limit proposed by mail, replayed on small scenarios."""

from __future__ import annotations

import polars as pl
import pytest
from support.story import Story, story

from tdxtrace.analysis.busy_answers import busy_answers
from tdxtrace.analysis.retry_chains import retry_chains
from tdxtrace.recommend.policy_definitions import (
    SEPT_LEAVES,
    DoublingLimit,
    LeafPolicy,
    RetryPolicy,
    policy_named,
)
from tdxtrace.recommend.replay import policies, replay
from tdxtrace.tables.limits import POLICIES


def answers_of(scenario: Story) -> pl.DataFrame:
    return busy_answers(scenario.seamcalls, retry_chains(scenario.seamcalls, scenario.losses))


def warnings(text: str, doubling: DoublingLimit | None = None) -> list[tuple[int | None, bool]]:
    rows = replay(answers_of(story(text)), doubling or DoublingLimit())
    return rows.sort("seq").select("raised_to", "bug").rows()


def busies(n: int, page: int = 1, thread: int = 1) -> str:
    return f"{thread}/B{page} " * n


def chain(n: int, page: int = 1, thread: int = 1) -> str:
    return busies(n, page, thread) + f"{thread}/S{page} "


def loop(text: str, doubling: DoublingLimit | None = None) -> dict[str, object]:
    scenario = story(text)
    chains = retry_chains(scenario.seamcalls, scenario.losses)
    rule = LeafPolicy(answers="any", then="kill", doubling=doubling or DoublingLimit())
    policy = RetryPolicy("loop", "", dict.fromkeys(SEPT_LEAVES, rule))
    rows = POLICIES.check(policies(chains, busy_answers(scenario.seamcalls, chains), [policy]))
    return rows.row(0, named=True)


def test_fifteen_busy_answers_give_no_warning() -> None:
    row = loop(chain(15))
    assert (row["n_warnings"], row["n_doublings"], row["raised"]) == (0, 0, None)
    assert (row["n_requests"], row["n_retried"]) == (1, 1)


def test_the_sixteenth_busy_answer_warns_and_doubles() -> None:
    assert warnings(chain(16)) == [(32, False)]


def test_forty_busy_answers_warn_at_16_and_32_and_leave_64() -> None:
    assert warnings(chain(40)) == [(32, False), (64, False)]


def test_the_limit_is_never_lowered() -> None:
    assert warnings(chain(40) + "_ " + chain(40, page=2)) == [(32, False), (64, False)]


def test_the_limit_is_shared_by_all_vms() -> None:
    first = "2/B1#1 " * 16 + "2/S1#1 "
    second = "3/B1#2 " * 31 + "3/S1#2 "
    assert warnings(first + second) == [(32, False)]


def test_a_request_that_finds_the_limit_raised_meanwhile_goes_on_to_the_new_one() -> None:
    # Thread 2 has 10 busies when thread 1 raises the limit to 32, so its own 16th is silent.
    text = busies(10, 2, 2) + chain(16, 1, 1) + busies(21, 2, 2) + "2/S2 "
    assert warnings(text) == [(32, False)]
    text = busies(10, 2, 2) + chain(16, 1, 1) + busies(22, 2, 2) + "2/S2 "
    assert warnings(text) == [(32, False), (64, False)]


def test_requests_are_counted_as_retried_once_each() -> None:
    row = loop(chain(3) + chain(5, page=2) + "S3 S4")
    assert (row["n_requests"], row["n_retried"]) == (4, 2)


def test_the_vm_dies_at_the_1024th_busy() -> None:
    text = chain(1023)
    limits = [32, 64, 128, 256, 512, 1024]
    assert warnings(text) == [(limit, False) for limit in limits]
    assert warnings(chain(1024)) == [*((limit, False) for limit in limits), (None, True)]
    row = loop(chain(1024))
    assert (row["n_bugs"], row["n_vms_killed"], row["n_exceeding"]) == (1, 1, 1)
    assert (row["n_warnings"], row["n_doublings"]) == (7, 6)
    assert row["raised"].startswith("32 at 1.0003")  # type: ignore[attr-defined]


def test_the_limit_is_not_raised_at_the_end_so_the_next_vm_dies_too() -> None:
    small = DoublingLimit(initial=4, factor=2, bug=8)
    text = "2/B1#1 " * 9 + "2/S1#1 " + "3/B1#2 " * 7 + "3/S1#2 " + "4/B1#3 " * 8 + "4/S1#3"
    assert warnings(text, small) == [(8, False), (None, True), (None, True)]
    row = loop(text, small)
    assert (row["n_bugs"], row["n_vms_killed"]) == (2, 2)


def test_a_limit_that_skips_the_last_kills_no_vm() -> None:
    assert warnings(chain(60), DoublingLimit(initial=10, factor=2, bug=32)) == [
        (20, False),
        (40, False),
        (80, False),
    ]


def test_a_limit_of_one_is_never_met_for_the_first_busy_is_only_counted() -> None:
    assert warnings(chain(50), DoublingLimit(initial=1)) == []


def test_a_limit_of_two_is_met_at_the_second() -> None:
    assert warnings(chain(2), DoublingLimit(initial=2, factor=3, bug=6)) == [(6, False)]
    assert warnings(chain(1), DoublingLimit(initial=2, factor=3, bug=6)) == []


def test_time_counts_until_the_vm_dies() -> None:
    small = DoublingLimit(initial=2, factor=2, bug=4)
    whole = loop(busies(3) + "S1", small)
    dead = loop(busies(9) + "S1", small)
    # Each call takes 10 us and the next begins 10 us later: the 4th returns 70 us after the first.
    assert whole["waited_ns"] == 50_000
    assert dead["waited_ns"] == 70_000


def test_a_host_that_was_recorded_twice_began_anew_in_between() -> None:
    scenario = story(chain(16))
    answers = answers_of(scenario)
    again = answers.with_columns(source=pl.lit(1, pl.UInt16))
    rows = replay(pl.concat([answers, again]), DoublingLimit())
    assert rows.select("source", "raised_to").rows() == [(0, 32), (1, 32)]


def test_the_loop_goes_around_sept_calls_and_not_around_entries() -> None:
    scenario = story("enterB " * 20 + "enterX " + "trackB " * 20 + "trackS " + chain(20))
    chains = retry_chains(scenario.seamcalls, scenario.losses)
    seed = policies(chains, busy_answers(scenario.seamcalls, chains), [policy_named("seed-loop")])
    found = {row["leaf"]: row for row in seed.iter_rows(named=True)}
    assert set(found) == {0, 6}
    assert (found[0]["n_warnings"], found[6]["n_warnings"]) == (0, 1)


def test_one_limit_serves_all_leaves_of_the_loop() -> None:
    scenario = story(chain(16) + "blockB1 " * 31 + "blockS1")
    chains = retry_chains(scenario.seamcalls, scenario.losses)
    rows = policies(chains, busy_answers(scenario.seamcalls, chains), [policy_named("seed-loop")])
    assert dict(rows.select("leaf", "n_warnings").iter_rows()) == {6: 1, 7: 0}


@pytest.mark.parametrize("n", [16, 17, 31])
def test_one_warning_up_to_the_doubled_limit(n: int) -> None:
    assert warnings(chain(n)) == [(32, False)]
