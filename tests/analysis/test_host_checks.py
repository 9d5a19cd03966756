"""Weaknesses of the module that a kernel's log names."""

from __future__ import annotations

import pytest
from support.running import answered
from support.texts import ONE_CALL, read_text

from tdxtrace.analysis.host_checks import host_checks
from tdxtrace.tables.builds import HOST_CHECKS, WEAKNESSES
from tdxtrace.tdx.facts import records

UBUNTU = (
    "[    1.000000] tdx: TDX module: attributes 0x0, vendor_id 0x8086, major_version 1, "
    "minor_version 5, build_date 20240129, build_num 698\n"
)


def version(release: str) -> str:
    return f"[    1.000000] virt/tdx: Module version: {release}\n"


def affected(log: str) -> list[str]:
    rows = HOST_CHECKS.check(host_checks(read_text(log)))
    assert rows["weakness"].to_list() == list(WEAKNESSES)
    return rows["affected"].to_list()


@pytest.mark.parametrize(
    ("log", "answers"),
    [
        (UBUNTU, ["yes", "yes", "yes"]),
        (version("1.5.06"), ["no", "yes", "yes"]),
        (version("1.5.16"), ["no", "yes", "yes"]),
        (version("1.5.20"), ["no", "no", "no"]),
        (version("1.5.34"), ["no", "no", "no"]),
        # No source of these was read.
        (version("1.5.99"), ["unknown", "unknown", "unknown"]),
        (version("2.0.08"), ["unknown", "unknown", "unknown"]),
        # A log across an update: which of the two runs at its end is not asked here.
        (version("1.5.05") + version("1.5.20"), ["unknown", "unknown", "unknown"]),
        ("[    1.000000] virt/tdx: module initialized\n", ["unknown", "unknown", "unknown"]),
    ],
)
def test_a_release_has_the_weaknesses_that_its_source_shows(log: str, answers: list[str]) -> None:
    assert affected(log) == answers


def test_a_trace_without_a_log_has_no_host_checks() -> None:
    assert host_checks(read_text(ONE_CALL)).is_empty()


def test_every_weakness_has_facts_with_a_source() -> None:
    facts = records("module_weaknesses")
    assert {fact["weakness"] for fact in facts} == set(WEAKNESSES)
    assert all(fact["source"] and fact["meaning"] for fact in facts)


def test_the_command_reads_a_log_from_a_pipe() -> None:
    text = answered("host-check", "-", stdin=UBUNTU.encode()).text
    assert "TDX module 1.5.05, lock generation B" in text
    assert "AFFECTED     single_step_by_time" in text
