"""SEAMCALL tracepoints that were proposed or are out of tree."""

from __future__ import annotations

from typing import Any

import polars as pl
import pytest
from support.texts import BUSY, is_accounted_for, line, lost, read_text

from tdxtrace.ingest.events.fields import OUT_OF_TREE


def values(event: str, args: str) -> dict[str, int]:
    return OUT_OF_TREE[event][1](args).values


ENTER = "cpu: 1 op: TDH_MEM_PAGE_AUG rcx: 0x80000001 rdx: 0x12000 r8: 0x13000 r9: 0x0 r10: 0x0"
EXIT = "cpu: 1 op: TDH_MEM_PAGE_AUG err {} rcx: 0x807 rdx: 0x401 r8: 0x0 r9: 0x0 r10: 0x0 r11: 0x0"
INTEL = "op: TDH_MEM_PAGE_AUG(6) 80000001 12000 13000 0 0"
INTEL_RET = "op: TDH_MEM_PAGE_AUG(6) err: {} 807 401 0 0 0 0"


@pytest.mark.parametrize(
    ("event", "args"), [("kvm_tdx_seamcall_enter", ENTER), ("tdx_seamcall", INTEL)]
)
def test_entries_name_the_leaf_and_its_registers(event: str, args: str) -> None:
    assert values(event, args) == {
        "leaf": 6,
        "version": 0,
        "rcx": 0x8000_0001,
        "rdx": 0x12000,
        "r8": 0x13000,
    }


@pytest.mark.parametrize(
    ("event", "args", "status"),
    [
        ("kvm_tdx_seamcall_exit", EXIT.format("TDX_SUCCESS 0x0"), 0),
        ("kvm_tdx_seamcall_exit", EXIT.format("TDX_OPERAND_BUSY 0x8000020000000092"), BUSY),
        ("kvm_tdx_seamcall_exit", EXIT.format("<unknown> 0x8000020000000092"), BUSY),
        ("kvm_tdx_seamcall_exit", EXIT.format(" 0x8000020000000092"), BUSY),
        ("kvm_tdx_seamcall_exit", EXIT.format("TDX_SUCCESS 0x30"), 0x30),
        ("kvm_tdx_seamcall_exit", EXIT.format("TDX_SUCCESS 0x1"), 1),
        ("tdx_seamret", INTEL_RET.format("TDX_SUCCESS(0)"), 0),
        ("tdx_seamret", INTEL_RET.format("TDX_SUCCESS(1)"), 1),
        ("tdx_seamret", INTEL_RET.format("TDX_OPERAND_BUSY(8000020000000092)"), BUSY),
        ("tdx_seamret", INTEL_RET.format("(8000020000000092)"), BUSY),
    ],
)
def test_returns_name_the_status_and_the_output_registers(
    event: str, args: str, status: int
) -> None:
    found = values(event, args)
    assert found["status"] == status
    assert (found["leaf"], found["out_rcx"], found["out_rdx"]) == (6, 0x807, 0x401)


@pytest.mark.parametrize(
    ("op", "leaf", "version"),
    [
        ("TDH_VP_ENTER(0)", 0, 0),
        ("TDH_VP_INIT(10016)", 22, 1),
        ("TDH_MEM_TRACK", 38, 0),
        ("TDH.MEM.TRACK", 38, 0),
        ("UNKNOWN(26)", 38, 0),
    ],
)
def test_leaves_by_name_or_number(op: str, leaf: int, version: int) -> None:
    found = values("tdx_seamcall", f"op: {op} 1000 0 0 0 0")
    assert (found["leaf"], found["version"]) == (leaf, version)


@pytest.mark.parametrize("op", ["TDH_NO_SUCH_LEAF", "NO_SEAMLDR_CALL", "0x", "(zz)", ""])
def test_an_op_that_is_no_leaf_gives_none(op: str) -> None:
    assert "leaf" not in values("tdx_seamcall", f"op: {op} 1000 0 0 0 0")


def test_the_sept_event_prints_page_and_level() -> None:
    found = values("kvm_sept_seamcall", "op: 6 gpa: 0x80000000 hpa: 0x99000 level: 0")
    assert (found["leaf"], found["gpa"], found["page"], found["level"]) == (
        *(6, 0x8000_0000, 0x99000, 0),
    )


def rows(text: str, *names: str) -> list[tuple[Any, ...]]:
    trace = read_text(text)
    trace.check()
    assert is_accounted_for(trace)
    return trace.seamcalls.select(names).rows()


@pytest.mark.parametrize(
    ("enter", "leave"),
    [
        (f"kvm_tdx_seamcall_enter: {ENTER}", f"kvm_tdx_seamcall_exit: {EXIT}"),
        (f"tdx_seamcall: {INTEL}", f"tdx_seamret: {INTEL_RET}"),
    ],
)
@pytest.mark.parametrize("status", [0, BUSY, 0x30])
def test_a_pair_becomes_a_call(enter: str, leave: str, status: int) -> None:
    number = f"{status:x}" if "seamret" in leave else f"{status:#x}"
    said = f"NAME({number})" if "seamret" in leave else f"NAME {number}"
    text = line("1.000001", enter) + line("1.000004", leave.format(said))
    names = ("leaf", "gpa", "level", "td_id", "page", "status", "ext_err1", "ext_err2", "probe")
    assert rows(text, *names, "n_lines") == [
        (6, 0x8000_0000, 1, 0x12000, 0x13000, status, 0x807, 0x401, "tracepoint", 2),
    ]


def test_a_line_without_a_leaf_is_a_loss_and_no_row() -> None:
    trace = read_text(
        line("1.000001", "tdx_seamcall: op: (zz) 1000 0 0 0 0")
        + line("1.000002", f"tdx_seamcall: {INTEL}")
    )
    trace.check()
    assert lost(trace) == {"undecoded": 1}
    assert is_accounted_for(trace)


def test_a_return_without_a_status_is_a_loss_and_no_success() -> None:
    trace = read_text(
        line("1.000001", f"tdx_seamcall: {INTEL}")
        + line("1.000002", "tdx_seamret: op: TDH_MEM_PAGE_AUG(6)")
    )
    assert is_accounted_for(trace)
    assert trace.seamcalls["status"].to_list() == [None]
    assert trace.seamcalls.filter(pl.col("end_ns").is_not_null()).is_empty()


@pytest.mark.parametrize(
    ("op", "fn"),
    [
        ("SEAMLDR_INFO(8000000000000000)", 1 << 63),
        ("SEAMLDR_INSTALL", 1 << 63 | 1),
        ("P_SEAMLDR.SHUTDOWN", 1 << 63 | 2),
        ("UNKNOWN(8000000000000007)", 1 << 63 | 7),
        ("0x8000000000000007", 1 << 63 | 7),
    ],
)
def test_calls_of_the_loader_have_its_bit(op: str, fn: int) -> None:
    assert values("tdx_seamcall", f"op: {op} 1000 0 0 0 0")["fn"] == fn


def test_a_call_without_a_name_is_its_number() -> None:
    read = values("seamcall_enter", "cpuid: 1 op: 0x6 1000 0 0 0 0 0")
    assert (read["leaf"], read["rcx"]) == (6, 0x1000)
