"""Traces written by hand from the rules of the module and of KVM: zero-step episodes."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import polars as pl

import tdxtrace
from tdxtrace.tables.trace import Findings

HERE = Path(__file__).parent


@cache
def findings(name: str) -> Findings:
    return tdxtrace.analyze(tdxtrace.read_trace(str(HERE / name)))


def test_a_booting_guest_under_kvms_tracepoints_has_no_sure_episode() -> None:
    """No SEAMCALL is probed, and no page was faulted on twice: a TRACK may have been in flight."""
    found = findings("stock-boot-pure.txt")
    assert set(found.zero_steps["strength"]) <= {"weak"}
    assert found.vm_stats["zero_steps"].sum() == 0
    assert found.vcpu_stats["zero_steps"].sum() == 0
    assert not {"BUG", "HOSTILE"} & set(found.verdicts["verdict"].cast(pl.String))
