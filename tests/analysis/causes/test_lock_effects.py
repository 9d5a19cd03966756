"""Effects of a lock: ``lock_values`` and ``entry_waits``."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.story import Story, story

from tdxtrace.analysis.causes.busy_causes import busy_causes
from tdxtrace.analysis.causes.conflicts import mask_of
from tdxtrace.analysis.causes.evidence import gather_evidence
from tdxtrace.analysis.causes.lock_effects import entry_waits, lock_values, queue_waits
from tdxtrace.analysis.retry_chains import retry_chains
from tdxtrace.tables.causes import ENTRY_WAITS, LOCK_VALUES

BEFORE = "9/enterH 9/S5 8/blockS7 8/removeS7"


def values(text: str, generation: str = "B") -> dict[tuple[str, int], dict[str, Any]]:
    scenario = story(f"{BEFORE} {text}")
    sources = list(gather_evidence(scenario.trace, mask=mask_of(generation)))
    chains = retry_chains(scenario.seamcalls, scenario.losses)
    table = LOCK_VALUES.check(lock_values(sources, busy_causes(sources), chains))
    return {(row["lock"], row["leaf"]): row for row in table.iter_rows(named=True)}


@pytest.mark.parametrize(
    ("text", "generation", "leaf", "by_seamcall_lock", "by_mmu_lock"),
    [
        ("2/block( B1 2/)S", "B", 6, 1, 1),  # a fault and a zap: both locks keep them apart
        ("2/(3 B1 2/)S", "A", 6, 1, 0),  # two faults share mmu_lock
        ("2/enter( removeK1 2/)H", "B", 29, 0, 0),  # a guest takes no lock of the host
    ],
)
def test_a_lock_removes_conflicts_that_it_serialises(
    text: str, generation: str, leaf: int, by_seamcall_lock: int, by_mmu_lock: int
) -> None:
    found = values(text, generation)
    assert found["seamcall_lock", leaf]["n_removed"] == by_seamcall_lock
    assert found["mmu_lock", leaf]["n_removed"] == by_mmu_lock
    for lock in ("seamcall_lock", "mmu_lock"):
        row = found[lock, leaf]
        assert row["n_busy"] == 1
        assert row["n_removed"] + row["n_kept"] == 1


def test_unexplained_answers_bound_the_number_of_removed_answers() -> None:
    row = values("B1")["mmu_lock", 6]
    assert (row["n_busy"], row["n_removed"], row["n_kept"], row["n_unknown"]) == (1, 0, 0, 1)


def test_a_request_waits_for_the_call_before_it() -> None:
    # The zap is at work from 0 to 30 us; the fault came at 10 us and has to wait for it.
    found = values("2/block(1 B1 2/)S S1")
    for lock in ("seamcall_lock", "mmu_lock"):
        assert found[lock, 6]["waited_ns"] == 20_000
        assert found[lock, 6]["max_wait_ns"] == 20_000
        assert found[lock, 7]["waited_ns"] == 0


queue = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.booleans()), max_size=9)


@given(queue)
def test_the_queue_is_served_in_order(steps: list[tuple[int, int, bool]]) -> None:
    arrival = np.cumsum([step[0] for step in steps]).astype(np.int64)
    service = np.array([step[1] for step in steps], np.int64)
    writes = np.array([step[2] for step in steps], np.bool_)
    all_done = writers_done = -1
    expected = []
    for at, lasts, alone in zip(arrival, service, writes, strict=True):
        begins = max(at, all_done if alone else writers_done)
        expected.append(begins - at)
        all_done = max(all_done, begins + lasts)
        writers_done = begins + lasts if alone else writers_done
    assert queue_waits(arrival, service, writes).tolist() == expected


# Refused entries.

SEVEN_FAULTS = "2/enterH " + "2/enterX " * 7


def waits(text: str) -> dict[str, Any]:
    scenario: Story = story(f"{BEFORE} {SEVEN_FAULTS} {text}")
    table = ENTRY_WAITS.check(entry_waits(gather_evidence(scenario.trace, mask=mask_of("B"))))
    (row,) = table.to_dicts()
    return row


def test_one_wait_for_the_zap_in_flight_would_have_sufficed() -> None:
    row = waits("3/block(1 2/enterB 2/enterB 2/enterB 3/)S 2/enterH")
    assert (row["n_refused"], row["n_holders"], row["n_after"]) == (3, 1, 0)
    assert (row["waits_for_all"], row["sufficed"]) == (True, True)
    assert row["wait_ns"] == 60_000
    assert row["entered_ns"] is not None


def test_one_wait_is_not_enough_if_another_zap_follows() -> None:
    row = waits("3/block(1 2/enterB 3/)S 3/block(2 2/enterB 3/)S 2/enterH")
    assert (row["n_refused"], row["n_after"], row["sufficed"]) == (2, 1, False)


def test_without_a_known_holder_the_wait_is_null() -> None:
    row = waits("2/enterB 2/enterH")
    assert (row["n_holders"], row["wait_ns"], row["sufficed"]) == (0, None, None)


def test_no_busy_attempts_give_an_empty_table() -> None:
    scenario = story("S1 S2")
    assert entry_waits(gather_evidence(scenario.trace)).is_empty()
    assert isinstance(entry_waits([]), pl.DataFrame)
