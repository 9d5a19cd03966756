"""Exit reasons, against the print format of a 6.18 kernel."""

from __future__ import annotations

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdxtrace.tdx.exit_reasons import exit_reason_name, exit_reason_number

NAMES = {
    0: "EXCEPTION_NMI",
    1: "EXTERNAL_INTERRUPT",
    2: "TRIPLE_FAULT",
    7: "INTERRUPT_WINDOW",
    10: "CPUID",
    12: "HLT",
    18: "VMCALL",
    30: "IO_INSTRUCTION",
    31: "MSR_READ",
    32: "MSR_WRITE",
    33: "INVALID_STATE",
    48: "EPT_VIOLATION",
    49: "EPT_MISCONFIG",
    52: "PREEMPTION_TIMER",
    74: "BUS_LOCK",
    75: "NOTIFY",
    77: "TDCALL",
    85: "MSR_WRITE_IMM",
}


def name_of(reason: int | None) -> object:
    return pl.select(exit_reason_name(pl.lit(reason, dtype=pl.UInt32))).item()


@pytest.mark.parametrize(("number", "name"), NAMES.items())
def test_reasons_have_the_names_of_the_kernel(number: int, name: str) -> None:
    assert name_of(number) == name
    assert exit_reason_number(name) == number


@pytest.mark.parametrize(
    ("number", "name"),
    [
        (0x80000021, "INVALID_STATE FAILED_VMENTRY"),
        (0x04000030, "EPT_VIOLATION 0x4000000"),
        (0x84000030, "EPT_VIOLATION FAILED_VMENTRY 0x4000000"),
        (76, "0x4c"),  # SEAMCALL, which the kernel does not name
        (6, "0x6"),
        (0xFFFF, "0xffff"),
        (0xFFFFFFFF, "FAILED_VMENTRY (-1)"),
    ],
)
def test_high_bits_and_unnamed_reasons_are_written_as_the_kernel_does(
    number: int, name: str
) -> None:
    assert name_of(number) == name
    assert exit_reason_number(name) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("0xffff FAILED_VMENTRY 0x7fff0000", 0xFFFFFFFF),  # kernel, busy TDH.VP.ENTER
        ("UNKNOWN (4294967295)", 0xFFFFFFFF),  # libtraceevent, the same
        ("UNKNOWN (77)", 77),
        ("UNKNOWN (2147483681)", 0x80000021),
        ("PENDING_INTERRUPT", 7),
        (" HLT ", 12),
        ("npf", None),  # AMD
        ("FAILED_VMENTRY", None),
        ("HLT NONSENSE", None),
        ("0x123456789", None),
        ("", None),
    ],
)
def test_reasons_are_read_whichever_tool_printed_them(text: str, number: int | None) -> None:
    assert exit_reason_number(text) == number


def test_null_stays_null() -> None:
    assert name_of(None) is None


@given(st.integers(0, 2**32 - 1))
def test_a_reason_survives_being_written(number: int) -> None:
    assert exit_reason_number(str(name_of(number))) == number
