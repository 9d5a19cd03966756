"""Explanations of status words."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdxtrace.tdx.explain import MAX_LINES, as_text, explain, parse_status

words = st.integers(0, 2**64 - 1)
busy_words = st.integers(0, 0x1FF).map(lambda low: 0x8000020000000000 | low)


@pytest.mark.parametrize(
    "text",
    [
        "0x8000020000000092",
        "0X8000020000000092",
        "9223374235878031506",
        "-9223369837831520110",
        "8000020000000092",
        " 0x8000020000000092.\n",
        "8000020000000092,",
    ],
)
def test_one_word_in_all_the_spellings_of_the_tools(text: str) -> None:
    assert parse_status(text) == 0x8000020000000092


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("48", 48),
        ("0x30", 48),
        ("0000000000000030", 0x30),
        ("c000030000000001", 0xC000030000000001),
        ("-1", 0xFFFFFFFFFFFFFFFF),
        ("18446744073709551615", 0xFFFFFFFFFFFFFFFF),
        ("-9223372036854775808", 0x8000000000000000),
    ],
)
def test_other_words(text: str, value: int) -> None:
    assert parse_status(text) == value


@pytest.mark.parametrize(
    "text",
    [
        *("", "0x", "0x80000200000000920", "busy", "c0000300", "0x80000200_00000092", "1.5"),
        *("18446744073709551616", "-9223372036854775809", "--1", "-0x1", "\uff18"),
    ],
)
def test_what_is_no_word_is_named_and_the_accepted_forms_too(text: str) -> None:
    with pytest.raises(ValueError, match="not a status word") as error:
        parse_status(text)
    assert str(error.value) == (
        f"not a status word: {text!r}; accepted are 0x and up to 16 hex digits, "
        "16 hex digits, or a decimal of 64 bits"
    )
    assert "\n" not in str(error.value)


@given(words)
def test_a_word_survives_being_written_in_hexadecimal(value: int) -> None:
    assert parse_status(hex(value)) == value
    assert parse_status(f"{value:016x}") == value
    assert parse_status(f"{value:#018X}") == value


# Decimals of 16 digits are read as hexadecimal: they have reserved bits (59:48) set.
@given(words.map(lambda value: value & ~(0xFFF << 48)))
def test_a_word_survives_being_written_in_decimal(value: int) -> None:
    assert parse_status(str(value)) == value
    assert parse_status(str(value - 2**64 if value >= 2**63 else value)) == value


@given(st.integers(10**15, 10**16 - 1))
def test_a_decimal_of_16_digits_is_never_a_status_word(value: int) -> None:
    assert value & 0xFFF << 48


def test_the_zero_step_word_is_explained() -> None:
    known = explain(0x8000020000000092, leaf=0)
    assert (known.name, known.call) == ("TDX_OPERAND_BUSY", "TDH.VP.ENTER")
    assert known.low32 == "operand 0x92 SEPT_TREE"
    assert known.resource[0] == "SEPT tree"
    assert "zero-step mitigation is armed" in known.resource[1]
    assert known.retry.startswith("yes")
    assert (known.is_error, known.is_non_recoverable, known.is_fatal) == (True, False, False)
    assert any("td_exit_stepping.c" in source for source in known.sources)


# Trap: a stock trace shows both as kvm_exit reason -1 and zeros.
@pytest.mark.parametrize("status", [0x8000020000000092, 0x80000200000000A9, 0x8000020000000080])
def test_a_busy_entry_looks_alike_in_a_stock_trace(status: int) -> None:
    (reaction,) = explain(status, leaf=0).kvm
    assert "without limit" in reaction
    assert "reason -1 (0xffff FAILED_VMENTRY) and zeros, whatever the operand" in reaction


def test_a_busy_entry_lock_names_the_guests_calls() -> None:
    for held in explain(0x8000020000000001, leaf=6).holders:
        assert "TDG.MEM.PAGE.ACCEPT" in held.guest
    text = " ".join(as_text(explain(0x8000020000000001, leaf=6)).split())
    assert "guest: MEM.PAGE.ACCEPT, MEM.PAGE.ATTR.RD, MEM.PAGE.ATTR.WR" in text


def test_without_a_leaf_the_text_says_what_rcx_is_where() -> None:
    known = explain(0x8000020000000001)
    assert known.holders == ()
    assert known.call is None
    text = "\n".join(known.resource)
    assert "SEPT entry: most MEM.*" in text
    assert "TDVPR: most VP.*" in text
    assert "MEM.TRACK" in next(line for line in known.resource if line.startswith("TDR: "))
    assert "PHYMEM.*" in next(line for line in known.resource if line.startswith("PAMT entry: "))


@pytest.mark.parametrize(
    ("status", "leaf", "words_of_kvm"),
    [
        (0x8000020000000092, 6, "as often as it takes"),
        (0x8000020000000092, 7, "calls once more; busy again kills the VM"),
        (0x80000200000000A9, 38, "calls once more; busy again kills the VM"),
        (0x8000020100000000, 38, "not taken for busy"),
        (0x8000020300000000, 8, "10 calls in all"),
        (0x8000020300000000, 8, "the VM is dead"),
        (0x8000020300000000, None, "10 calls in all"),
        (0x8000020000000001, None, "every operand counts"),
        (0x8000020000000001, 17, "ends with -EBUSY"),
        (0x8000020000000080, 22, "not retried, busy or not"),
        (0x8000020300000000, 9, "then -EAGAIN"),
        (0x8000000300000000, 40, "10000 calls at most"),
        (0x0000082100000000, 40, "taken for success"),
        (0xC000030000000001, 28, "the page is leaked"),
        (0xC000010000000045, 21, "-EINVAL"),
        (0x8000070200000000, 18, "taken for success"),
        (0x8000FF000000000D, 0, "no kvm_exit is traced"),
    ],
)
def test_what_kvm_does_is_said(status: int, leaf: int, words_of_kvm: str) -> None:
    assert words_of_kvm in "\n".join(explain(status, leaf=leaf).kvm)


def test_what_kvm_does_with_a_success_is_not_made_up() -> None:
    assert explain(0, leaf=28).kvm == ()


@pytest.mark.parametrize(
    ("status", "leaf", "low32"),
    [
        (0x30, 0, "exit EPT_VIOLATION"),
        (0x30, None, "exit EPT_VIOLATION, if TDH.VP.ENTER returned it"),
        (0x30, 6, "low half 0x30"),
        (0, 6, None),
        (0, None, None),
        (0x4000000100000002, 0, "exit TRIPLE_FAULT"),
        (0x9000020500000000, 0, None),
        (0xC000010000000000, 6, "operand 0x0 RAX"),
        (0xC000010000000045, 21, "operand 0x45 CPUID_CONFIG"),
        (0xC000092100000122, 33, "MSR 0x122"),
        (0x8000020000000000, 6, None),
        (0x8000020000007777, 6, "operand 0x7777 (unknown)"),
        (0x8000FF000000000D, 6, "exception vector 0xd"),
        (0xC123456700000001, None, "low half 0x1"),
    ],
)
def test_the_low_half_is_read_by_the_code(status: int, leaf: int | None, low32: str | None) -> None:
    assert explain(status, leaf=leaf).low32 == low32


def test_a_busy_word_without_operand_names_no_resource() -> None:
    known = explain(0x8000020000000000, leaf=6)
    assert (known.operand_id, known.resource, known.holders) == (None, (), ())


def test_an_unknown_code_is_said_to_be_unknown() -> None:
    assert as_text(explain(0x1234567800000000)).splitlines() == [
        "0x1234567800000000  unknown code",
        "class    unknown; bits set: host hint",
        "meaning  not known",
        "retry    not known: the module's source was not read for this code",
    ]


def test_a_line_from_a_real_log_on_one_screen() -> None:
    # canonical/tdx issue 213: SEAMCALL (0x000000000000000f) failed: 0xc0000b0800000001
    assert as_text(explain(0xC0000B0800000001, leaf=15)) == (
        "0xc0000b0800000001  TDX_TLB_TRACKING_NOT_DONE, operand 0x1 RCX\n"
        "class    SEPT; bits set: error, non-recoverable\n"
        "leaf     15 TDH.MEM.PAGE.DEMOTE, version 0\n"
        "meaning  vCPUs may still hold the translation: TRACK, and kick them, before\n"
        "         this call\n"
        "retry    not by itself: another call or change has to come first\n"
        "source   intel/tdx-module 1.5.01 include/auto_gen/tdx_error_codes_defs.h"
    )


@given(
    st.one_of(words, busy_words),
    st.one_of(st.none(), st.integers(0, 200)),
    st.integers(0, 2),
    st.integers(20, 120),
)
def test_every_explanation_fits_one_screen(
    status: int, leaf: int | None, version: int, width: int
) -> None:
    lines = as_text(explain(status, leaf, version), width).splitlines()
    assert len(lines) <= MAX_LINES == 24
    assert all(len(line) <= max(width, 40) and line == line.rstrip() for line in lines)
    assert lines[0].startswith(f"{status:#018x}")


def test_what_does_not_fit_is_marked() -> None:
    lines = as_text(explain(0x8000020000000001, leaf=29), width=40).splitlines()
    assert len(lines) == 24
    assert any(line.endswith(" ...") for line in lines)
