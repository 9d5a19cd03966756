"""Locks that each call takes, in order; pairs of calls that conflict; and bug rules."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import polars as pl

from tdxtrace.tdx.facts import facts
from tdxtrace.tdx.leaves import leaf_table
from tdxtrace.tdx.operands import operand_id_table, operand_table
from tdxtrace.tdx.word import TDX_OPERAND_ID_RCX

# Scopes whose objects are of the same kind: two calls conflict if they name the same object.
# A walk to a 4K page holds the PAMT entries above it shared, so a 2M range is compared as pages:
# intel/tdx-module 1.5.01 src/common/memory_handlers/pamt_manager.c, pamt_walk().
_SAME_SCOPE: Final = {"service td": "td", "target td": "td", "2M range": "page"}


@dataclass(frozen=True, slots=True)
class Holders:
    """Possible holders of a busy lock."""

    generations: tuple[str, ...]
    """Lock generations of the module this applies to, newest first."""
    lock: str
    scope: str
    """Kind of object that both calls must name."""
    host: tuple[str, ...]
    """SEAMCALLs; a condition follows in parentheses."""
    guest: tuple[str, ...]
    """TDCALLs."""
    is_all_leaves: bool
    """Whether ``host`` contains every SEAMCALL that takes the lock."""


@cache
def lock_table() -> pl.DataFrame:
    """Return the locks of every call, one row per lock, in the order they are tried.

    The module never waits for a lock: the first one that is held ends the call, and its operand id
    goes into the status.  The generation is that of the module:
    :func:`tdxtrace.tdx.releases.generation_of`.

    Returns:
        Columns generation (A, B, C), call (TDH.* of the host, TDG.* of the guest), leaf (UInt16;
        null for TDG.*), sequence (UInt8, 1 first), lock, scope (kind of object on which two calls
        conflict: td, vcpu, entry, page, ...), page (UInt8: number of the page operand, for a lock
        on a page; 1 if operand_id is that of the guest page; null if the operand is in a register
        or list that is never recorded), mode (SH or EX), kind
        (sharex; _hp: with host priority; entry_hp, bit, mutex, cas, pconfig), held (leaf: to the
        end of the call; instant; entry: until VM entry; guest run: until the guest exits),
        condition (null: always), operand_id (UInt32; null if the status has none, see note), note,
        source.
    """
    numbers = leaf_table().select("leaf", call="name")
    is_page = pl.col("scope").replace(_SAME_SCOPE) == "page"
    of_guest_page = pl.when(pl.col("operand_id") == TDX_OPERAND_ID_RCX).then(pl.lit(1, pl.UInt8))
    return (
        facts("locks", sequence=pl.UInt8, operand_id=pl.UInt32)
        .join(numbers, on="call", how="left", maintain_order="left")
        .join(_page_operands(), on=["leaf", "operand_id"], how="left", maintain_order="left")
        .with_columns(page=pl.when(is_page).then(pl.coalesce("page", of_guest_page)))
        .select(
            *("generation", "call", "leaf", "sequence", "lock", "scope", "page", "mode", "kind"),
            *("held", "condition", "operand_id", "note", "source"),
        )
    )


def _page_operands() -> pl.DataFrame:
    """Return leaf, operand_id and page (UInt8, from 1) of the registers that hold a page."""
    ids = operand_id_table().select("operand_id", register="name")
    number = pl.col("role").str.extract(r"^page(?: (\d+))?$").fill_null("1").cast(pl.UInt8)
    pages = operand_table().filter(pl.col("role").str.starts_with("page"))
    return pages.join(ids, on="register").select("leaf", "operand_id", page=number)


@cache
def conflict_table() -> pl.DataFrame:
    """Return the lock conflicts, one row per pair of locks that exclude each other.

    Derived from the lock table: same generation, same lock, scopes of one kind, and not both
    shared.  Two calls conflict if they also name the same object: TD, vCPU, entry or page.

    Returns:
        The columns generation, call, leaf, sequence, lock, scope, page, mode, condition, operand_id
        of the call that fails, and holder, holder_leaf, holder_scope, holder_page, holder_mode,
        holder_condition, holder_held of the call that holds.
    """
    locks = lock_table().with_columns(pl.col("scope").replace(_SAME_SCOPE).alias("kind_of_scope"))
    holders = locks.select(
        *("generation", "lock", "kind_of_scope"),
        holder="call",
        holder_leaf="leaf",
        holder_scope="scope",
        holder_page="page",
        holder_mode="mode",
        holder_condition="condition",
        holder_held="held",
    )
    return (
        locks.select(
            *("generation", "call", "leaf", "sequence", "lock", "scope", "kind_of_scope"),
            *("page", "mode", "condition", "operand_id"),
        )
        .join(holders, on=["generation", "lock", "kind_of_scope"], maintain_order="left_right")
        .filter((pl.col("mode") == "EX") | (pl.col("holder_mode") == "EX"))
        .drop("kind_of_scope")
    )


def holders(leaf: int, operand_id: int, version: int = 0) -> tuple[Holders, ...]:
    """Return the possible holders of an operand that a leaf found busy.

    Args:
        leaf: The leaf that failed.
        operand_id: Low half of its status.
        version: Version of the leaf.

    Returns:
        One entry per lock that the id can refer to, generations with equal answers merged, newest
        first; empty if the leaf is not known to return this id.
    """
    condition = pl.col("condition").str.extract(r"^version (\d+)").cast(pl.Int64)
    conflicts = conflict_table().filter(
        pl.col("leaf") == leaf,
        pl.col("operand_id") == operand_id,
        condition.fill_null(version) == version,
    )
    found: dict[tuple[Any, ...], list[str]] = {}
    by_lock = conflicts.sort("generation", descending=True, maintain_order=True)
    for (generation, lock, scope), rows in by_lock.group_by(
        "generation", "lock", "scope", maintain_order=True
    ):
        held = list(dict.fromkeys(_holder(row) for row in rows.iter_rows(named=True)))
        host = tuple(call for call in held if call.startswith("TDH."))
        guest = tuple(call for call in held if call.startswith("TDG."))
        is_every = rows["holder_leaf"].drop_nulls().n_unique() == _n_takers(generation, lock)
        found.setdefault((lock, scope, host, guest, is_every), []).append(str(generation))
    return tuple(Holders(tuple(generations), *key) for key, generations in found.items())


def _holder(row: dict[str, Any]) -> str:
    """Return a holder's name, with its conditions in parentheses."""
    running = "in the guest" if row["holder_held"] == "guest run" else None
    terms = [term for term in (row["holder_condition"], running) if term]
    return str(row["holder"]) + (f" ({', '.join(terms)})" if terms else "")


def _n_takers(generation: object, lock: object) -> int:
    """Return the number of leaves that take a lock."""
    takers = lock_table().filter(pl.col("generation") == generation, pl.col("lock") == lock)
    return takers["leaf"].drop_nulls().n_unique()


@cache
def bug_rule_table() -> pl.DataFrame:
    """Return the rules of a correct kernel, one row per rule.

    Returns:
        Columns rule (its name, as in ``busy_causes`` and ``broken_rules``), statement (true for a
        correct kernel) and source.
    """
    return facts("bug_rules")
