"""Locks by generation, against the module's source and mails that list them."""

from __future__ import annotations

import polars as pl
import pytest

from tdxtrace.tdx.locks import conflict_table, holders, lock_table
from tdxtrace.tdx.operands import resource_table


def locks_of(generation: str, call: str) -> list[tuple[object, ...]]:
    rows = lock_table().filter(pl.col("generation") == generation, pl.col("call") == call)
    return rows.select("lock", "mode", "operand_id").rows()


@pytest.mark.parametrize(
    ("generation", "call", "expected"),
    [
        (
            "B",
            "TDH.MEM.PAGE.AUG",
            [
                ("TDR", "SH", 2),
                ("OP_STATE", "SH", 0xAC),
                ("SEPT_TREE", "SH", 0x92),
                ("SEPT_ENTRY", "EX", 1),
                ("PAMT", "EX", 8),
            ],
        ),
        ("A", "TDH.MEM.PAGE.AUG", [("TDR", "SH", 2), ("SEPT_TREE", "EX", 0x92), ("PAMT", "EX", 8)]),
        (
            "C",
            "TDH.MEM.TRACK",
            [("TDR", "SH", 1), ("OP_STATE", "SH", 0xAC), ("TD_EPOCH", "EX", 0xA9)],
        ),
        ("C", "TDH.MEM.PAGE.ADD", [("TDR", "EX", 2), ("PAMT", "EX", 8)]),
        ("B", "TDH.PHYMEM.CACHE.WB", [("WBCACHE", "EX", 0xBC), ("KOT", "SH", 0xBA)]),
        ("C", "TDG.MEM.PAGE.ACCEPT", [("SEPT_ENTRY", "EX", 1)]),
        ("A", "TDG.MEM.PAGE.ACCEPT", [("SEPT_ENTRY", "EX", 1)]),
        (
            "C",
            "TDH.PHYMEM.PAMT.ADD",
            [("PAMT", "EX", 1), ("PAMT", "SH", 2), ("PAMT", "SH", 8)],
        ),
        ("B", "TDH.PHYMEM.PAMT.ADD", []),
    ],
)
def test_locks_are_tried_in_the_order_of_the_source(
    generation: str, call: str, expected: list[tuple[object, ...]]
) -> None:
    assert locks_of(generation, call) == expected


def test_an_armed_entry_takes_the_tree_exclusively_up_to_generation_b() -> None:
    armed = lock_table().filter(pl.col("leaf") == 0, pl.col("lock") == "SEPT_TREE")
    assert armed.select("generation", "mode", "condition", "operand_id").rows() == [
        ("A", "EX", "zero-step mitigation armed", 0x92),
        ("B", "EX", "zero-step mitigation armed", 0x92),
        ("C", "SH", "zero-step mitigation armed", 0x92),
    ]


def test_the_last_pages_of_demote_are_locked_only_with_dynamic_pamt() -> None:
    rows = lock_table().filter(
        pl.col("call") == "TDH.MEM.PAGE.DEMOTE", pl.col("operand_id").is_in([12, 13])
    )
    assert rows.select("generation", "mode", "operand_id", "condition").rows() == [
        ("C", "SH", 0xC, "Dynamic PAMT and a 2M page"),
        ("C", "SH", 0xD, "Dynamic PAMT and a 2M page"),
    ]


def test_a_page_in_a_register_that_no_capture_has_is_no_page_of_the_call() -> None:
    """R9 of DEMOTE is not the page in R8; only RCX and R8 say which page a lock is about."""
    rows = lock_table().filter(pl.col("call") == "TDH.MEM.PAGE.DEMOTE", pl.col("lock") == "PAMT")
    pages = {(operand, page) for operand, page in rows.select("operand_id", "page").iter_rows()}
    assert pages == {(1, 1), (8, 1), *((operand, None) for operand in (9, 10, 11, 12, 13))}


@pytest.mark.parametrize("call", ["TDH.IDE.STREAM.BLOCK", "TDH.DMAR.ADD", "TDH.IQ.INV.REQUEST"])
def test_calls_of_tdx_connect_take_the_iommu_first(call: str) -> None:
    assert locks_of("C", call) == [("IOMMU", "EX", 1)]


def test_a_running_guest_holds_tdr_and_tdvpr_shared() -> None:
    held = lock_table().filter(pl.col("leaf") == 0, pl.col("held") == "guest run")
    assert set(held.select("lock", "mode").rows()) == {("TDVPR", "SH"), ("TDR", "SH")}
    assert held.height == 6


@pytest.mark.parametrize(
    ("generation", "exclusive"),
    [
        ("B", {"RANGE.BLOCK", "RANGE.UNBLOCK", "SEPT.REMOVE"}),
        ("C", {"RANGE.BLOCK", "RANGE.UNBLOCK", "SEPT.REMOVE", "PAGE.PROMOTE", "TDH.MMIO.BLOCK"}),
    ],
)
def test_few_calls_take_the_tree_exclusively(generation: str, exclusive: set[str]) -> None:
    tree = lock_table().filter(
        pl.col("generation") == generation, pl.col("lock") == "SEPT_TREE", pl.col("mode") == "EX"
    )
    calls = {call.removeprefix("TDH.MEM.") for call in tree["call"] if call != "TDH.VP.ENTER"}
    assert calls == exclusive


def test_no_guest_call_takes_the_tree() -> None:
    guest = lock_table().filter(pl.col("call").str.starts_with("TDG."))
    assert "SEPT_TREE" not in guest["lock"]
    assert guest["leaf"].null_count() == guest.height


def test_only_host_calls_have_a_leaf_number() -> None:
    host = lock_table().filter(pl.col("call").str.starts_with("TDH."))
    assert host["leaf"].null_count() == 0


def test_a_second_vcpu_init_finds_the_tdr_held_only_in_version_1() -> None:
    tdr = lock_table().filter(pl.col("leaf") == 22, pl.col("lock") == "TDR")
    assert tdr.filter(pl.col("generation") == "C").select("mode", "condition").rows() == [
        ("SH", "version 0"),
        ("EX", "version 1"),
    ]


@pytest.mark.parametrize(
    ("generation", "call", "holder", "ids"),
    [
        ("B", "TDH.VP.ENTER", "TDH.MEM.PAGE.AUG", {0x92}),
        ("C", "TDH.VP.ENTER", "TDH.MEM.PAGE.AUG", set()),
        ("C", "TDH.VP.ENTER", "TDH.MEM.RANGE.BLOCK", {0x92}),
        ("B", "TDH.VP.ENTER", "TDH.MEM.TRACK", {0xA9}),
        ("B", "TDH.MEM.TRACK", "TDH.VP.ENTER", {0xA9}),
        ("B", "TDH.MEM.PAGE.AUG", "TDG.MEM.PAGE.ACCEPT", {1}),
        ("B", "TDG.MEM.PAGE.ACCEPT", "TDH.MEM.PAGE.AUG", {1}),
        ("A", "TDH.MEM.PAGE.AUG", "TDG.MEM.PAGE.ACCEPT", set()),
        ("A", "TDH.MEM.RANGE.BLOCK", "TDG.MEM.PAGE.ACCEPT", {1}),
        ("B", "TDH.MEM.PAGE.AUG", "TDH.MEM.PAGE.AUG", {1, 8}),
        ("C", "TDH.MEM.TRACK", "TDH.MEM.PAGE.AUG", set()),
        ("B", "TDH.MNG.KEY.CONFIG", "TDH.VP.ENTER", {1}),
        ("C", "TDH.PHYMEM.PAMT.ADD", "TDH.MEM.PAGE.AUG", {1, 2, 8}),  # 2M range and page
        ("C", "TDH.MEM.PAGE.AUG", "TDH.MMIO.BLOCK", {1, 0x92}),
        ("B", "TDH.MEM.PAGE.AUG", "TDH.MMIO.BLOCK", set()),
        ("C", "TDH.VP.ENTER", "TDH.MMIO.BLOCK", {0x92}),
        ("C", "TDH.MEM.PAGE.AUG", "TDH.MEM.SHARED.SEPT.WR", set()),
        ("C", "TDH.MEM.RANGE.BLOCK", "TDH.MEM.SCAN.RANGE", {0x92}),
        ("C", "TDH.SPDM.CREATE", "TDH.MMIO.MAP", {1}),
    ],
)
def test_calls_collide_on_the_operand_that_the_module_reports(
    generation: str, call: str, holder: str, ids: set[int]
) -> None:
    rows = conflict_table().filter(
        pl.col("generation") == generation, pl.col("call") == call, pl.col("holder") == holder
    )
    assert set(rows["operand_id"]) == ids


def test_two_shared_holders_never_collide() -> None:
    modes = set(conflict_table().select("mode", "holder_mode").rows())
    assert modes == {("EX", "EX"), ("EX", "SH"), ("SH", "EX")}


def test_a_collision_is_one_both_ways() -> None:
    pairs = set(conflict_table().select("generation", "lock", "call", "holder").rows())
    assert {(g, lock, holder, call) for g, lock, call, holder in pairs} == pairs


def test_who_can_hold_the_tree_against_page_aug() -> None:
    by_generation = {held.generations: held for held in holders(6, 0x92)}
    assert set(by_generation[("C",)].host) == {
        *("TDH.MEM.RANGE.BLOCK", "TDH.MEM.RANGE.UNBLOCK", "TDH.MEM.SEPT.REMOVE"),
        *("TDH.MEM.PAGE.PROMOTE", "TDH.MMIO.BLOCK"),
    }
    assert "TDH.VP.ENTER (zero-step mitigation armed)" in by_generation[("B",)].host
    assert by_generation[("A",)].is_all_leaves
    assert all(held.guest == () for held in by_generation.values())


def test_a_guest_can_hold_an_entry_but_not_the_tree() -> None:
    newer, older = holders(6, 1)
    assert (newer.generations, older.generations) == (("C",), ("B",))
    assert set(newer.host) - set(older.host) == {f"TDH.MMIO.{n}" for n in ("MAP", "BLOCK", "UNMAP")}
    for held in (newer, older):
        assert (held.lock, held.scope) == ("SEPT_ENTRY", "entry")
        assert held.guest == (
            *("TDG.MEM.PAGE.ACCEPT", "TDG.MEM.PAGE.ATTR.RD", "TDG.MEM.PAGE.ATTR.WR"),
        )


def test_the_version_of_the_leaf_decides_who_holds_the_tdr() -> None:
    assert not any(held.is_all_leaves for held in holders(22, 0x80, version=0))
    assert any(held.is_all_leaves for held in holders(22, 0x80, version=1))


def test_nobody_holds_what_a_leaf_does_not_take() -> None:
    assert holders(38, 0x92) == ()
    assert holders(999, 1) == ()


def test_resources_are_what_the_lock_table_says() -> None:
    labels = {
        "SEPT_TREE": "SEPT tree",
        "SEPT_ENTRY": "SEPT entry",
        "PAMT": "PAMT entry",
        "TD_EPOCH": "TD epoch",
        "METADATA_FIELD": "metadata field",
    }
    taken = (
        lock_table()
        .filter(pl.col("leaf").is_not_null(), pl.col("operand_id").is_not_null())
        .filter(pl.col("generation") != "A")
        .group_by("leaf", "operand_id")
        .agg(pl.col("lock").sort_by("sequence").first().replace(labels))
    )
    joined = taken.join(resource_table(), on=["leaf", "operand_id"], how="left")
    agrees = pl.col("resource").str.starts_with(pl.col("lock"))
    assert joined.select(agrees.all()).item()
    assert joined["resource"].null_count() == 0


def test_the_sequence_counts_from_one() -> None:
    steps = lock_table().group_by("generation", "call", maintain_order=True).agg("sequence")
    assert all(list(s) == list(range(1, len(s) + 1)) for s in steps["sequence"])
