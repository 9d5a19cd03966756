"""Accepting, boot phases, TDVMCALLs and module updates, against the simulated host."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from tdxtrace.simulate.engine import Run
from tdxtrace.validate import matrix
from tdxtrace.validate.captured import Score, capture_run
from tdxtrace.validate.cells import FULL_CAPTURE, OWN_CAPTURE, Cell, Plan
from tdxtrace.validate.matrix import SCORERS

PLANS = {
    "boot": Plan("td_boot", "C", "mainline", 5, 30),
    "old boot": Plan("td_boot", "A", "fixed-8", 6, 30),
    "conversions": Plan("conversion_churn", "B", "mainline", 5, 8),
    "hostile": Plan("hostile_accept", "B", "endless", 5, 8),
    "update": Plan("module_update", "C", "mainline", 5, 20, "7.2"),
}
SEAMCALLS: dict[str, Any] = {"probes": "capture-seamcalls", **FULL_CAPTURE}


@cache
def run_of(name: str) -> Run:
    return matrix.simulated(PLANS[name])


def scored(name: str, table: str, capture: dict[str, Any]) -> Score:
    made = capture_run(run_of(name), Cell(PLANS[name], **capture))
    assert made is not None
    return SCORERS[table](made)


@pytest.mark.parametrize(
    ("name", "table", "capture", "least"),
    [
        ("boot", "boot_phases", {}, 7),
        ("old boot", "boot_phases", FULL_CAPTURE, 7),
        ("boot", "boot_phases", OWN_CAPTURE, 7),
        ("boot", "accept_rates", {"form": "perf"}, 12),
        ("hostile", "accept_rates", FULL_CAPTURE, 4),
        ("conversions", "accept_rates", OWN_CAPTURE, 4),
        ("boot", "tdvmcalls", {"probes": "stock"}, 100),
        ("conversions", "tdvmcalls", {"form": "trace-cmd"}, 100),
        ("conversions", "tdvmcalls", {"form": "trace-pipe", "faults": ("lost=0.05",)}, 100),
        ("conversions", "tdvmcalls", {"faults": ("clock=3",)}, 100),
        ("update", "module_updates", SEAMCALLS, 4),
    ],
)
def test_every_answer_is_right(name: str, table: str, capture: dict[str, Any], least: int) -> None:
    score = scored(name, table, capture)
    assert score.examples == []
    assert score.counts["wrong"] == 0
    assert score.counts["right"] >= least


def test_unobservable_answers_are_not_scored() -> None:
    assert not scored("update", "module_updates", {}).counts
    assert not scored("boot", "boot_phases", {"probes": "stock"}).counts
