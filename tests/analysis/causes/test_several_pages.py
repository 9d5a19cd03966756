"""Calls with several page operands: the busy page is the one that the status names.

A leaf is nothing but rows of the tables in tdxtrace/tdx/data: the last test adds one that no
module has.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from support.texts import line

import tdxtrace
import tdxtrace.tdx.facts

# Numbers of intel/tdx-module 1.5.20 include/tdx_api_defs.h and tdx_error_codes_defs.h.
AUG, DEMOTE, RECLAIM, PAMT_ADD = 0x06, 0x0F, 0x1C, 0x3A
SPDM_CREATE, MMIO_BLOCK = 130, 159
BUSY = 0x8000_0200_0000_0000
RCX, RDX, R8, R9, TREE = 0x1, 0x2, 0x8, 0x9, 0x92

RANGE, FIRST, SECOND = 0x1_0020_0000, 0x9_9000, 0x9_A000
ADDS = {"rcx": RANGE | 1, "rdx": FIRST, "r8": SECOND}


def call(
    tid: int, begins: int, ends: int, leaf: int, status: int = 0, **registers: int
) -> list[tuple[int, str]]:
    """A SEAMCALL of a thread from one microsecond to another, seen by probes on __seamcall."""
    inputs = " ".join(f"{name}={value:#x}" for name, value in registers.items())
    place: dict[str, Any] = {"task": f"vm-{tid}", "cpu": tid % 8}
    entry = f"sc_in: (__seamcall+0x0/0x40) fn={leaf:#x} {inputs}"
    back = f"sc: (seamcall+0x9b/0xb0 <- __seamcall) ret={status:#x}"
    return [
        (begins, line(f"1.{begins:06}", entry, **place)),
        (ends, line(f"1.{ends:06}", back, **place)),
    ]


def text_of(*calls: list[tuple[int, str]]) -> str:
    return "".join(text for _, text in sorted(event for one in calls for event in one))


def answers(text: str, folder: Path) -> list[tuple[Any, ...]]:
    """Leaf of each busy call, its cause, the thread that held the lock, and the two modes."""
    (folder / "trace.txt").write_text(text)
    trace = tdxtrace.read_trace(folder / "trace.txt")
    causes = tdxtrace.analyze(trace, generation="C").busy_causes
    first = causes.filter(pl.col("rank") == 1)
    return first.select("leaf", "cause", "holder_tid", "mode", "holder_mode").rows()


@pytest.mark.parametrize(
    ("operand", "page", "mode"),
    [
        # A page of the 2M range that is to be added, and the pages that are given for it.
        (RCX, RANGE + 0x3_4000, "EX"),
        (RDX, FIRST, "SH"),
        (R8, SECOND, "SH"),
    ],
)
def test_the_holder_is_the_call_on_the_page_that_was_busy(
    operand: int, page: int, mode: str, tmp_path: Path
) -> None:
    others = {RANGE + 0x3_4000, FIRST, SECOND} - {page}
    reclaims = [call(20 + n, 100, 300, RECLAIM, rcx=other) for n, other in enumerate(others)]
    text = text_of(
        *reclaims,
        call(11, 100, 300, RECLAIM, rcx=page),
        call(12, 200, 210, PAMT_ADD, BUSY | operand, **ADDS),
    )
    assert answers(text, tmp_path) == [(PAMT_ADD, "host_conflict", 11, mode, "EX")]


@pytest.mark.parametrize("page", [RANGE, RANGE + 0x1F_F000, FIRST, SECOND])
def test_every_page_of_a_call_excludes_other_calls(page: int, tmp_path: Path) -> None:
    augs = {"rcx": 0x8000_0000, "rdx": 0x7_D000, "r8": page}
    busy = call(11, 200, 210, AUG, BUSY | R8, **augs)
    text = text_of(busy, call(12, 100, 300, PAMT_ADD, **ADDS))
    assert answers(text, tmp_path)[0][:3] == (AUG, "host_conflict", 12)


@pytest.mark.parametrize("page", [RANGE + 0x20_0000, FIRST - 0x1000, SECOND + 0x1000])
def test_a_neighbouring_page_has_no_conflict(page: int, tmp_path: Path) -> None:
    augs = {"rcx": 0x8000_0000, "rdx": 0x7_D000, "r8": page}
    busy = call(11, 200, 210, AUG, BUSY | R8, **augs)
    text = text_of(busy, call(12, 100, 300, PAMT_ADD, **ADDS))
    assert answers(text, tmp_path)[0][:3] == (AUG, "unexplained", None)


def test_a_page_that_was_not_captured_explains_nothing(tmp_path: Path) -> None:
    held = call(11, 100, 300, RECLAIM, rcx=FIRST)
    busy = call(12, 200, 210, PAMT_ADD, BUSY | RDX, rcx=RANGE | 1)
    (tmp_path / "trace.txt").write_text(text_of(held, busy))
    trace = tdxtrace.read_trace(tmp_path / "trace.txt")
    (answer,) = tdxtrace.analyze(trace, generation="C").busy_causes.to_dicts()
    assert (answer["cause"], answer["lacks"]) == ("unexplained", "arguments")


def test_a_page_in_a_register_that_no_capture_has_accuses_nobody(tmp_path: Path) -> None:
    """R9 of DEMOTE is an L2 SEPT page: who has the page in R8 did not hold it."""
    held = call(11, 100, 300, RECLAIM, rcx=FIRST)
    busy = call(12, 200, 210, DEMOTE, BUSY | R9, rcx=0x8000_0001, rdx=0x7_D000, r8=FIRST)
    assert answers(text_of(held, busy), tmp_path) == [(DEMOTE, "unexplained", None, "EX", None)]


@pytest.mark.parametrize(
    ("td", "expected"),
    [(0x7_D000, ("host_conflict", 12, "SH", "EX")), (0x8_D000, ("unexplained", None, "SH", None))],
)
def test_mmio_block_keeps_the_tree_of_its_td(
    td: int, expected: tuple[Any, ...], tmp_path: Path
) -> None:
    """In 2.0.18 it takes the SEPT tree alone, as RANGE.BLOCK does."""
    augs = {"rcx": 0x8000_0000, "rdx": 0x7_D000, "r8": FIRST}
    busy = call(11, 200, 210, AUG, BUSY | TREE, **augs)
    held = call(12, 100, 300, MMIO_BLOCK, rcx=0x9000_0000, rdx=td)
    assert answers(text_of(busy, held), tmp_path) == [(AUG, *expected)]


def test_without_a_recorded_iommu_no_call_is_a_holder(tmp_path: Path) -> None:
    """Two calls of TDX Connect at once may be on two IOMMUs: neither kept the other out."""
    busy = call(11, 200, 210, SPDM_CREATE, BUSY | RCX, rcx=0x1000, rdx=1, r8=FIRST)
    held = call(12, 100, 300, SPDM_CREATE, rcx=0x2000, rdx=2, r8=SECOND)
    text = text_of(busy, held)
    assert answers(text, tmp_path) == [(SPDM_CREATE, "unexplained", None, "EX", None)]
    trace = tdxtrace.read_trace(tmp_path / "trace.txt")
    assert tdxtrace.analyze(trace, generation="C").busy_causes["lacks"].to_list() == ["arguments"]


ROWS = {
    "leaves": '77,TDH.PHYMEM.PAIR.BIND,0,page,,"inferred: made for a test"',
    "operands": """77,TDH.PHYMEM.PAIR.BIND,RCX,page,inferred: made for a test
77,TDH.PHYMEM.PAIR.BIND,RDX,page 2,inferred: made for a test""",
    "wrappers": "tdh_phymem_pair_bind,77,,page page_2,,inferred: made for a test",
    "locks": """C,TDH.PHYMEM.PAIR.BIND,1,PAMT,page,SH,sharex_hp,leaf,,0x1,,inferred: made for a test
C,TDH.PHYMEM.PAIR.BIND,2,PAMT,page,EX,sharex_hp,leaf,,0x2,,inferred: made for a test""",
    "resources": """77,TDH.PHYMEM.PAIR.BIND,0x1,PAMT entry,,,inferred: made for a test
77,TDH.PHYMEM.PAIR.BIND,0x2,PAMT entry of the pair,,,inferred: made for a test""",
}
PROGRAM = """
import json, sys
from pathlib import Path
import tdxtrace.tdx.facts
tdxtrace.tdx.facts._DATA = Path("data")
import tdxtrace
from tdxtrace.ingest.read import ReadOptions, convert
convert(["trace.txt"], Path("store"), ReadOptions())
trace = tdxtrace.read_trace("trace.txt")
assert trace.seamcalls.equals(tdxtrace.read_trace("store").seamcalls)
findings = tdxtrace.analyze(trace, generation="C")
print(json.dumps([trace.seamcalls.to_dicts(), findings.busy_causes.to_dicts(),
                  findings.leaf_stats["leaf"].to_list()]))
"""


def test_a_leaf_with_two_pages_is_rows_of_tables_alone(tmp_path: Path) -> None:
    source = Path(tdxtrace.tdx.facts.__file__).parent / "data"
    shutil.copytree(source, tmp_path / "data")
    for name, rows in ROWS.items():
        with (tmp_path / "data" / f"{name}.csv").open("a") as file:
            file.write(rows + "\n")
    place: dict[str, Any] = {"task": "vm-14", "cpu": 4}
    entry = "bind: (tdh_phymem_pair_bind+0x4/0xb0) arg1=0x50000 arg2=0x51000"
    back = "bind_done: (tdx_bind+0x9b/0xb0 <- tdh_phymem_pair_bind) ret=0x0"
    text = text_of(
        # The second page is held by thread 11, the first by one that kept nobody out.
        call(11, 100, 300, RECLAIM, rcx=SECOND),
        call(13, 100, 300, RECLAIM, rcx=FIRST),
        call(12, 200, 210, 77, BUSY | RDX, rcx=FIRST, rdx=SECOND),
        # Probed by its wrapper, it holds its second page against thread 15.
        [(400, line("1.000400", entry, **place)), (600, line("1.000600", back, **place))],
        call(15, 500, 510, RECLAIM, BUSY | RCX, rcx=0x5_1000),
    )
    (tmp_path / "trace.txt").write_text(text)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    calls, causes, leaves = json.loads(done.stdout)
    bound = [(c["page"], c["page_2"], c["status"]) for c in calls if c["leaf"] == 77]
    assert bound == [(FIRST, SECOND, BUSY | RDX), (0x5_0000, 0x5_1000, 0)]
    assert leaves.count(77) == 1
    first = {one["leaf"]: one for one in causes if one["rank"] == 1}
    mine = first[77]
    assert (mine["cause"], mine["holder_tid"], mine["mode"]) == ("host_conflict", 11, "EX")
    assert mine["resource"] == "PAMT entry of the pair"
    assert (first[RECLAIM]["holder_tid"], first[RECLAIM]["holder_leaf"]) == (14, 77)
