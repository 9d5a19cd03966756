"""Leaves defined by table rows only are simulated, and their busy answers explained."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import polars as pl
import pytest

import tdxtrace
from tdxtrace.simulate import command

PACKAGE = Path(tdxtrace.__file__).parent
SCENARIO = """
name = "pages"
title = "calls on pages while the TD faults in memory"
description = "Host threads call leaves that take nothing but pages."
generation = "C"
kernel = "7.2"
duration_ms = 4
cpus = 16
[[tds]]
vcpus = 8
accepted = 0
[tds.guest]
program = "contend"
pages = 4096
run_us = 10
"""
WORKER = '[[tds.workers]]\nkind = "seamcall"\nleaf = "{}"\nevery_us = 6\n'
PAMT_ADD, PAMT_REMOVE = 58, 59
BUSY = 0x8000_0200_0000_0000


def scenario_of(*leaves: str) -> str:
    return SCENARIO + "".join(WORKER.format(leaf) for leaf in leaves)


def test_pamt_calls_are_simulated_and_explained(tmp_path: Path) -> None:
    """Linux's wrappers take a frame number; the pages that are given lie in a list."""
    leaves = ("TDH.PHYMEM.PAMT.ADD", "TDH.PHYMEM.PAMT.REMOVE")
    (tmp_path / "pages.toml").write_text(scenario_of(*leaves, *leaves))
    command.simulate(
        str(tmp_path / "pages.toml"),
        3,
        command.ScenarioChanges(),
        command.TraceOptions(),
        command.OutputPaths(tmp_path / "trace.txt", tmp_path / "truth"),
    )
    trace = tdxtrace.read_trace(tmp_path / "trace.txt")
    trace.check()
    causes = tdxtrace.analyze(trace, generation="C").busy_causes
    mine = causes.filter(pl.col("leaf").is_in([PAMT_ADD, PAMT_REMOVE]), pl.col("rank") == 1)
    # A frame number that is a multiple of 4096 reads like an address: then a page in the range
    # of such a number does not match it.
    assert mine.filter(pl.col("cause") == "host_conflict").height > 0.98 * mine.height
    with (tmp_path / "truth" / "truth_busy.csv").open() as file:
        true = Counter(row["holder"] for row in csv.DictReader(file) if row["operand"] == "1")
    found = Counter(mine["holder_leaf"].to_list())
    assert found.total() == true.total() > 100
    # Of two that both fit, either may be named.
    for leaf, name in ((PAMT_ADD, leaves[0]), (PAMT_REMOVE, leaves[1])):
        assert abs(found[leaf] - true[name]) <= 0.05 * found.total()


NEW = "TDH.PHYMEM.PAIR.BIND"
READER = {
    "leaves": f"77,{NEW},0,page,,inferred: made for a test",
    "operands": f"77,{NEW},RCX,page,inferred: test\n77,{NEW},RDX,page 2,inferred: test",
    "wrappers": "tdh_phymem_pair_bind,77,,page page_2,,inferred: made for a test",
    "locks": f"C,{NEW},1,PAMT,page,EX,sharex_hp,leaf,,0x1,,inferred: test\n"
    f"C,{NEW},2,PAMT,page,EX,sharex_hp,leaf,,0x2,,inferred: test",
    "resources": f"77,{NEW},0x1,PAMT entry,,,inferred: test\n"
    f"77,{NEW},0x2,PAMT entry,,,inferred: test",
}
SIMULATOR = {
    "leaves": f"{NEW},77,tdh_phymem_pair_bind,page page_2,,yes,90",
    "operands": f"{NEW},RCX,page\n{NEW},RDX,page 2",
    "locks": f"C,{NEW},PAMT_NEW EX RCX; PAMT_PAGE_2 EX RDX",
}
PROGRAM = """
import json
from pathlib import Path
import tdxtrace.simulate.tables as tables
import tdxtrace.tdx.facts as facts
tables._DATA, facts._DATA = Path("simulator"), Path("reader")
import tdxtrace
from tdxtrace.cli.main import app
app(["simulate", "pages.toml", "-q", "-o", "trace.txt", "--probes", "PROBES"],
    standalone_mode=False)
trace = tdxtrace.read_trace("trace.txt")
trace.check()
causes = tdxtrace.analyze(trace, generation="C").busy_causes.filter(leaf=77, rank=1)
calls = trace.seamcalls.filter(leaf=77).select("page", "page_2", "status")
print(json.dumps([calls.rows(), causes["cause"].to_list()]))
"""


def with_rows(source: Path, target: Path, more: dict[str, str]) -> None:
    shutil.copytree(source, target)
    for name, rows in more.items():
        with (target / f"{name}.csv").open("a") as file:
            file.write(rows + "\n")


@pytest.mark.parametrize("probes", ["wrappers", "seamcall"])
def test_a_new_leaf_with_two_pages_is_rows_in_the_simulator_too(
    probes: str, tmp_path: Path
) -> None:
    with_rows(PACKAGE / "tdx" / "data", tmp_path / "reader", READER)
    with_rows(PACKAGE / "simulate" / "data", tmp_path / "simulator", SIMULATOR)
    (tmp_path / "pages.toml").write_text(scenario_of(NEW, "TDH.PHYMEM.PAMT.REMOVE"))
    program = PROGRAM.replace("PROBES", probes)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    calls, causes = json.loads(done.stdout)
    assert len(calls) > 50
    assert all(first and second and first != second for first, second, _ in calls)
    busy = {BUSY | operand for operand in (1, 2)}
    n_busy = sum(status in busy for _, _, status in calls)
    assert {status for _, _, status in calls} <= {0, *busy}
    assert len(causes) == n_busy > 0
    # Their wrappers name pages in two ways, which are not compared.
    expected = "host_conflict" if probes == "seamcall" else "unexplained"
    assert set(causes) == {expected}
