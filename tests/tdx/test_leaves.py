"""Leaves, against the numbers printed in the module's and the kernel's headers."""

from __future__ import annotations

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdxtrace.tables.events import SEAMCALLS
from tdxtrace.tdx.facts import facts
from tdxtrace.tdx.leaves import leaf_name, leaf_table, parse_leaf
from tdxtrace.tdx.operands import operand_table
from tdxtrace.tdx.wrappers import wrapper_table

NUMBERS = {
    "TDH.VP.ENTER": 0,
    "TDH.MNG.ADDCX": 1,
    "TDH.MEM.PAGE.ADD": 2,
    "TDH.MEM.SEPT.ADD": 3,
    "TDH.VP.ADDCX": 4,
    "TDH.MEM.PAGE.RELOCATE": 5,
    "TDH.MEM.PAGE.AUG": 6,
    "TDH.MEM.RANGE.BLOCK": 7,
    "TDH.MNG.KEY.CONFIG": 8,
    "TDH.MNG.CREATE": 9,
    "TDH.VP.CREATE": 10,
    "TDH.MEM.PAGE.DEMOTE": 15,
    "TDH.MR.EXTEND": 16,
    "TDH.VP.FLUSH": 18,
    "TDH.MNG.INIT": 21,
    "TDH.VP.INIT": 22,
    "TDH.PHYMEM.PAGE.RECLAIM": 28,
    "TDH.MEM.PAGE.REMOVE": 29,
    "TDH.SYS.INIT": 33,
    "TDH.MEM.TRACK": 38,
    "TDH.PHYMEM.CACHE.WB": 40,
    "TDH.PHYMEM.PAGE.WBINVD": 41,
    "TDH.VP.WR": 43,
    "TDH.EXPORT.MEM": 68,
    "TDH.SYS.DISABLE": 69,
    "TDH.MIG.STREAM.CREATE": 96,
    "TDH.SYS.RDM": 42,
    "TDH.MNG.RDM": 46,
    "TDH.MNG.WRM": 47,
    "TDH.VP.RDM": 50,
    "TDH.PHYMEM.PAMT.ADD": 58,
    "TDH.MEM.SCAN.RANGE": 92,
    "TDH.QUOTE.GET": 98,
    "TDH.QUOTE.INIT": 100,
    "TDH.SPDM.CONNECT": 142,
    "TDH.SPDM.DISCONNECT": 143,
    "TDH.SPDM.MNG": 144,
    "TDH.MMIO.BLOCK": 159,
}


@pytest.mark.parametrize(("name", "leaf"), NUMBERS.items())
def test_leaves_have_the_names_of_the_headers(name: str, leaf: int) -> None:
    assert pl.select(leaf_name(pl.lit(leaf, dtype=pl.UInt16))).item() == name
    assert parse_leaf(name) == (leaf, 0)
    assert parse_leaf(name.replace(".", "_")) == (leaf, 0)
    assert parse_leaf(name.replace(".", "_").lower()) == (leaf, 0)


def test_an_unknown_leaf_and_null_have_no_name() -> None:
    leaves = pl.Series("leaf", [6, 250, None], dtype=pl.UInt16).to_frame()
    assert leaves.select(leaf_name(pl.col("leaf")))["leaf"].to_list() == [
        *("TDH.MEM.PAGE.AUG", None, None)
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tdh_vp_enter", (0, 0)),
        (" TDH_VP_ENTER ", (0, 0)),
        ("Tdh.Vp.Enter", (0, 0)),
        ("tdh_phymem_page_wbinvd_hkid", (41, 0)),
        ("tdh_phymem_page_wbinvd_tdr", (41, 0)),
        ("0x26", (38, 0)),
        ("0X26", (38, 0)),
        ("38", (38, 0)),
        ("0x10016", (22, 1)),
        ("65558", (22, 1)),
        ("0x000000000000001c", (28, 0)),
        ("250", (250, 0)),
        ("TDH_IOMMU_SETUP", (128, 0)),  # Linux; the module's source says SETREG
        ("tdh.iommu.clear", (129, 0)),
        ("tdh_ide_stream_km", (135, 0)),
        ("tdh_exec_spdm_mng", (144, 0)),
    ],
)
def test_leaves_are_read_as_logs_and_people_write_them(
    text: str, expected: tuple[int, int]
) -> None:
    assert parse_leaf(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "TDH.MEM.PAGE.AUGH",
            "unknown leaf 'TDH.MEM.PAGE.AUGH'; the nearest known one is TDH.MEM.PAGE.AUG",
        ),
        (
            "tdh_mem_trakc",
            "unknown leaf 'tdh_mem_trakc'; the nearest known one is TDH.MEM.TRACK",
        ),
        ("0x1000026", "no TDX module leaf: '0x1000026'; bits above 23 are set"),
        ("0x8000000000000000", "no TDX module leaf: '0x8000000000000000'; bits above 23 are set"),
    ],
)
def test_a_leaf_that_is_none_is_refused_by_name(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"leaf") as error:
        parse_leaf(text)
    assert str(error.value) == message


@pytest.mark.parametrize("text", ["", "-1", "0x", "frobnicate", "__seamcall"])
def test_nonsense_is_no_leaf(text: str) -> None:
    with pytest.raises(ValueError, match="unknown leaf"):
        parse_leaf(text)


@given(st.integers(0, 0xFFFF), st.integers(0, 0xFF))
def test_a_leaf_and_version_survive_being_written(leaf: int, version: int) -> None:
    fn = version << 16 | leaf
    assert parse_leaf(hex(fn)) == parse_leaf(str(fn)) == (leaf, version)


@pytest.mark.parametrize(
    ("name", "request_", "registers"),
    [
        ("TDH.MEM.PAGE.AUG", "gpa", ("RCX", "RDX", None, "R8")),
        ("TDH.MEM.SEPT.ADD", "gpa", ("RCX", "RDX", None, "R8")),
        ("TDH.MEM.RANGE.BLOCK", "gpa", ("RCX", "RDX", None, None)),
        ("TDH.MEM.PAGE.REMOVE", "gpa", ("RCX", "RDX", None, None)),
        ("TDH.MR.EXTEND", "gpa", ("RCX", "RDX", None, None)),
        ("TDH.MEM.TRACK", "td", (None, "RCX", None, None)),
        ("TDH.MNG.ADDCX", "td", (None, "RDX", None, "RCX")),
        ("TDH.EXPORT.MEM", "td", (None, "RDX", None, None)),
        ("TDH.VP.ENTER", "vcpu", (None, None, "RCX", None)),
        ("TDH.VP.ADDCX", "vcpu", (None, None, "RDX", "RCX")),
        ("TDH.VP.CREATE", "vcpu", (None, "RDX", "RCX", "RCX")),
        ("TDH.PHYMEM.PAGE.RECLAIM", "page", (None, None, None, "RCX")),
        ("TDH.PHYMEM.CACHE.WB", "global", (None, None, None, None)),
        ("TDH.SYS.INIT", "global", (None, None, None, None)),
        ("TDH.MEM.SCAN.RANGE", "td", (None, "RDX", None, None)),
        ("TDH.QUOTE.GET", "td", (None, "RCX", None, None)),
        ("TDH.MMIO.MAP", "gpa", ("RCX", "RDX", None, "R8")),
        ("TDH.MMIO.BLOCK", "gpa", ("RCX", "RDX", None, None)),
        ("TDH.MEM.SHARED.SEPT.WR", "gpa", ("RCX", "RDX", None, None)),
        ("TDH.VP.RDM", "vcpu", (None, None, None, None)),
    ],
)
def test_registers_hold_what_the_dispatcher_passes_on(
    name: str, request_: str, registers: tuple[str | None, ...]
) -> None:
    row = leaf_table().row(by_predicate=pl.col("name") == name, named=True)
    assert row["request"] == request_
    held = dict(operand_table().filter(pl.col("call") == name).select("role", "register").rows())
    assert tuple(map(held.get, ("gpa", "td", "vcpu", "page"))) == registers


def test_the_level_rides_in_rcx_only_where_the_module_takes_a_level() -> None:
    roles = operand_table().group_by("call").agg(held=pl.struct("register", "role"))
    level = {call: {"register": "RCX", "role": "level"} in held for call, held in roles.rows()}
    assert [level[f"TDH.{name}"] for name in ("MEM.PAGE.AUG", "MR.EXTEND", "MEM.TRACK")] == [
        *(True, False, False)
    ]


def test_operands_are_of_leaves_and_are_columns() -> None:
    table = operand_table()
    named = table.join(leaf_table().select("leaf", call="name"), on=["leaf", "call"], how="semi")
    assert named.equals(table)
    assert table.select("leaf", "role").is_unique().all()
    assert set(table["column"]) <= {column.name for column in SEAMCALLS.columns}


def test_a_request_is_identified_by_a_register_that_exists() -> None:
    """A few leaves are known by name alone: their registers are not, so they identify by less."""
    held = set(operand_table().select("leaf", "role").rows())
    unread = {"TDH.MNG.RDM", "TDH.MNG.WRM", "TDH.VP.RDM", "TDH.VP.WRM"}
    for leaf, name, request_ in leaf_table().select("leaf", "name", "request").iter_rows():
        assert request_ == "global" or ((leaf, request_) in held) != (name in unread), name


def test_leaves_and_wrappers_that_kvm_reacts_to_exist() -> None:
    names = set(leaf_table()["name"])
    calls = set(facts("kvm")["call"]) - {"*", "-"}
    assert calls <= names
    assert set(wrapper_table()["leaf"].drop_nulls()) <= set(leaf_table()["leaf"])


@pytest.mark.parametrize(
    ("leaf", "since"), [(58, "1.5.20"), (59, "1.5.20"), (92, "1.5.34"), (254, "1.0"), (46, None)]
)
def test_a_leaf_knows_its_first_release(leaf: int, since: str | None) -> None:
    assert leaf_table().row(by_predicate=pl.col("leaf") == leaf, named=True)["since"] == since


def test_a_leaf_knows_its_kernel_name_and_wrappers() -> None:
    row = leaf_table().row(by_predicate=pl.col("leaf") == 41, named=True)
    assert row["kernel_name"] == "TDH_PHYMEM_PAGE_WBINVD"
    assert row["wrappers"] == ["tdh_phymem_page_wbinvd_tdr", "tdh_phymem_page_wbinvd_hkid"]
    assert leaf_table().row(by_predicate=pl.col("leaf") == 12, named=True)["wrappers"] == []


def test_leaves_are_listed_once_and_in_order() -> None:
    assert leaf_table()["leaf"].is_sorted()
    assert leaf_table()["leaf"].is_unique().all()
    assert leaf_table()["name"].is_unique().all()
