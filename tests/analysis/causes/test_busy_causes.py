"""Causes of busy attempts in small scenarios."""

from __future__ import annotations

import dataclasses
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.story import STEP_NS, Story, story, without

from tdxtrace.analysis.causes.busy_causes import busy_causes, cause_shares
from tdxtrace.analysis.causes.conflicts import ALL_GENERATIONS, mask_of
from tdxtrace.analysis.causes.evidence import gather_evidence, observed_interval
from tdxtrace.tables.causes import BUSY_CAUSES, CAUSE_SHARES
from tdxtrace.tables.trace import Trace

# A vCPU that entered, and exited by executing an instruction: the capture shows entries.
BEFORE = "9/enterH 9/S5 8/blockS7 8/removeS7"
# Seven faults of vCPU 2 without progress: its next entry is armed.
SEVEN_FAULTS = "2/enterH " + "2/enterX " * 7
AUG, VIOLATION, BUSY_TREE = 6, 48, 0x8000_0200_0000_0092


def answers(scenario: Story, generation: str = "") -> list[dict[str, Any]]:
    mask = mask_of(generation) if generation else ALL_GENERATIONS
    table = BUSY_CAUSES.check(busy_causes(gather_evidence(scenario.trace, mask=mask)))
    assert table.filter(rank=1)["seq"].is_unique().all()
    return table.filter(rank=1).to_dicts()


def answer(text: str, generation: str = "") -> tuple[str, int | None, int | None]:
    (row,) = answers(story(f"{BEFORE} {text}"), generation)
    return row["cause"], row["holder_leaf"], row["holder_tid"]


def lacks(text: str, generation: str = "") -> str:
    (row,) = answers(story(f"{BEFORE} {text}"), generation)
    assert row["cause"] == "unexplained"
    assert row["advice"]
    return str(row["lacks"])


@pytest.mark.parametrize(
    ("text", "generation", "expected"),
    [
        ("2/block( B1 2/)S", "B", ("host_conflict", 7, 2)),
        ("2/block(1 enterB 2/)S", "B", ("host_conflict", 7, 2)),
        ("2/(3 blockB1 2/)S", "B", ("host_conflict", 6, 2)),
        ("2/(3 B1 2/)S", "A", ("host_conflict", 6, 2)),
        ("2/track( enterD 2/)S", "B", ("host_conflict", 38, 2)),
        ("2/sept(1 K1 2/)S", "B", ("kernel_bug", 3, 2)),
        ("2/sept(1 removeK1 2/)S", "B", ("host_conflict", 3, 2)),
        # Of two that may hold it, the one that overlaps throughout.
        ("2/block(1 3/block(2 2/)S _300us B3 3/)S", "B", ("host_conflict", 7, 3)),
        # It released the lock because it failed itself: the other one holds it.
        ("2/block(1 3/block(2 B3 2/)B 3/)S", "B", ("host_conflict", 7, 3)),
    ],
)
def test_a_host_call_that_overlaps_and_excludes_is_the_holder(
    text: str, generation: str, expected: tuple[str, int, int]
) -> None:
    rows = answers(story(f"{BEFORE} {text}"), generation)
    row = next(row for row in rows if row["tid"] == 1)
    assert (row["cause"], row["holder_leaf"], row["holder_tid"]) == expected


@pytest.mark.parametrize(
    ("text", "generation"),
    [
        ("2/(3 B1 2/)S", "B"),  # AUG shares the tree with AUG
        ("2/(3 B1 2/)S", "C"),
        ("2/block(#2 B1#1 2/)S", "B"),  # another TD
        ("2/block(1 2/)S _ B1", "B"),  # over by then
        ("_ B1 _ 2/block(1 2/)S", "B"),  # not begun
        ("block(1 )S B1", "B"),  # its own thread
    ],
)
def test_a_call_that_cannot_hold_it_is_no_cause(text: str, generation: str) -> None:
    assert answer(text, generation)[0] == "unexplained"


def test_an_answer_names_lock_and_generations() -> None:
    (row,) = answers(story(f"{BEFORE} 2/block(1 B1 2/)S"))
    assert (row["lock"], row["mode"], row["holder_mode"]) == ("SEPT_TREE", "SH", "EX")
    assert (row["generations"], row["confidence"], row["n_tied"]) == ("ABC", "strong", 1)
    assert row["resource"] == "SEPT tree"
    assert row["overlap_ns"] == row["end_ns"] - row["start_ns"]


def test_equally_good_candidates_are_counted() -> None:
    (row,) = answers(story(f"{BEFORE} 2/(3 3/(4 blockB1 3/)S 2/)S"), "B")
    assert (row["cause"], row["holder_tid"], row["n_tied"]) == ("host_conflict", 2, 2)
    table = busy_causes(gather_evidence(story(f"{BEFORE} 2/(3 3/(4 blockB1 3/)S 2/)S").trace))
    assert table["rank"].to_list() == [1, 2]
    assert table["holder_tid"].to_list() == [2, 3]


# Armed entries.


def answer_beside_entry(
    text: str,
    generation: str = "B",
    ends: int = 0,
    overlap: int = 0,
    **clock: Any,  # noqa: ANN401
) -> dict[str, Any]:
    """The row of rank 1 of an AUG of thread 1, busy 500 ns after thread 2 last entered.

    Busy answers last 1 us; ``ends``: ns from the start of that entry to the end of the call
    of thread 3; ``overlap``: ns from the event after its start to its end; ``clock``: fields of
    the source.
    """
    scenario = story(f"{BEFORE} {text}").trace
    entered = pl.col("start_ns").filter(pl.col("tid") == 2, pl.col("status") == VIOLATION).last()
    refused, mine = pl.col("status") == BUSY_TREE, (pl.col("tid") == 1) & (pl.col("leaf") == AUG)
    start = pl.when(refused & mine).then(entered + 500).otherwise("start_ns")
    calls = scenario.seamcalls.with_columns(start_ns=start).with_columns(
        end_ns=pl.when(refused)
        .then(pl.col("start_ns") + 1000)
        .when(pl.col("tid") == 3)
        .then(pl.col("start_ns") + STEP_NS + overlap if overlap else entered + ends)
        .otherwise("end_ns")
    )
    given = {"clock_resolution_ns": 1, **clock}
    source = dataclasses.replace(scenario.provenance.sources[0], **given)
    known = dataclasses.replace(scenario.provenance, sources=(source,))
    finer = dataclasses.replace(scenario, seamcalls=calls, provenance=known)
    table = BUSY_CAUSES.check(busy_causes(gather_evidence(finer, mask=mask_of(generation))))
    return next(row for row in table.filter(rank=1).to_dicts() if row["tid"] == 1)


# The next entry is refused, so the mitigation was armed.
REFUSED = "4/block(5 2/enterB 4/)S"
ARMED_ENTRY = f"{SEVEN_FAULTS} {REFUSED} 2/enter( B1 2/)X"


@pytest.mark.parametrize(
    ("generation", "expected"), [("A", "armed_entry"), ("B", "armed_entry"), ("C", "unexplained")]
)
def test_an_armed_entry_holds_the_tree_by_generation(generation: str, expected: str) -> None:
    assert (
        answer_beside_entry(f"{SEVEN_FAULTS} 2/enter( B1 2/)X {REFUSED}", generation)["cause"]
        == expected
    )


def test_an_entry_shown_armed_only_later_is_a_weak_answer() -> None:
    later = answer_beside_entry(f"{SEVEN_FAULTS} 2/enter( B1 2/)X {REFUSED}")
    assert (later["cause"], later["confidence"]) == ("armed_entry", "weak")
    before = answer_beside_entry(ARMED_ENTRY)
    assert (before["cause"], before["confidence"]) == ("armed_entry", "strong")


def test_faults_without_a_refused_entry_do_not_prove_an_armed_entry() -> None:
    row = answer_beside_entry(f"{SEVEN_FAULTS} 2/enter( B1 2/)X")
    assert (row["cause"], row["lacks"]) == ("unexplained", "holder_probes")
    # Nor does one that was refused when the guest had moved on since.
    moved = answer_beside_entry(f"{SEVEN_FAULTS} 2/enter( B1 2/)X 2/enterH {REFUSED}")
    assert moved["cause"] == "unexplained"


@pytest.mark.parametrize(
    ("clock", "resolution_ns", "expected"),
    [
        # An answer of 1 us.  The default clock of ftrace may differ between CPUs.
        ("unnamed", 1, "armed_entry"),
        ("unnamed", 500, "unexplained"),
        ("local", 500, "unexplained"),
        ("mono", 500, "armed_entry"),
    ],
)
def test_an_armed_entry_is_no_cause_if_the_clock_is_too_coarse(
    clock: str, resolution_ns: int, expected: str
) -> None:
    """A BLOCK of a CPU whose clock is a few us off would leave the entry as the only candidate."""
    row = answer_beside_entry(ARMED_ENTRY, clock=clock, clock_resolution_ns=resolution_ns)
    assert row["cause"] == expected
    assert (row["lacks"] == "clock") == (expected == "unexplained")


def test_an_armed_entry_is_no_cause_where_events_may_be_lost() -> None:
    assert answer_beside_entry(f"lost {ARMED_ENTRY}")["cause"] == "armed_entry"
    assert answer_beside_entry(ARMED_ENTRY.replace("B1", "lost B1"))["cause"] == "unexplained"


def test_an_armed_entry_is_no_cause_in_a_trace_that_lacks_holders() -> None:
    alone = " _ 1/enterB"
    assert answer_beside_entry(ARMED_ENTRY + 2 * alone)["cause"] == "armed_entry"
    assert answer_beside_entry(ARMED_ENTRY + 3 * alone)["cause"] == "unexplained"


@pytest.mark.parametrize(("starts", "expected"), [(True, "armed_entry"), (False, "unexplained")])
def test_an_armed_entry_is_no_cause_if_host_calls_have_no_entry_probes(
    starts: bool, expected: str
) -> None:
    """A capture of chosen returns, as ``capture --level minimal``, may lack the holder's leaf."""
    scenario = story(f"{BEFORE} {SEVEN_FAULTS} {REFUSED} 2/enter( 1/enterB 2/)X").trace
    if not starts:
        calls = scenario.seamcalls.with_columns(start_ns=pl.when(leaf=0).then("start_ns"))
        scenario = dataclasses.replace(scenario, seamcalls=calls)
    evidence = gather_evidence(scenario, mask=mask_of("B"), entry_ns=2 * STEP_NS)
    table = busy_causes(evidence).filter(rank=1, tid=1)
    assert table["cause"].to_list() == [expected]


@pytest.mark.parametrize(("overlap", "expected"), [(990, "armed_entry"), (500, "unexplained")])
def test_a_holder_within_clock_tolerance_is_not_a_missing_holder(
    overlap: int, expected: str
) -> None:
    """Getting in and out takes 1000 ns by an estimate, of which the two share so many."""
    beside = " _ 3/block(6 1/enterB 3/)S"
    assert answer_beside_entry(ARMED_ENTRY + 3 * beside, overlap=overlap)["cause"] == expected


@pytest.mark.parametrize(
    ("armed", "ends", "expected"),
    [
        # Both take 1000 ns to get in and out of the module, of which they share so many.
        ("before", 950, "armed_entry strong"),  # 450
        ("before", 1050, "armed_entry weak"),  # 550: the latencies are estimates
        ("before", 1390, "armed_entry weak"),  # 890
        ("before", 1410, "unexplained none"),  # 910
        ("before", 1600, "host_conflict weak"),  # all of it: the call had the tree beyond doubt
        ("later", 950, "armed_entry weak"),
        ("later", 1390, "armed_entry weak"),
        ("later", 1410, "unexplained none"),
        ("later", 1600, "host_conflict weak"),
    ],
)
def test_a_call_that_may_hold_the_tree_outranks_an_armed_entry(
    armed: str, ends: int, expected: str
) -> None:
    entry = "3/block(6 2/enter( B1 2/)X 3/)S"
    result = (
        f"{SEVEN_FAULTS} {REFUSED} {entry}"
        if armed == "before"
        else f"{SEVEN_FAULTS} {entry} {REFUSED}"
    )
    row = answer_beside_entry(result, ends=ends)
    # Beside a gate that may as well have had it, even a call that surely had it is no proof.
    assert f"{row['cause']} {row['confidence']}" == expected


@pytest.mark.parametrize(
    ("silent", "expected"),
    [
        # CPU 1 speaks every 10 ns, the others until 2000.
        ((0, 2010), (0, 2000)),
        ((0, 1500), (0, 1490)),
        ((300, 2010), (300, 2000)),
        ((300, 1500), (300, 1490)),
        ((1500, 2000), (0, 2000)),  # few calls: silence is nothing new
    ],
)
def test_a_cpu_that_stays_silent_bounds_the_observed_interval(
    silent: tuple[int, int], expected: tuple[int, int]
) -> None:
    ends = [*range(0, 2001, 10), *range(*silent, 10)]
    cpu = [0] * 201 + [1] * (len(ends) - 201)
    assert observed_interval(pl.DataFrame({"cpu": cpu, "ends": ends})) == expected


@pytest.mark.parametrize(
    ("tool", "form", "expected"),
    [
        ("trace-cmd report", "ftrace", "armed_entry"),
        (None, "trace.dat", "armed_entry"),
        ("tracefs trace", "ftrace", "unexplained"),
        ("perf 6.1", "perf-script", "unexplained"),
    ],
)
def test_a_silent_cpu_lost_no_events_if_losses_are_marked(
    tool: str | None, form: str, expected: str
) -> None:
    """CPU 1 makes a hundred calls and then none: its vCPU halted, or its buffer was full."""
    scenario = story(100 * "9/trackS@1 " + ARMED_ENTRY).trace
    source = dataclasses.replace(scenario.provenance.sources[0], tool=tool, format=form)
    scenario = dataclasses.replace(
        scenario, provenance=dataclasses.replace(scenario.provenance, sources=(source,))
    )
    evidence = gather_evidence(scenario, mask=mask_of("B"), entry_ns=2 * STEP_NS)
    table = busy_causes(evidence).filter(rank=1, tid=1)
    assert table["cause"].to_list() == [expected]


def rows_of(scenario: Story, calls: pl.DataFrame, generation: str = "") -> list[dict[str, Any]]:
    trace = dataclasses.replace(scenario.trace, seamcalls=calls)
    mask = mask_of(generation) if generation else ALL_GENERATIONS
    table = BUSY_CAUSES.check(busy_causes(gather_evidence(trace, mask=mask)))
    return table.filter(rank=1).to_dicts()


def test_an_entry_after_six_faults_holds_no_tree() -> None:
    six = SEVEN_FAULTS.replace("2/enterX ", "", 1)
    assert answer(f"{six} 2/enter( B1 2/)X", "B")[0] == "unexplained"


def test_a_guest_that_runs_holds_no_tree() -> None:
    # The entry was over long before: what remains of TDH.VP.ENTER is the guest.
    assert answer(f"{SEVEN_FAULTS} 2/enter( _ B1 2/)X", "B")[0] == "unexplained"


# Guests.


def test_an_entry_lock_that_no_host_call_holds_was_held_by_a_guest() -> None:
    rows = answers(story(f"{BEFORE} 2/enter( removeK1 2/)H"), "B")
    assert [(r["cause"], r["holder_tid"], r["confidence"]) for r in rows] == [
        ("guest", 2, "strong")
    ]


def test_several_possible_guests_leave_the_holder_unnamed() -> None:
    (row,) = answers(story(f"{BEFORE} 2/enter( 3/S1 3/enter( removeK1 2/)H 3/)H"), "B")
    assert (row["cause"], row["holder_tid"], row["n_tied"]) == ("guest", None, 2)


def test_without_a_guest_inside_the_cause_is_unexplained() -> None:
    assert lacks("removeK1", "B") == "holder_probes"


def test_without_probed_entries_a_guest_is_a_weak_answer() -> None:
    (row,) = answers(story("S1 8/blockS7 removeK1"), "B")
    assert (row["cause"], row["confidence"]) == ("guest", "weak")


def test_a_capture_of_one_leaf_explains_nothing() -> None:
    (row,) = answers(story("S1 K2 S3"), "B")
    assert (row["cause"], row["lacks"]) == ("unexplained", "holder_probes")
    assert "tdh_mem_" in row["advice"]


def guest_of(text: str, generation: str) -> list[tuple[str, str, str | None]]:
    rows = answers(story(f"{BEFORE} {text}"), generation)
    return [(r["cause"], r["confidence"], r["lacks"]) for r in rows]


STRONG, WEAK = ("guest", "strong", None), ("guest", "weak", None)
HELD_OFF, EITHER = ("unexplained", "none", "holder"), ("unexplained", "none", "generation")


@pytest.mark.parametrize(
    ("text", "generation", "expected"),
    [
        # One TDCALL may last for both tries.
        ("2/enter( removeK1 removeK1 2/)H", "C", [STRONG, STRONG]),
        # After the first, host priority keeps the guest out: somebody else held the entry.
        ("2/enter( removeK1 _ removeK1 2/)H", "C", [HELD_OFF, HELD_OFF]),
        ("2/enter( removeK1 _ 3/removeK1 2/)H", "C", [HELD_OFF, HELD_OFF]),
        # In B a write of the entry may have cleared it, and the guest may have won again.
        ("2/enter( removeK1 _ removeK1 2/)H", "B", [WEAK, WEAK]),
        ("2/enter( removeK1 _ removeK1 2/)H", "", [EITHER, EITHER]),
        ("2/enter( removeK1 removeK1 2/)H", "", [STRONG, STRONG]),
        # A host call that takes the entry clears host priority, in whatever it ends ...
        ("2/enter( removeK1 _ demoteT1 removeK1 2/)H", "C", [STRONG, STRONG]),
        ("2/enter( removeK1 _ 3/removeS1 _ removeK1 2/)H", "C", [STRONG, STRONG]),
        ("2/enter( removeK1 _ 3/demoteU1 3/S7 _ removeK1 2/)H", "C", [STRONG, STRONG]),
        # ... but not one that was refused before it, nor one on another entry.
        ("2/enter( removeK1 _ demoteE1 removeK1 2/)H", "C", [HELD_OFF, HELD_OFF]),
        ("2/enter( removeK1 _ demoteT2 removeK1 2/)H", "C", [HELD_OFF, HELD_OFF]),
        ("2/enter( removeK1 _ demoteT1^1 removeK1 2/)H", "C", [HELD_OFF, HELD_OFF]),
        ("2/enter( removeK1 _ removeK2 2/)H", "C", [STRONG, STRONG]),
        # A page of 2M is 512 of 4K to clear.
        ("2/enter( removeK1^1 _5ms removeK1^1 2/)H", "C", [STRONG, STRONG]),
        ("2/enter( removeK1^1 _8ms removeK1^1 2/)H", "C", [HELD_OFF, HELD_OFF]),
        # A has no lock that a guest and a host call both take.
        ("2/enter( blockK1 2/)H", "B", [STRONG]),
        ("2/enter( blockK1 2/)H", "A", [HELD_OFF]),
    ],
)
def test_host_priority_bounds_what_a_guest_explains(
    text: str, generation: str, expected: list[tuple[str, str, str | None]]
) -> None:
    assert guest_of(text, generation) == expected


def test_a_call_busy_on_a_later_lock_had_held_the_entry() -> None:
    for other, cause in (("W", "guest"), ("K", "unexplained")):  # the page it adds; the entry
        rows = guest_of(f"2/enter( removeK1 _ 3/{other}1 _ removeK1 2/)H", "C")
        assert [rows[0][0], rows[-1][0]] == [cause, cause]


def test_a_guest_is_strong_only_where_installs_and_zaps_are_recorded() -> None:
    for before, confidence in (("8/blockS7 9/S5", "strong"), ("8/blockS7 8/removeS7", "weak")):
        (row,) = answers(story(f"9/enterH {before} 2/enter( removeK1 2/)H"), "B")
        assert (row["cause"], row["confidence"]) == ("guest", confidence)


def test_a_call_that_was_refused_before_a_lock_never_had_it() -> None:
    assert answer("2/block(3 B1 2/)E", "B")[0] == "unexplained"  # an operand is wrong
    # The module was busy as a whole.
    rows = answers(story(f"{BEFORE} 2/block(3 B1 2/)Y"), "B")
    assert [row["cause"] for row in rows] == ["unexplained", "unexplained"]
    # One that failed with the lock held is a holder like any other.
    assert answer("2/remove(1 blockB2 2/)T", "B") == ("host_conflict", 29, 2)


def test_idle_threads_of_two_cpus_are_not_one_thread() -> None:
    text = f"{BEFORE} 0/cachewb(@3! 0/cachewbK@9! "
    scenario = story(text + "7/S5")
    status = pl.when(pl.col("cpu") == 9).then(0x8000_0200_0000_00BC).otherwise("status")
    calls = scenario.seamcalls.with_columns(status=status.cast(pl.UInt64))
    calls = calls.with_columns(
        end_ns=pl.when((pl.col("tid") == 0) & (pl.col("cpu") == 3))
        .then(scenario.now)
        .otherwise("end_ns"),
    )
    (row,) = rows_of(scenario, calls)
    assert (row["cause"], row["holder_leaf"]) == ("host_conflict", 40)


def test_where_holders_are_missing_a_guest_is_a_weak_answer() -> None:
    missing = "B1 B2 B3 "  # three busy on the tree, which only host calls take
    (row,) = [
        r
        for r in answers(story(f"{BEFORE} {missing} 2/enter( removeK4 2/)H"), "B")
        if r["leaf"] == 29
    ]
    assert (row["cause"], row["confidence"]) == ("guest", "weak")


# What a capture lacks.


def test_without_entry_probes_nothing_overlaps() -> None:
    scenario = story(f"{BEFORE} 2/block(1 B1 2/)S")
    (row,) = rows_of(scenario, without(scenario.seamcalls, "start_ns"))
    assert (row["cause"], row["lacks"]) == ("unexplained", "entry_probes")


def test_without_arguments_the_td_is_not_known() -> None:
    scenario = story(f"{BEFORE} 2/block(1 B1 2/)S")
    (row,) = rows_of(scenario, without(scenario.seamcalls, "td_id", "gpa", "level", "vp_id"))
    assert (row["cause"], row["lacks"]) == ("unexplained", "arguments")


def widened(scenario: Story, ns: int = 15_000) -> Trace:
    """The trace, with its losses prolonged by ``ns``."""
    losses = scenario.losses.with_columns(end_ns=pl.col("end_ns") + ns)
    return dataclasses.replace(scenario.trace, losses=losses)


def test_an_attempt_beside_a_loss_is_unexplained() -> None:
    scenario = story(f"{BEFORE} 2/enter( lost removeK1 2/)H")
    (row,) = busy_causes(gather_evidence(widened(scenario), mask=mask_of("B"))).to_dicts()
    assert (row["cause"], row["lacks"]) == ("unexplained", "lost_events")
    assert answer("2/enter( removeK1 2/)H", "B")[0] == "guest"


@pytest.mark.parametrize(
    ("clock", "expected"),
    [("mono", ["proof", "strong"]), ("local", ["strong"] * 2), ("unnamed", ["strong"] * 2)],
)
def test_a_loss_or_a_clock_of_each_cpu_lowers_the_confidence(
    clock: str, expected: list[str]
) -> None:
    text = f"{BEFORE} 2/block(1 lost B1 2/)S"
    traces = story(text.replace("lost ", "")).trace, widened(story(text))
    rows = [the_answer(by_clock(trace, clock)) for trace in traces]
    assert [row["confidence"] for row in rows] == expected
    assert {row["cause"] for row in rows} == {"host_conflict"}


@pytest.mark.parametrize(
    ("text", "local"),
    [
        # A vCPU was refused: the AUG may have met its next entry.
        ("2/enterC 2/enterB 2/enterC 3/block(1 B1 3/)S", "weak"),
        ("2/enterC 2/enterB 2/enterC _7ms 3/block(1 B1 3/)S", "strong"),
        ("5/S1#1 2/enterB*5 2/enterC*5 3/block(1 B1 3/)S", "weak"),  # of an unknown TD
        # Nothing shows that one was armed.
        ("2/enterC " + "2/enterX " * 9 + "3/block(1 B1 3/)S", "strong"),
        # A guest may have the entry.
        ("3/remove(1 blockK1 3/)S", "weak"),
    ],
)
def test_what_an_armed_entry_or_a_guest_may_have_held_is_weak_where_clocks_may_differ(
    text: str, local: str
) -> None:
    trace = story(f"{BEFORE} {text}").trace
    for clock, expected in (("mono", "proof"), ("local", local)):
        row = the_answer(by_clock(trace, clock))
        assert (row["cause"], row["confidence"]) == ("host_conflict", expected)


def by_clock(trace: Trace, clock: str) -> Trace:
    source = dataclasses.replace(trace.provenance.sources[0], clock=clock)
    known = dataclasses.replace(trace.provenance, sources=(source,))
    return dataclasses.replace(trace, provenance=known)


def the_answer(trace: Trace) -> dict[str, Any]:
    """The row of rank 1 of the last busy answer of thread 1."""
    table = busy_causes(gather_evidence(trace, mask=mask_of("B")))
    return table.filter(rank=1, tid=1).to_dicts()[-1]


def test_a_call_without_an_end_is_listed_but_not_the_answer() -> None:
    scenario = story(f"{BEFORE} 2/block(1 B1")
    table = busy_causes(gather_evidence(scenario.trace, mask=mask_of("B")))
    assert table["cause"].to_list() == ["unexplained", "host_conflict"]
    assert table["lacks"].to_list() == ["trace_edge", None]
    assert table["holder_leaf"].to_list() == [None, 7]


# Shares.

WORDS = [
    "B1",
    "2/blockB1",
    "2/block(1",
    "2/)S",
    "3/enterB",
    "K1",
    "2/enter(",
    "2/)H",
    "trackP",
    "_",
]


def _well_formed(words: list[str]) -> str:
    """Drop returns without a call."""
    is_open, result = False, []
    for word in words:
        if word.startswith("2/") and ((")" in word) != is_open):
            continue
        is_open = is_open ^ ("(" in word or ")" in word) if word.startswith("2/") else is_open
        result.append(word)
    return " ".join(result)


@settings(max_examples=25)
@given(st.lists(st.sampled_from(WORDS), max_size=14).map(_well_formed))
def test_every_busy_attempt_has_one_answer_and_shares_sum_to_one(text: str) -> None:
    scenario = story(text)
    table = BUSY_CAUSES.check(busy_causes(gather_evidence(scenario.trace)))
    status = scenario.seamcalls["status"].cast(pl.Float64)
    n_busy = int(((status >= 0x8000_0200_0000_0000) & (status < 0x8000_0203_0000_0000)).sum())
    assert table.filter(rank=1).height == n_busy
    shares = CAUSE_SHARES.check(cause_shares(table))
    assert shares["n_busy"].sum() == n_busy
    assert shares["share_ppm"].sum() == (1_000_000 if n_busy else 0)


def test_other_tds_change_nothing() -> None:
    text = "2/block(1 B1 2/)S _ 2/enter( removeK1 2/)H"
    alone = answers(story(f"{BEFORE} {text}"), "B")
    beside = answers(story(f"{BEFORE} {text} 5/S1#3 5/block(1#3 5/)S"), "B")
    assert alone == beside
