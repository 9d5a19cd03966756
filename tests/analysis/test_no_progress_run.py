"""Runs without progress, against a step-by-step model of one vCPU."""

from __future__ import annotations

from typing import Any

import polars as pl
from hypothesis import given
from hypothesis import strategies as st

from tdxtrace.analysis.zero_steps import no_progress_run

EPT, HLT, INTERRUPT, NOT_ENTERED = 48, 12, 1, 0xFFFF_FFFF
SCHEMA = {
    "source": pl.UInt16,
    "tid": pl.Int32,
    "reason": pl.UInt32,
    "installs": pl.Boolean,
    "installed": pl.Boolean,
    "gpa": pl.UInt64,
}

entries = st.sampled_from([EPT, HLT, INTERRUPT, NOT_ENTERED, None]).map(
    lambda reason: {"reason": reason, "installs": False, "installed": False, "gpa": None}
)
installs = st.tuples(st.booleans(), st.sampled_from([1, 2, None])).map(
    lambda drawn: {"reason": None, "installs": True, "installed": drawn[0], "gpa": drawn[1]}
)
vcpus = st.lists(st.lists(entries | installs, min_size=1, max_size=12), max_size=4)


def followed(steps: list[dict[str, Any]]) -> list[tuple[int, bool, int | None, bool]]:
    """Number of the run, is_fault, page and whole of each step of one vCPU."""
    run, page, wanted, moved, seen = 0, None, None, False, False
    rows = []
    for place, step in enumerate(steps):
        is_fault = step["reason"] == EPT
        ends = place > 0 and (moved or (is_fault and wanted is True))
        run, seen = run + ends, seen or ends
        if is_fault:
            wanted = False
        elif step["installs"]:
            wanted = step["installed"]
        if step["installs"] and step["gpa"] is not None:
            page = step["gpa"]
        moved = step["reason"] == HLT
        rows.append((run, is_fault, page, seen))
    return rows


@given(vcpus)
def test_runs_equal_those_of_each_vcpu_alone(drawn: list[list[dict[str, Any]]]) -> None:
    rows = [
        {"source": 0, "tid": None if tid == 0 else tid, **step}
        for tid, steps in enumerate(drawn)
        for step in steps
    ]
    found = no_progress_run(pl.DataFrame(rows, schema=SCHEMA), [EPT, INTERRUPT])
    shown = found.select("run", "is_fault", "page", "whole").rows()
    place = 0
    runs: set[int] = set()
    for steps in drawn:
        mine, expected = shown[place : place + len(steps)], followed(steps)
        first = mine[0][0]
        assert [(run - first, *rest) for run, *rest in mine] == expected
        assert not runs & {run for run, *_ in mine}
        runs |= {run for run, *_ in mine}
        place += len(steps)
    assert found.columns == [*SCHEMA, "is_fault", "page", "run", "whole"]
