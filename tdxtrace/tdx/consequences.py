"""Consequences of busy answers that KVM does not retry."""

from __future__ import annotations

from functools import cache
from typing import Final

from tdxtrace.tdx.facts import records
from tdxtrace.tdx.leaves import parse_leaf

_DIES: Final = "KVM_BUG_ON"


@cache
def if_busy_is_final() -> dict[int, str]:
    """Return KVM's reaction to a busy answer that it does not retry, by leaf, where known.

    Sources:
        tdx/data/kvm.csv, column if_busy_is_final: mainline from 6.16 on.
    """
    return {
        parse_leaf(row["call"] or "")[0]: row["if_busy_is_final"]
        for row in records("kvm")
        if row["if_busy_is_final"] is not None
    }


def kills_vm(leaf: int) -> bool | None:
    """Return whether KVM kills the VM after a final busy answer of a leaf; None: not known."""
    then = if_busy_is_final().get(leaf)
    return None if then is None else then.startswith(_DIES)
