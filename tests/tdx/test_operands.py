"""Meaning of a busy operand of each leaf, against the module's source."""

from __future__ import annotations

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdxtrace.tdx.operands import operand_id_table, operand_name, resource, resource_table

BUSY = 0x8000020000000000


def resource_of(status: int | None, leaf: int | None) -> object:
    frame = pl.DataFrame(
        {"status": [status], "leaf": [leaf]}, schema={"status": pl.UInt64, "leaf": pl.UInt16}
    )
    return frame.select(resource(pl.col("status"), pl.col("leaf"))).item()


# Trap: the same id 1 (RCX) is another thing on every family of leaves.
@pytest.mark.parametrize(
    ("leaf", "expected"),
    [
        (3, "SEPT entry"),  # TDH.MEM.SEPT.ADD
        (6, "SEPT entry"),  # TDH.MEM.PAGE.AUG
        (7, "SEPT entry"),  # TDH.MEM.RANGE.BLOCK
        (29, "SEPT entry"),  # TDH.MEM.PAGE.REMOVE
        (38, "TDR"),  # TDH.MEM.TRACK
        (17, "TDR"),  # TDH.MR.FINALIZE
        (8, "TDR"),  # TDH.MNG.KEY.CONFIG
        (11, "TDR"),  # TDH.MNG.RD
        (0, "TDVPR"),  # TDH.VP.ENTER
        (18, "TDVPR"),  # TDH.VP.FLUSH
        (22, "TDVPR"),  # TDH.VP.INIT
        (1, "PAMT entry"),  # TDH.MNG.ADDCX
        (4, "PAMT entry"),  # TDH.VP.ADDCX
        (9, "PAMT entry"),  # TDH.MNG.CREATE
        (28, "PAMT entry"),  # TDH.PHYMEM.PAGE.RECLAIM
        (41, "PAMT entry"),  # TDH.PHYMEM.PAGE.WBINVD
        (36, "TDMR"),  # TDH.SYS.TDMR.INIT
    ],
)
def test_rcx_means_another_thing_on_every_leaf(leaf: int, expected: str) -> None:
    assert resource_of(BUSY | 1, leaf) == expected


@pytest.mark.parametrize(
    ("operand_id", "leaf", "expected"),
    [
        (2, 6, "TDR"),
        (2, 2, "TDR"),
        (2, 10, "TDR"),
        (2, 4, "TDVPR"),  # TDH.VP.ADDCX
        (8, 6, "PAMT entry"),
        (9, 3, "PAMT entry"),  # L2 pages of TDH.MEM.SEPT.ADD version 1
        (0x80, 0, "TDR"),
        (0x80, 22, "TDR"),
        (0x92, 6, "SEPT tree"),
        (0x92, 0, "SEPT tree"),
        (0xA9, 0, "TD epoch"),
        (0xA9, 38, "TD epoch"),
        (0xAC, 6, "OP_STATE"),
        (0xBA, 40, "KOT"),
        (0xBB, 8, "KET"),
        (0xBC, 40, "WBCACHE"),
        (0xB0, 13, "metadata field"),
    ],
)
def test_other_operands_of_a_leaf(operand_id: int, leaf: int, expected: str) -> None:
    assert resource_of(BUSY | operand_id, leaf) == expected


@pytest.mark.parametrize(
    ("operand_id", "leaf", "expected"),
    [
        (0x92, None, "SEPT tree"),
        (0x92, 38, "SEPT tree"),  # TRACK takes no tree lock; the id says it all the same
        (0x93, 6, "SEPT entry"),
        (1, None, "RCX"),
        (1, 999, "RCX"),
        (8, 38, "R8"),
        (0, 6, None),
        (0xFFFF, 6, None),
        (0xFFFF_FFFF, 6, None),
        (0x1_0001, 6, None),  # must not be taken for id 1 of leaf 7
    ],
)
def test_operands_that_the_leaf_does_not_list(
    operand_id: int, leaf: int | None, expected: str | None
) -> None:
    assert resource_of(BUSY | operand_id, leaf) == expected


def test_bits_61_and_60_do_not_hide_the_resource() -> None:
    assert resource_of(BUSY | 3 << 60 | 0x92, 6) == "SEPT tree"


@pytest.mark.parametrize("status", [0, 1, 0x8000020100000000, 0xC000010000000001, None])
def test_only_a_busy_status_has_a_resource(status: int | None) -> None:
    assert resource_of(status, 6) is None


def test_where_one_id_can_mean_two_things_the_second_is_the_alternative() -> None:
    rows = resource_table().filter(pl.col("operand_id") == 1, pl.col("leaf").is_in([29, 30, 6]))
    assert rows.select("leaf", "resource", "alternative").rows() == [
        (6, "SEPT entry", None),
        (29, "SEPT entry", "PAMT entry of the page that is removed"),
        (30, "SEPT entry", "PAMT entry of the SEPT page that is freed"),
    ]


def test_operand_ids_have_the_names_of_the_headers() -> None:
    ids = [0, 1, 2, 8, 0x45, 0x80, 0x92, 0xA9, 0xAC, 0xBA, 0x7777, None]
    frame = pl.DataFrame({"id": ids}, schema={"id": pl.UInt32})
    assert frame.select(operand_name(pl.col("id"))).to_series().to_list() == [
        *("RAX", "RCX", "RDX", "R8", "CPUID_CONFIG", "TDR", "SEPT_TREE", "TD_EPOCH", "OP_STATE"),
        *("KOT", None, None),
    ]


def test_a_leaf_and_an_id_are_listed_once() -> None:
    assert resource_table().select("leaf", "operand_id").is_unique().all()
    assert operand_id_table()["operand_id"].is_unique().all()


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**16 - 1))
def test_every_word_and_leaf_has_an_answer_or_null(status: int, leaf: int) -> None:
    assert isinstance(resource_of(status, leaf), str | None)
