"""The P-SEAMLDR: status words that apply only to calls with bit 63 set at entry."""

from __future__ import annotations

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdxtrace.tdx import status, word
from tdxtrace.tdx.explain import as_text, explain, explain_loader
from tdxtrace.tdx.loader import (
    loader_leaf_table,
    loader_status_name,
    loader_status_table,
    parse_loader_leaf,
)
from tdxtrace.tdx.status import HOST_RETRY

STATUS = pl.col("status")
# p-seam-loader/include/pseamldr_api_defs.h.
NAMES = {
    0: "PSEAMLDR_SUCCESS",
    0x8000000000000000: "PSEAMLDR_EBADPARAM",
    0x8000000000000003: "PSEAMLDR_EBADCALL",
    0x8000000000010002: "PSEAMLDR_ENOMEM",
    0x8000000000020001: "PSEAMLDR_EBADHASH",
    0x8000000000030000: "PSEAMLDR_EINTERRUPT",
    0x8000000000030001: "PSEAMLDR_ENOENTROPY",
}


def named(value: int | None) -> object:
    frame = pl.Series("status", [value], dtype=pl.UInt64).to_frame()
    return frame.select(loader_status_name(STATUS)).item()


@pytest.mark.parametrize(("value", "name"), NAMES.items())
def test_words_have_the_names_of_the_header(value: int, name: str) -> None:
    assert named(value) == name
    known = explain_loader(value, 1)
    assert (known.name, known.call, known.is_loader) == (name, "SEAMLDR.INSTALL", True)
    assert known.low32 is None


@pytest.mark.parametrize("value", [value for value in NAMES if value])
def test_no_such_word_is_one_of_the_module(value: int) -> None:
    """Of a leaf of the module it says nothing, whatever it looks like."""
    frame = pl.Series("status", [value], dtype=pl.UInt64).to_frame()
    assert frame.select(status.status_name(STATUS)).item() is None
    assert frame.select(status.is_retryable(STATUS)).item() is False
    assert explain(value, leaf=38).name is None
    assert "PSEAMLDR" not in as_text(explain(value, leaf=38))


def test_without_a_leaf_it_is_a_hint_and_no_answer() -> None:
    known = explain(0x8000000000000003)
    assert known.name is None
    assert known.meaning is not None
    assert "from the P-SEAMLDR it is PSEAMLDR_EBADCALL (use --leaf)" in known.meaning
    assert explain(0x8000000000000005).meaning is None


@pytest.mark.parametrize("value", [0x8000020000000092, 0x8000000300000000, 0xC000010000000001])
def test_words_of_the_module_mean_nothing_of_the_loader(value: int) -> None:
    known = explain_loader(value, 0)
    assert (known.name, known.resource, known.kvm) == (None, (), ())
    assert named(value) is None


def test_words_that_the_kernel_makes_are_known_of_every_call() -> None:
    """The SEAMCALL instruction itself failed: it does not matter whom it asked."""
    assert explain_loader(0x8000FF00FFFF0000, 1).name == "TDX_SEAMCALL_VMFAILINVALID"


@pytest.mark.parametrize(
    ("text", "leaf"),
    [
        ("SEAMLDR.INFO", 0),
        ("seamldr_install", 1),
        (" SEAMLDR_SHUTDOWN ", 2),
        ("0x8000000000000003", 3),
        ("9223372036854775809", 1),
        ("0x80000000000000fe", 0xFE),
        ("TDH.SYS.INFO", None),
        ("1", None),
        ("0x10016", None),
        ("0x8000000100000001", None),
        ("SEAMLDR.FROB", None),
        ("", None),
    ],
)
def test_leaves_by_name_and_number(text: str, leaf: int | None) -> None:
    assert parse_loader_leaf(text) == leaf


@given(st.integers(0, 2**64 - 1))
def test_only_bit_63_makes_a_leaf_of_the_loader(fn: int) -> None:
    leaf = parse_loader_leaf(hex(fn))
    assert leaf == (fn & 0xFFFF if fn >> 16 == 1 << 47 else None)
    assert parse_loader_leaf(str(fn)) == leaf


def test_the_tables_are_consistent() -> None:
    table = loader_status_table()
    assert table["status"].is_unique().all()
    assert set(table["host_retry"]) <= set(HOST_RETRY)
    assert loader_leaf_table()["leaf"].to_list() == [0, 1, 2, 3]
    # Bits 63:32 of every error are a code that the module does not have.
    errors = table.filter(STATUS > 0).select(word.status_code(STATUS)).to_series().unique()
    assert errors.to_list() == [word.ERROR_BIT]
    codes = status.status_table().select(word.status_code(STATUS)).to_series()
    assert word.ERROR_BIT not in set(codes)
