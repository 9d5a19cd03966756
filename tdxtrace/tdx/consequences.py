"""What follows if KVM does not repeat a call that is busy."""

from __future__ import annotations

from functools import cache
from typing import Final

from tdxtrace.tdx.facts import records
from tdxtrace.tdx.leaves import parse_leaf

_DIES: Final = "KVM_BUG_ON"


@cache
def if_busy_is_final() -> dict[int, str]:
    """Return by leaf what KVM does where the busy answer is the last one, as far as it is known.

    Sources:
        tdx/data/kvm.csv, column if_busy_is_final: mainline from 6.16 on.
    """
    return {
        parse_leaf(row["call"] or "")[0]: row["if_busy_is_final"]
        for row in records("kvm")
        if row["if_busy_is_final"] is not None
    }


def kills_vm(leaf: int) -> bool | None:
    """Return whether the VM is dead where a busy answer of a leaf is final; None: not known."""
    then = if_busy_is_final().get(leaf)
    return None if then is None else then.startswith(_DIES)
