"""Counts of traces written by hand from the rules of the module and of KVM."""

from __future__ import annotations

from pathlib import Path

import tdxtrace
from tdxtrace.tables.trace import Findings

HERE = Path(__file__).parent


def found(name: str) -> Findings:
    return tdxtrace.analyze(tdxtrace.read_trace(HERE / name))


def chains(findings: Findings, *columns: str) -> list[tuple[object, ...]]:
    return findings.retry_chains.sort("start_ns", "first_seq").select(columns).rows()


def test_a_fault_that_needs_a_page_table_first_is_one_chain() -> None:
    result = chains(found("aug-septadd-aug.txt"), "leaf", "n_attempts", "outcome", "settled_seq")
    assert result == [(6, 2, "succeeded", None), (3, 1, "succeeded", None)]


def test_caches_are_written_back_on_all_packages_at_once() -> None:
    findings = found("cachewb-2cpu.txt")
    assert chains(findings, "leaf", "n_attempts", "n_busy", "outcome") == [
        (40, 5, 4, "succeeded"),
        (40, 5, 4, "succeeded"),
    ]
    loops = findings.progress_loops.sort("cpu").select("cpu", "loop", "n_repeats", "progress")
    assert loops.rows() == [(3, "resumable", 4, "seen"), (9, "resumable", 4, "seen")]


def test_a_return_without_an_entry_is_no_attempt() -> None:
    findings = found("stale-busy.txt")
    result = findings.retry_chains.filter(tid=101).sort("start_ns")
    assert result.select("leaf", "n_attempts", "n_busy", "outcome").rows() == [
        (0, 1, 0, "succeeded"),
        (0, 2, 1, "succeeded"),
    ]


def test_a_call_that_two_instances_recorded_counts_once() -> None:
    result = chains(found("two-instances.txt"), "leaf", "n_attempts", "n_busy", "outcome")
    assert result == [(6, 2, 1, "succeeded")]
