"""The measurement log of simulated builds is what the simulated module measured."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import polars as pl
import pytest

from tdxtrace.analysis.measurement_log import measurement_log
from tdxtrace.tdx.leaves import leaf_name
from tdxtrace.validate.captured import capture_run
from tdxtrace.validate.cells import OWN_CAPTURE, Cell, Plan
from tdxtrace.validate.matrix import simulated

MEASURED = ("TDH.MNG.INIT", "TDH.MEM.PAGE.ADD", "TDH.MR.EXTEND", "TDH.MR.FINALIZE")
WITH_PAGE = MEASURED[1:3]
SUCCESS = 0


@pytest.mark.parametrize(
    ("generation", "capture"),
    [("A", {}), ("B", {"form": "perf"}), ("C", OWN_CAPTURE), ("C", {"probes": "seamcall"})],
)
def test_the_log_is_what_was_measured(generation: str, capture: dict[str, Any]) -> None:
    plan = Plan("lifecycle", generation, "mainline", 31, 60)
    run = simulated(plan)
    result = defaultdict(list)
    for call in sorted(run.journal.calls, key=lambda call: call.end_ns):
        if call.leaf in MEASURED and call.status == SUCCESS:
            result[id(call.td)].append((call.leaf, call.gpa if call.leaf in WITH_PAGE else None))
    assert len(result) > 1
    made = capture_run(run, Cell(plan, **capture))
    assert made is not None
    log = measurement_log(made.trace.seamcalls).with_columns(name=leaf_name(pl.col("leaf")))
    builds = log.partition_by("td_id", "build", maintain_order=True)
    found = [build.select("name", "gpa").rows() for build in builds]
    assert sorted(found, key=str) == sorted(result.values(), key=str)
