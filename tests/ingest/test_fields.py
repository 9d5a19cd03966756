"""Numbers as tools print them, and their positions in the text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdxtrace.ingest.events.fields import exit_reason, pairs, to_word
from tdxtrace.ingest.events.registry import KEYS

WORD = 0x8000_0200_0000_0092


@pytest.mark.parametrize(
    "text",
    [
        "0x8000020000000092",
        "0X8000020000000092",
        "8000020000000092",
        "9223374235878031506",
        "-9223369837831520110",
    ],
)
def test_one_word_in_every_spelling(text: str) -> None:
    assert to_word(text) == WORD


@pytest.mark.parametrize(
    ("text", "base", "expected"),
    [
        ("0", 0, 0),
        ("48", 0, 48),
        ("-1", 0, 0xFFFF_FFFF_FFFF_FFFF),
        ("-9223372036854775808", 0, 1 << 63),
        ("18446744073709551615", 0, (1 << 64) - 1),
        ("ff11000123456000", 0, 0xFF11_0001_2345_6000),
        ("55a5b89d9159", 0, 0x55A5_B89D_9159),
        ("80000b0e", 0, 0x8000_0B0E),
        ("1000", 16, 0x1000),
        ("0x1000", 16, 0x1000),
        # trace-cmd -R prints zero as nothing.
        ("0x", 0, 0),
        ("", 0, 0),
    ],
)
def test_numbers(text: str, base: int, expected: int) -> None:
    assert to_word(text, base) == expected


@pytest.mark.parametrize(
    "text",
    [
        "0x1ffffffffffffffff",
        "18446744073709551616",
        "-9223372036854775809",
        "xyz",
        "0xg",
        "-",
        "0x-1",
        "1.5",
        "(null)",
        "9" * 5000,
        "0x" + "f" * 5000,
    ],
)
def test_what_is_no_word_is_none(text: str) -> None:
    assert to_word(text) is None


@given(st.integers(0, (1 << 64) - 1))
def test_hex_and_both_decimals_of_any_word_are_the_same(word: int) -> None:
    assert {to_word(f"{word:#x}"), to_word(f"{word:016x}", 16)} == {word}
    # A decimal of 16 digits is the one that a bare hex of the same look shadows.
    if len(str(word)) != 16:
        signed = word - (1 << 64) if word >> 63 else word
        assert {to_word(str(word)), to_word(str(signed))} == {word}


@given(st.text(max_size=40))
def test_any_text_is_a_word_or_none(text: str) -> None:
    word = to_word(text)
    assert word is None or 0 <= word < 1 << 64


def values(args: str) -> dict[str, int]:
    return pairs(args, KEYS).values


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (
            "(tdh_mem_page_aug+0x4/0xb0) td=0xff1 gpa=0x80000000 level=0",
            {"td_id": 0xFF1, "gpa": 0x8000_0000, "level": 0},
        ),
        (
            "(5646b46b3a50) td=0x5 gpa=1006ba000 level=1",
            {"td_id": 5, "gpa": 0x1006_BA000, "level": 1},
        ),
        ("(0x1 <- 0x2) ret=0x8000020000000092", {"status": WORD}),
        ("(0x1 <- 0x2) ret=-9223369837831520110", {"status": WORD}),
        (
            "__probe_ip=0x560769581020 (94589832138784) td=0x5607a410c6a0 (94590817322656) "
            "gpa=0x100400000 (4299161600) level=0x1 (1)",
            {"td_id": 0x5607_A410_C6A0, "gpa": 0x1_0040_0000, "level": 1},
        ),
        (
            "__probe_func=559401456f40 __probe_ret_ip=55940145781a ret=0x8000020000000092",
            {"status": WORD},
        ),
        ("(0x1) td=0x5,gpa=0x6000,level=0", {"td_id": 5, "gpa": 0x6000, "level": 0}),
        # Upper case, strings and arrays that hold what looks like a field.
        ("(0x1) TD=0x5 GPA=0x6000", {"td_id": 5, "gpa": 0x6000}),
        ('(0x1) comm="td=9 gpa=9" td=0x5', {"td_id": 5}),
        ("(0x1) vp=0x5 regs={0x0,0x1,0x2,0x3}", {"vp_id": 5}),
        # The first of two counts.
        ("(0x1) td=0x5 td=0x6", {"td_id": 5}),
        # Memory that the probe could not read is not zero.
        ("(0x1) td=(fault) gpa=0x6000", {"gpa": 0x6000}),
        ("(0x1 <- 0x2) ret=0x0 ext1=(fault) ext2=0x4", {"status": 0, "ext_err2": 4}),
        ("(0x1)", {}),
        ("", {}),
        ("nothing at all", {}),
        ("gpa", {}),
        # Another key that ends like one of ours.
        ("(0x1) mytd=0x5 xgpa=0x6", {}),
        ("(0x1) status=0x30 hi=0x80000200 lo=0x92", {"status": 0x30}),
    ],
)
def test_pairs_of_key_and_value(args: str, expected: dict[str, int]) -> None:
    assert values(args) == expected


@pytest.mark.parametrize(
    ("args", "slot"),
    [
        *((f"{key}=0x5", "td_id") for key in ("td", "tdr", "kvm_tdx", "td_id")),
        *((f"{key}=0x5", "vp_id") for key in ("vp", "tdvpr", "vp_id")),
        *((f"{key}=0x5", "level") for key in ("level", "lvl")),
        *((f"{key}=0x5", "page") for key in ("page", "pfn", "hpa")),
        *((f"{key}=0x5", "ext_err1") for key in ("ext1", "ext_err1", "e1")),
        *((f"{key}=0x5", "ext_err2") for key in ("ext2", "ext_err2", "e2", "level_state")),
        *((f"{key}=0x5", "status") for key in ("ret", "retval", "status", "err", "rc", "rax")),
        *((f"{key}=0x5", key) for key in ("gpa", "gfn", "fn", "rcx", "rdx", "r8")),
        *((f"{key}=5", "vcpu_id") for key in ("vcpu", "vcpu_id")),
    ],
)
def test_names_that_people_give_arguments(args: str, slot: str) -> None:
    assert values(f"(0x1) {args}") == {slot: 5}


def test_spans_say_where_each_number_stands() -> None:
    args = "(tdh_mem_page_aug+0x4/0xb0) td=0xff1 gpa=80000000a level=0"
    fields = pairs(args, KEYS)
    shown = {slot: args[begin:end] for slot, (begin, end) in fields.spans.items()}
    assert shown == {"td_id": "0xff1", "gpa": "80000000a", "level": "0"}


@given(st.text(alphabet="tdgpa=0x12 (),<->{}\"'", max_size=60))
def test_any_text_gives_words_whose_spans_print_them(args: str) -> None:
    fields = pairs(args, KEYS)
    for slot, (begin, end) in fields.spans.items():
        assert to_word(args[begin:end]) == fields.values[slot]
    for begin, end in fields.unread(args):
        assert 0 <= begin < end <= len(args)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("EPT_VIOLATION", 48),
        ("HLT", 12),
        ("TDCALL", 77),
        ("EXTERNAL_INTERRUPT", 1),
        ("EPT_MISCONFIG", 49),
        ("PENDING_INTERRUPT", 7),
        ("INVALID_STATE FAILED_VMENTRY", 0x8000_0021),
        ("0xffff FAILED_VMENTRY 0x7fff0000", 0xFFFF_FFFF),
        ("UNKNOWN (4294967295)", 0xFFFF_FFFF),
        ("UNKNOWN (77)", 77),
        ("UNKNOWN (2147483681)", 0x8000_0021),
        ("0x4c", 0x4C),
        ("ept_violation", 48),
    ],
)
def test_exit_reasons_as_kernel_and_plugin_print_them(text: str, expected: int) -> None:
    assert exit_reason(text) == expected


@pytest.mark.parametrize("text", ["NO_SUCH_REASON", "", " ", "0x", "0xzz", "npf", "-1"])
def test_what_is_no_exit_reason_is_none(text: str) -> None:
    assert exit_reason(text) is None


@given(st.text(max_size=40))
def test_any_text_is_an_exit_reason_or_none(text: str) -> None:
    found = exit_reason(text)
    assert found is None or found >= 0
