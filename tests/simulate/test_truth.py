"""The truth tables of the simulator."""

from collections import Counter
from functools import cache
from typing import Any

import polars as pl
import pytest

from tdxtrace.simulate import engine, scenario, truth
from tdxtrace.simulate.engine import Run
from tdxtrace.tables.truth import TRUTH_TABLES


@cache
def _truth(name: str, seed: int = 1, **changes: object) -> dict[str, pl.DataFrame]:
    return _tables(engine.run(scenario.named(name).with_(**changes), seed))


def _tables(run: Run) -> dict[str, pl.DataFrame]:
    rows = truth.rows_of(run)
    return {
        t.name: t.check(pl.DataFrame(rows[t.name], t.schema, orient="row")) for t in TRUTH_TABLES
    }


def _attempt(tables: dict[str, pl.DataFrame], chain: int, attempt: int) -> dict[str, Any]:
    found = tables["truth_attempts"].filter(chain=chain, attempt=attempt)
    return found.row(0, named=True)


# Scenarios in which somebody works on the Secure EPT without mmu_lock.
WITHOUT_MMU_LOCK = {
    "broken_mmu_lock",
    "churn_2mb",
    "churn_without_unblock",
    "zero_step_attack",
}


@pytest.fixture(scope="module", params=scenario.names())
def run(request: pytest.FixtureRequest) -> Run:
    """6 ms of each scenario, for the tests of all of them."""
    return engine.run(scenario.named(request.param).with_(duration_ms=6), 1)


@pytest.fixture(scope="module")
def tables(run: Run) -> dict[str, pl.DataFrame]:
    """Its truth."""
    return _tables(run)


def test_mmu_lock_excludes_unless_somebody_does_not_take_it(
    run: Run, tables: dict[str, pl.DataFrame]
) -> None:
    rules = tables["truth_broken_rules"]
    broken = not rules.filter(rule="mmu_lock_excludes").is_empty()
    assert broken == (run.scenario.name in WITHOUT_MMU_LOCK)


def test_every_call_is_an_attempt_of_a_chain(run: Run, tables: dict[str, pl.DataFrame]) -> None:
    chains, attempts = tables["truth_chains"], tables["truth_attempts"]
    assert chains["n_attempts"].sum() == attempts.height == len(run.journal.calls)
    assert chains["n_busy"].sum() == tables["truth_busy"].height


def test_a_cpu_and_a_thread_make_one_call_at_a_time(run: Run) -> None:
    """That a run is reproducible is the subject of ``test_same_output.py``."""
    assert run.journal.calls
    for owner in ("cpu", "thread"):
        last: dict[object, int] = {}
        for call in sorted(run.journal.calls, key=lambda c: c.start_ns):
            key = getattr(call, owner) if owner == "cpu" or not call.in_irq else object()
            assert owner == "cpu" or call.start_ns >= last.get(key, 0), call.leaf
            last[key] = call.end_ns


def test_a_broken_mmu_lock_names_two_calls_that_overlap() -> None:
    tables = _truth("zero_step_attack", generation="B", duration_ms=6)
    for row in tables["truth_broken_rules"].filter(rule="mmu_lock_excludes").rows(named=True):
        later = _attempt(tables, row["chain"], row["attempt"])
        earlier = _attempt(tables, row["evidence_chain"], row["evidence_attempt"])
        assert earlier["start_ns"] <= later["start_ns"] < earlier["end_ns"]


def test_a_kernel_with_a_broken_lock_is_buggy_and_loses_its_vms() -> None:
    tables = _truth("broken_mmu_lock", duration_ms=6)
    rules = set(tables["truth_broken_rules"]["rule"])
    assert rules >= {"mmu_lock_excludes", "busy_after_kick"}
    host = tables["truth_actors"].filter(pl.col("side") == "host", pl.col("kind") != "main")
    assert set(host["conduct"]) == {"buggy"}
    assert set(tables["truth_actors"].filter(side="guest")["conduct"]) == {"honest"}
    assert not tables["truth_actions"].filter(action="bug").is_empty()


def test_a_timeout_names_the_attempt_that_reserved_the_entry() -> None:
    tables = _truth("host_gives_up")
    rows = tables["truth_broken_rules"].filter(rule="host_priority_timeout")
    assert not rows.is_empty()
    for row in rows.rows(named=True):
        assert row["evidence_leaf"] in ("TDH.MEM.RANGE.BLOCK", "TDH.MEM.PAGE.REMOVE")
        left = _attempt(tables, row["evidence_chain"], row["evidence_attempt"])
        assert left["status"] == 0x8000_0200_0000_0001
        # The module waits at least 10 ms: HP_LOCK_TIMEOUT.
        assert row["ts_ns"] - left["end_ns"] >= 10_000_000


def test_a_holder_is_the_call_that_was_at_work() -> None:
    tables = _truth("balloon", duration_ms=10)
    busy = {(r["chain"], r["attempt"]): r for r in tables["truth_busy"].rows(named=True)}
    held = tables["truth_holders"].filter(~pl.col("is_guest"), pl.col("holder_chain").is_not_null())
    assert not held.is_empty()
    for row in held.rows(named=True):
        answer = _attempt(tables, row["chain"], row["attempt"])
        holder = _attempt(tables, row["holder_chain"], row["holder_attempt"])
        assert holder["start_ns"] == row["start_ns"] < answer["end_ns"]
        assert holder["end_ns"] > answer["start_ns"]
        assert row["holder"] <= busy[row["chain"], row["attempt"]]["n_holders"]


def test_actors_say_who_attacks() -> None:
    attack = _truth("zero_step_attack", duration_ms=6)["truth_actors"]
    hostile = attack.filter(conduct="hostile")
    assert set(hostile["kind"]) == {"vcpu", "churn_blocks"}
    assert hostile["n_acts"].to_list() == [n for n in hostile["n_acts"] if n > 0]
    guests = _truth("hostile_guest", duration_ms=6)["truth_actors"].filter(conduct="hostile")
    assert set(guests["side"]) == {"guest"}
    assert guests["n_busy_caused"].sum() > 0
    for name in ("quiet", "balloon", "crowd", "string_copy"):
        assert set(_truth(name, duration_ms=6)["truth_actors"]["conduct"]) == {"honest"}


@pytest.mark.parametrize(
    ("name", "changes", "causes", "is_attack"),
    [
        ("zero_step_attack", {"generation": "B"}, {"churned"}, True),
        ("string_copy", {"generation": "B"}, {"churned"}, False),
        ("memory_fault_ignored", {"generation": "B"}, {"memory_fault"}, False),
    ],
)
def test_every_episode_has_the_cause_that_the_scenario_makes(
    name: str, changes: dict[str, object], causes: set[str], is_attack: bool
) -> None:
    episodes = _truth(name, duration_ms=20, **changes)["truth_zero_steps"]
    counted = Counter(episodes["cause"])
    assert counted, name
    assert counted.most_common(1)[0][0] in causes
    assert set(episodes["is_attack"]) == {is_attack}
    faults = episodes.select(
        pl.sum_horizontal(
            pl.col("^n_(memory|refused|churned|inv|raced|left|pending|served|other).*$")
        )
    )
    assert set(faults.to_series()) == {7}


def test_an_entry_that_faults_at_once_executed_nothing() -> None:
    tables = _truth("zero_step_attack", generation="B", duration_ms=6)
    leaf = pl.col("leaf") == 0
    entries = tables["truth_attempts"].join(
        tables["truth_chains"].filter(leaf).select("chain"), on="chain", how="semi"
    )
    refused = entries.filter(pl.col("status") == 0x8000_0200_0000_0092)
    assert not refused.is_empty()
    assert not refused["executed"].any()
    faulted = entries.filter(status=48)
    assert not faulted["executed"].all()
    assert entries["executed"].any()
    assert (
        tables["truth_attempts"]
        .join(entries, on=["chain", "attempt"], how="anti")["executed"]
        .is_null()
        .all()
    )


def test_an_honest_merge_is_given_up_and_attacks_nobody() -> None:
    tables = _truth("merge_given_up", duration_ms=12)
    promotes = tables["truth_chains"].filter(leaf=23)
    assert not promotes.is_empty()
    assert set(promotes["final_status"]) == {0x8000_0004_0000_0000}
    assert tables["truth_chains"].filter(leaf=39, outcome="succeeded").height > 3
    episodes = tables["truth_zero_steps"]
    assert episodes["n_busy"].sum() > 0
    assert Counter(episodes["cause"]).most_common(1)[0][0] == "invalidated"
    assert not episodes["is_attack"].any()
    assert tables["truth_broken_rules"].is_empty()


def test_churn_at_2_mb_faults_inside_the_page() -> None:
    tables = _truth("churn_2mb", duration_ms=6)
    assert set(tables["truth_chains"].filter(leaf=7)["level"]) == {1}
    episodes = tables["truth_zero_steps"]
    assert (episodes["gpa"] % (1 << 21) != 0).any()
    assert set(episodes["cause"]) == {"churned"}
    assert episodes["is_attack"].all()


def test_churn_needs_no_unblock_of_the_pages_that_are_watched() -> None:
    tables = _truth("churn_without_unblock", duration_ms=6)
    watched = tables["truth_actors"].filter(kind="churn_sizes")["tid"].item()
    own = Counter(tables["truth_chains"].filter(tid=watched)["leaf"])
    assert own[15] > 5
    assert own[23] > 5
    assert 39 not in own
    assert set(tables["truth_zero_steps"]["blocker_tid"]) == {watched}
    assert tables["truth_zero_steps"]["is_attack"].all()


def test_faults_on_many_pages_beside_a_track_arm_nothing() -> None:
    for seed in (1, 2):
        tables = _truth("accept_beside_track", seed)
        assert tables["truth_zero_steps"].is_empty()
        entries = (
            tables["truth_attempts"]
            .join(tables["truth_chains"].filter(leaf=0), on="chain", suffix="_of_chain")
            .sort("tid", "start_ns")
        )
        run = (pl.col("status") != 48).cum_sum().over("tid")
        before = entries.with_columns(
            n=pl.col("status").is_in([48]).cum_sum().over("tid", run.alias("run"))
        ).with_columns(n_before=pl.col("n").shift().over("tid"))
        refused = before.filter(pl.col("status") == 0x8000_0200_0000_00A9)
        assert not refused.is_empty()
        assert (refused["n_before"] >= 7).any()


@pytest.mark.parametrize("seed", [1, 2])
def test_single_steps_are_an_attack_and_no_zero_step(seed: int) -> None:
    tables = _truth("tdxdown", seed)
    assert tables["truth_zero_steps"].is_empty()
    stepped = tables["truth_actors"].filter(kind="vcpu", conduct="hostile").row(0, named=True)
    chains = tables["truth_chains"].filter(leaf=0, tid=stepped["tid"]).select("chain")
    entries = tables["truth_attempts"].join(chains, on="chain", how="semi")
    empty = entries.filter(~pl.col("executed"), pl.col("status") == 1)
    # TDXdown: 0.8 % of the single-stepped entries; kicks add a few.
    assert 0.005 < empty.height / entries.height < 0.015
    assert stepped["n_acts"] > 0.99 * entries.height


def test_a_guest_that_converts_what_it_accepts_is_hostile_with_host_priority() -> None:
    tables = _truth("hostile_accept", duration_ms=10)
    blocks = tables["truth_chains"].filter(leaf=7)
    # Half of them are refused once, and no more: the second call comes after a kick.
    assert blocks.filter(pl.col("n_busy") > 0).height > 0.3 * blocks.height
    assert blocks["n_attempts"].max() == 2
    refused = tables["truth_holders"].filter(resource="ENTRY")
    assert refused["is_guest"].all()
    hostile = tables["truth_actors"].filter(conduct="hostile")
    assert set(hostile["side"]) == {"guest"}
    assert hostile["n_busy_caused"].sum() >= refused.height
    assert tables["truth_broken_rules"].is_empty()


def test_an_unseen_holder_is_the_host_whatever_the_operand_suggests() -> None:
    tables = _truth("unseen_holder", duration_ms=10)
    on_entry = tables["truth_busy"].filter(resource="ENTRY", operand=1)
    assert on_entry.height > 100
    assert set(on_entry["holder"]) <= {"TDH.MEM.SEPT.RD", "TDH.MEM.PAGE.AUG", "TDH.MEM.PAGE.REMOVE"}
    assert not on_entry["is_guest"].any()
    guests = tables["truth_actors"].filter(side="guest")
    assert guests["n_busy_caused"].sum() == 0
    assert set(guests["conduct"]) == {"honest"}
    assert "aug_busy_on_entry" in set(tables["truth_broken_rules"]["rule"])


@pytest.mark.parametrize("seed", [1, 2])
def test_vcpus_initialised_at_once_find_the_tdr_busy_before_the_td_is_finalized(seed: int) -> None:
    tables = _truth("racing_init", seed)
    rules = tables["truth_broken_rules"]
    assert set(rules["rule"]) == {"tdr_busy", "busy_before_finalize"}
    assert set(rules["leaf"]) == {22}
    assert rules["evidence_leaf"].is_in(["TDH.VP.INIT"]).all()
    busy = tables["truth_busy"].filter(resource="TDR")
    assert rules.filter(rule="tdr_busy").height == busy.height > 0
    # The VMM tries again: nobody dies, and each vCPU is one chain.
    inits = tables["truth_chains"].filter(leaf=22)
    assert set(inits["outcome"]) == {"succeeded"}
    assert inits.height == 8


@pytest.mark.parametrize("seed", [1, 2])
def test_a_dropped_block_kills_the_td_at_the_demote(seed: int) -> None:
    tables = _truth("dropped_block", seed)
    rules = tables["truth_broken_rules"].filter(rule="dropped_block")
    assert not rules.is_empty()
    for row in rules.rows(named=True):
        demote = _attempt(tables, row["chain"], row["attempt"])
        block = _attempt(tables, row["evidence_chain"], row["evidence_attempt"])
        assert demote["status"] == 0xC000_0B08_0000_0001
        assert block["status"] == 0x8000_0200_0000_0001
        assert block["end_ns"] < demote["start_ns"]
    guests = tables["truth_actors"].filter(side="guest")
    assert set(guests["conduct"]) == {"honest"}


def test_every_overlap_of_a_zap_is_a_row_and_two_installs_are_none() -> None:
    tables = _truth("broken_mmu_lock", duration_ms=12)
    rows = tables["truth_broken_rules"].filter(rule="mmu_lock_excludes")
    aug, block = 6, "TDH.MEM.RANGE.BLOCK"
    pairs = Counter(rows.select("leaf", "evidence_leaf").iter_rows())
    assert pairs[aug, block] > 0
    assert pairs[7, "TDH.MEM.PAGE.AUG"] > 0
    assert pairs[7, block] > 0
    assert not pairs[aug, "TDH.MEM.PAGE.AUG"]
    of_zaps = tables["truth_attempts"].join(
        tables["truth_chains"]
        .filter(pl.col("leaf").is_in([6, 7, 29, 30, 38, 3]))
        .select("chain", "leaf", "td_id"),
        on="chain",
    )
    both = of_zaps.join(of_zaps, on="td_id", suffix="_other").filter(
        (pl.col("start_ns") < pl.col("end_ns_other"))
        & (pl.col("start_ns_other") < pl.col("start_ns"))
        & pl.any_horizontal(pl.col("leaf", "leaf_other").is_in([7, 29, 38]))
        & pl.all_horizontal(pl.col("leaf", "leaf_other").is_in([3, 6, 7, 29, 38]))
    )
    assert both.height == rows.height
