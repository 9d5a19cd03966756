"""Status words, against the numbers printed in the module's and the kernel's headers."""

from __future__ import annotations

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdxtrace.tdx import status as tdx
from tdxtrace.tdx import word

words = st.integers(0, 2**64 - 1)
low_halves = st.integers(0, 2**32 - 1)
run_time_bits = st.sampled_from([0, 1 << 61, 1 << 60, 3 << 60])

NAMES = {
    0x0000000000000000: "TDX_SUCCESS",
    0x4000000100000000: "TDX_NON_RECOVERABLE_VCPU",
    0x6000000200000000: "TDX_NON_RECOVERABLE_TD",
    0x6000000500000000: "TDX_NON_RECOVERABLE_TD_NON_ACCESSIBLE",
    0x8000000300000000: "TDX_INTERRUPTED_RESUMABLE",
    0x8000000400000000: "TDX_INTERRUPTED_RESTARTABLE",
    0xC000010000000000: "TDX_OPERAND_INVALID",
    0x8000020000000000: "TDX_OPERAND_BUSY",
    0x8000020100000000: "TDX_PREVIOUS_TLB_EPOCH_BUSY",
    0x8000020200000000: "TDX_SYS_BUSY",
    0x8000020300000000: "TDX_RND_NO_ENTROPY",
    0x9000020500000000: "TDX_HOST_PRIORITY_BUSY_TIMEOUT",
    0x8000020600000000: "TDX_INTERRUPTED_BUSY",
    0xC000030000000000: "TDX_PAGE_METADATA_INCORRECT",
    0xC000060000000000: "TDX_TD_NOT_INITIALIZED",  # 1.0 only
    0xE000060400000000: "TDX_TD_FATAL",
    0x8000070200000000: "TDX_VCPU_NOT_ASSOCIATED",
    0x8000080000000000: "TDX_KEY_GENERATION_FAILED",
    0x8000081000000000: "TDX_TD_KEYS_NOT_CONFIGURED",
    0x0000082100000000: "TDX_NO_HKID_READY_TO_WBCACHE",
    0x8000082400000000: "TDX_FLUSHVP_NOT_DONE",
    0xC000092100000000: "TDX_INCORRECT_MSR_VALUE",
    0xC0000B0800000000: "TDX_TLB_TRACKING_NOT_DONE",
    0xC0000B0D00000000: "TDX_EPT_ENTRY_STATE_INCORRECT",
    0x0000114100000000: "TDX_TD_EXIT_ON_L2_VM_EXIT",
}
RETRYABLE = (
    0x8000020000000000,
    0x8000020000000001,
    0x8000020000000092,
    0x80000200000000A9,
    0x8000020100000000,
    0x8000020200000000,
    0x8000020300000000,
    0x8000000300000000,
    0x8000000400000000,
    0x8000000C00000000,
    0x8000020600000000,
    0x8000030700000000,
    0x8000080000000000,
)
FINAL = (
    0x0000000000000000,
    0x0000000000000030,
    0x4000000100000002,
    0x8000FF000000000D,
    0x8000070200000000,
    0x8000082400000000,
    0x9000020500000000,
    0xC000010000000001,
    0xC0000B0800000001,
    0xC0000B0D00000001,
    0x1234567800000000,
    0xFFFFFFFFFFFFFFFF,
)


def series(*statuses: int | None) -> pl.DataFrame:
    return pl.DataFrame({"status": statuses}, schema={"status": pl.UInt64})


def ask(expression: pl.Expr, *statuses: int | None) -> list[object]:
    return series(*statuses).select(expression).to_series().to_list()


STATUS = pl.col("status")


@pytest.mark.parametrize(("value", "name"), NAMES.items())
def test_codes_have_the_names_of_the_headers(value: int, name: str) -> None:
    assert ask(tdx.status_name(STATUS), value) == [name]


def test_constants_have_the_values_of_the_headers() -> None:
    expected = {name: value for value, name in NAMES.items() if hasattr(word, name)}
    assert {name: getattr(word, name) for name in expected} == expected
    assert word.TDX_INTERRUPTED_PAMT == 0x8000030700000000
    assert word.TDX_INTERRUPTED_LIST_FULL == 0x8000000C00000000
    assert word.TDX_SW_ERROR == 0x8000FF0000000000
    assert (word.TDX_OPERAND_ID_RCX, word.TDX_OPERAND_ID_SEPT) == (1, 0x92)


def test_the_data_file_agrees_with_the_constants() -> None:
    rows = dict(tdx.status_table().select("name", "status").iter_rows())
    for name in vars(word):
        if name.startswith("TDX_") and "OPERAND_ID" not in name:
            assert rows[name] == getattr(word, name)


def test_no_two_codes_are_compared_alike() -> None:
    codes = tdx.status_table().filter(word.low32(STATUS) == 0).select(word.status_code(STATUS))
    assert codes.to_series().is_unique().all()


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (0x4000000200000000, "TDX_NON_RECOVERABLE_TD"),  # Linux, module 1.0
        (0x6000000200000000, "TDX_NON_RECOVERABLE_TD"),  # module 1.5
        (0x6000000700000000, "TDX_NON_RECOVERABLE_TD_WRONG_APIC_MODE"),  # Linux
        (0xE000000700000000, "TDX_NON_RECOVERABLE_TD_WRONG_APIC_MODE"),  # module 1.5
        (0xC000000700000000, "TDX_NON_RECOVERABLE_TD_WRONG_APIC_MODE"),  # module 1.0
        (0xC000060400000000, "TDX_TD_FATAL"),  # module 1.0
        (0x2000000000000000, "TDX_SUCCESS"),  # TDH.IMPORT.ABORT
    ],
)
def test_values_that_kernel_and_module_spell_differently_are_the_same_code(
    value: int, name: str
) -> None:
    assert ask(tdx.status_name(STATUS), value) == [name]


def test_masking_bits_61_and_60_alone_does_not_unite_the_two_wrong_apic_modes() -> None:
    kernel, module = ask(word.status_code(STATUS), 0x6000000700000000, 0xE000000700000000)
    assert (kernel, module) == (0x4000000700000000, 0xC000000700000000)


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (0x8000FF0000000006, "TDX_SEAMCALL_UD"),
        (0x8000FF000000000D, "TDX_SEAMCALL_GP"),
        (0x8000FF00FFFF0000, "TDX_SEAMCALL_VMFAILINVALID"),
        (0x8000FF0000000003, "TDX_SW_ERROR"),
    ],
)
def test_words_made_by_the_kernel_are_told_apart_by_their_low_half(value: int, name: str) -> None:
    assert ask(tdx.status_name(STATUS), value) == [name]
    assert ask(tdx.status_class(STATUS), value) == ["software"]


def test_a_busy_word_is_taken_apart() -> None:
    assert ask(word.status_code(STATUS), 0x8000020000000092) == [0x8000020000000000]
    assert ask(word.status_code(STATUS), 0xB000020000000092) == [0x8000020000000000]
    assert ask(word.low32(STATUS), 0x8000020000000092) == [0x92]
    assert ask(tdx.status_class(STATUS), 0x8000020000000092) == ["busy"]
    assert ask(tdx.host_retry(STATUS), 0x8000020000000092) == ["same"]


@pytest.mark.parametrize("value", RETRYABLE)
def test_statuses_that_join_attempts(value: int) -> None:
    assert ask(tdx.is_retryable(STATUS), value) == [True]


@pytest.mark.parametrize("value", FINAL)
def test_statuses_that_end_a_chain(value: int) -> None:
    assert ask(tdx.is_retryable(STATUS), value) == [False]


def test_only_operand_busy_is_busy() -> None:
    others = (0x8000020100000000, 0x8000020200000000, 0x8000020300000000, 0x8000020400000001)
    assert ask(word.is_busy(STATUS), *others) == [False] * 4
    assert ask(word.is_busy(STATUS), 0x8000020000000000, 0x8000020000000001) == [True, True]


def test_the_deaths_of_a_td_have_the_error_bit_clear() -> None:
    deaths = (0x4000000100000002, 0x6000000200000000, 0x6000000500000000)
    assert ask(word.is_success(STATUS), *deaths) == [True] * 3
    assert ask(tdx.host_retry(STATUS), *deaths) == ["dead"] * 3


def test_every_host_retry_of_the_data_file_is_said_in_words() -> None:
    assert set(tdx.status_table()["host_retry"]) == set(tdx.HOST_RETRY)
    assert set(tdx.RETRIED) <= set(tdx.HOST_RETRY)


DESCRIBED = [
    (0x0000000000000000, 6, "SUCCESS"),
    (0x0000000000000030, 0, "exit EPT_VIOLATION"),
    (0x0000000000000000, 0, "exit EXCEPTION_NMI"),
    (0x000000000000004D, 0, "exit TDCALL"),
    (0x0000000000000003, 68, "SUCCESS 0x3"),  # TDH.EXPORT.MEM counts entries there
    (0x0000000000000030, None, "SUCCESS 0x30"),
    (0x4000000100000002, 0, "NON_RECOVERABLE_VCPU exit TRIPLE_FAULT"),
    (0xE000000700000001, 0, "NON_RECOVERABLE_TD_WRONG_APIC_MODE exit EXTERNAL_INTERRUPT"),
    (0x9000020500000000, 0, "0x9000020500000000 HOST_PRIORITY_BUSY_TIMEOUT"),
    (0x8000020000000092, 6, "OPERAND_BUSY SEPT tree"),
    (0x8000020000000001, 6, "OPERAND_BUSY SEPT entry"),
    (0x8000020000000001, 38, "OPERAND_BUSY TDR"),
    (0x8000020000000001, None, "OPERAND_BUSY RCX"),
    (0x8000020000000000, 6, "OPERAND_BUSY"),
    (0x8000020000001234, 6, "OPERAND_BUSY 0x1234"),
    (0x8000020300000000, 9, "RND_NO_ENTROPY"),
    (0x0000082100000000, 40, "NO_HKID_READY_TO_WBCACHE"),
    (0xC0000B0800000001, 15, "0xc0000b0800000001 TLB_TRACKING_NOT_DONE RCX"),
    (0xC000092100000122, 33, "0xc000092100000122 INCORRECT_MSR_VALUE"),
    (0x8000FF000000000D, 6, "0x8000ff000000000d SEAMCALL_GP"),
    (0xC123456700000001, 6, "0xc123456700000001"),
    (0x0123456700000001, 6, "0x123456700000001"),
    (None, 6, None),
    (None, None, None),
]


@pytest.mark.parametrize(("value", "leaf", "text"), DESCRIBED)
def test_a_status_is_said_in_a_few_words(
    value: int | None, leaf: int | None, text: str | None
) -> None:
    frame = series(value).with_columns(leaf=pl.lit(leaf, dtype=pl.UInt16))
    assert frame.select(tdx.describe_status(STATUS, pl.col("leaf"))).item() == text


def test_nulls_stay_null_and_unknown_codes_have_no_name() -> None:
    decoders = (tdx.status_name, tdx.status_class, tdx.host_retry)
    predicates = (word.is_busy, word.is_error, word.is_success, tdx.is_retryable)
    for decode in (*decoders, *predicates, word.status_code, word.low32):
        assert ask(decode(STATUS), None) == [None]
    for decode in decoders:
        assert ask(decode(STATUS), 0xC123456700000001) == [None]


def test_no_rows_give_no_rows_of_the_right_type() -> None:
    frame = series().select(
        word.status_code(STATUS),
        word.low32(STATUS).alias("low32"),
        tdx.status_name(STATUS).alias("name"),
        tdx.is_retryable(STATUS).alias("is_retryable"),
        tdx.describe_status(STATUS, pl.lit(0, dtype=pl.UInt16)).alias("words"),
    )
    assert frame.height == 0
    assert frame.dtypes == [pl.UInt64, pl.UInt32, pl.String, pl.Boolean, pl.String]


def test_bit_63_alone_is_an_error() -> None:
    assert ask(word.is_error(STATUS), 2**63 - 1, 2**63) == [False, True]


@given(words)
def test_a_word_is_either_an_error_or_a_success(value: int) -> None:
    assert ask(word.is_error(STATUS), value) == [value >= 2**63]
    assert ask(word.is_success(STATUS), value) == [value < 2**63]


@given(st.one_of(words, st.builds(int.__or__, st.sampled_from(list(NAMES)), low_halves)))
def test_what_is_retried_did_not_succeed(value: int) -> None:
    (is_retryable,), (is_success,) = (
        ask(tdx.is_retryable(STATUS), value),
        ask(word.is_success(STATUS), value),
    )
    assert not (is_retryable and is_success)


@given(st.sampled_from(sorted(NAMES)), low_halves, run_time_bits)
def test_the_low_half_and_run_time_bits_do_not_change_the_name(
    value: int, low: int, added: int
) -> None:
    assert ask(tdx.status_name(STATUS), value | low | added) == [NAMES[value]]


@given(words)
def test_code_low_half_and_run_time_bits_make_up_the_word(value: int) -> None:
    (code,), (low,) = ask(word.status_code(STATUS), value), ask(word.low32(STATUS), value)
    added = ask(word.bits(STATUS, word.FATAL_BIT | word.HOST_HINT_BIT), value)[0]
    assert isinstance(code, int)
    assert isinstance(low, int)
    assert isinstance(added, int)
    assert code + low + added == value


@pytest.mark.parametrize("bits", [0, 1 << 60, 1 << 61, 3 << 60])
def test_a_busy_operand_is_told_whatever_bits_the_module_sets(bits: int) -> None:
    on_sept = word.is_busy_on(STATUS, word.TDX_OPERAND_ID_SEPT)
    result = ask(on_sept, 0x8000020000000092 | bits, 0x80000200000000A9 | bits, 0xC000020000000092)
    assert result == [True, False, False]
