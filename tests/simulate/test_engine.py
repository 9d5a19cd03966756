"""Whole runs: physically possible, and in accordance with the policies."""

from collections import Counter
from functools import cache

import pytest

from tdxtrace.errors import QueryError
from tdxtrace.simulate import engine, scenario
from tdxtrace.simulate.engine import Run
from tdxtrace.simulate.module.abi import OPERAND_BUSY, is_busy

BUSY_TREE = OPERAND_BUSY | 0x92
BUSY_RCX = OPERAND_BUSY | 0x01


@cache
def _run(name: str, seed: int = 1, **changes: object) -> Run:
    return engine.run(scenario.named(name).with_(**changes), seed)


def _calls(run: Run) -> list[tuple[int, int, int, int, str, int, int]]:
    return [
        (c.start_ns, c.end_ns, c.cpu, c.thread.tid if c.thread else -1, c.leaf, c.gpa, c.status)
        for c in run.journal.calls
    ]


def test_runs_with_different_seeds_differ() -> None:
    assert _calls(_run("balloon", 1)) != _calls(_run("balloon", 2))


def test_a_quiet_td_is_never_refused() -> None:
    run = _run("quiet")
    assert {c.leaf for c in run.journal.calls} == {"TDH.VP.ENTER"}
    assert not any(is_busy(c.status) for c in run.journal.calls)


@pytest.mark.parametrize("generation", ["A", "B", "C"])
def test_every_busy_answer_has_holders_that_began_before(generation: str) -> None:
    for name in ("zero_step_attack", "hostile_guest", "balloon"):
        run = _run(name, generation=generation, duration_ms=8)
        busy = [c for c in run.journal.calls if is_busy(c.status)]
        for call in busy:
            assert call.busy_reason is not None
            assert call.busy_reason.holders, (name, call.leaf, hex(call.status))
            for holder in call.busy_reason.holders:
                assert holder.start_ns < call.end_ns  # type: ignore[attr-defined]


def test_the_gate_refuses_only_after_seven_faults() -> None:
    run = _run("zero_step_attack", generation="B")
    refused = [e for e in run.journal.episodes if e.n_busy]
    assert refused
    assert all(e.n_faults >= 7 for e in run.journal.episodes)
    n_busy = sum(c.leaf == "TDH.VP.ENTER" and c.status == BUSY_TREE for c in run.journal.calls)
    assert sum(e.n_busy for e in run.journal.episodes) == n_busy


def test_armed_entries_conflict_with_aug_only_before_1_5_20() -> None:
    def met(generation: str) -> set[str]:
        run = _run("zero_step_attack", generation=generation)
        return {
            holder.leaf  # type: ignore[attr-defined]
            for c in run.journal.calls
            if c.leaf == "TDH.VP.ENTER" and c.status == BUSY_TREE and c.busy_reason
            for holder in c.busy_reason.holders
        }

    assert met("B") >= {"TDH.MEM.RANGE.BLOCK", "TDH.MEM.RANGE.UNBLOCK"}
    assert met("C") <= {"TDH.MEM.RANGE.BLOCK", "TDH.MEM.RANGE.UNBLOCK"}


def test_mainline_makes_two_calls_and_a_kick() -> None:
    run = _run("hostile_guest", policy="mainline")
    lengths = Counter(len(r.calls) for r in run.journal.requests if "BLOCK" in r.leaf)
    assert set(lengths) == {1, 2}
    assert sum(a.action == "kick" for a in run.journal.actions) > 0
    assert not run.vms[0].dead


def test_host_priority_lets_a_host_win_after_one_critical_section() -> None:
    run = _run("hostile_guest", generation="C", policy="endless", duration_ms=20)
    chains = [r for r in run.journal.requests if "BLOCK" in r.leaf and len(r.calls) > 1]
    assert max(len(r.calls) for r in chains) > 3
    for request in chains:
        holders = {c.busy_reason.holders for c in request.calls if c.busy_reason is not None}
        assert len(holders) == 1
        assert all(holder.guest for holder in next(iter(holders)))


def test_the_seed_loop_warns_and_doubles() -> None:
    long_held = {"attr": [20_000, 40_000, 80_000, 100_000]}
    chosen = scenario.named("hostile_guest").with_(policy="seed-loop", times=long_held)
    run = engine.run(chosen, 1)
    warned = [a.detail for a in run.journal.actions if a.action == "warn"]
    assert warned[:2] == [16, 32]
    assert warned == [16 << i for i in range(len(warned))]
    assert max(len(r.calls) for r in run.journal.requests) > warned[-1]


def test_a_host_that_gives_up_ends_in_a_timeout() -> None:
    run = _run("host_gives_up")
    statuses = Counter(c.status for c in run.journal.calls)
    assert statuses[0x9000_0205_0000_0000] >= 1
    n_given_up = sum(a.action == "give_up" for a in run.journal.actions)
    assert sum(r.given_up for r in run.journal.requests) == n_given_up > 0


def test_scarce_entropy_is_retried_inside_one_wrapper() -> None:
    run = _run("lifecycle")
    retried = [r for r in run.journal.requests if len(r.calls) > 1 and "MNG" in r.leaf]
    assert retried
    for request in retried:
        assert {c.status for c in request.calls[:-1]} == {0x8000_0203_0000_0000}
        assert max(Counter(c.wrapper_call for c in request.calls).values()) <= 10
    assert any(len({c.wrapper_call for c in r.calls}) == 1 for r in retried)


def test_cache_write_back_is_resumed_in_interrupt_context() -> None:
    run = _run("lifecycle")
    calls = [c for c in run.journal.calls if c.leaf == "TDH.PHYMEM.CACHE.WB"]
    assert calls
    assert all(c.in_irq for c in calls)
    assert {c.status for c in calls} >= {0, 0x8000_0003_0000_0000}


def test_cache_write_back_runs_on_all_packages_at_once() -> None:
    for seed in (1, 2, 3):
        run = _run("lifecycle", seed)
        loops = [r for r in run.journal.requests if r.leaf == "TDH.PHYMEM.CACHE.WB"]
        assert len(loops) == 4
        for first, second in zip(loops[::2], loops[1::2], strict=True):
            assert first.calls[0].package != second.calls[0].package
            assert first.calls[0].cpu != second.calls[0].cpu
            assert second.calls[0].start_ns < first.calls[0].end_ns
            assert {call.status for call in second.calls[:-1]} <= {0x8000_0003_0000_0000}


def test_a_pending_page_keeps_the_gate_shut_before_1_5_20() -> None:
    worst = {
        generation: max(
            e.n_emulated
            for e in _run("memory_fault_ignored", generation=generation).journal.episodes
        )
        for generation in "BC"
    }
    assert worst["B"] > 100 * worst["C"]


def test_scenarios_survive_a_round_trip_through_toml() -> None:
    for name in scenario.names():
        chosen = scenario.named(name)
        assert scenario.load(chosen.to_toml()) == chosen
        assert chosen.name == name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"generation": "D"}, "generation 'D' is not one of A, B, C"),
        ({"policy": "mainlin"}, "no policy 'mainlin'; nearest: mainline"),
        ({"policy": "fixed-0"}, "no policy 'fixed-0'"),
        ({"duration_ms": -5}, "duration_ms is -5, not within"),
        ({"times": {"aug": [4, 3, 2, 1]}}, "not a duration"),
        ({"times": {"agu": [1, 2, 3, 4]}}, "no such time"),
        ({"no_entropy": 1.0}, "no_entropy is a chance below 1"),
    ],
)
def test_an_impossible_scenario_is_refused_in_one_line(
    change: dict[str, object], message: str
) -> None:
    with pytest.raises(QueryError, match=message) as error:
        scenario.named("quiet").with_(**change)
    assert "\n" not in str(error.value)


def test_large_pages_need_a_module_that_can_split_them() -> None:
    with pytest.raises(QueryError, match="do not go together"):
        scenario.named("page_split").with_(generation="A")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name = ", "is not TOML"),
        ('name = "x"\ntitle = "y"\ntimes = 5', "times is no table"),
        ('name = "x"\ntitle = "y"\n[times]\naug = 5', "time 'aug' takes four whole numbers"),
        ('name = "x"\ntitle = "y"\n[[tds]]\nguest = 5', "tds.guest is not a table"),
        (f"cpus = {'9' * 5000}", "a number is too long"),
        ("no_entropy = nan", "not finite"),
        ('name = "x"\ntitle = "y"\nspeed = 3', "has no 'speed'; nearest"),
        ('name = "x"\ntitle = "y"\ncpus = "many"', "'cpus' of the scenario is 'many', not int"),
        ('name = "x"\ntitle = "y"\ntds = 3', "tds is not a list of tables"),
        ('name = "x"\ntitle = "y"', "TDs is 0"),
    ],
)
def test_a_broken_scenario_file_is_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(QueryError, match=message):
        scenario.load(text)


def test_an_unknown_scenario_is_answered_with_the_nearest() -> None:
    with pytest.raises(QueryError, match="nearest: zero_step_attack"):
        scenario.named("zerostep_attack")
