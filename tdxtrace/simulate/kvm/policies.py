"""Busy policies: what KVM does with a busy status, as merged, posted or argued for."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace
from typing import Final


@dataclass(frozen=True, slots=True)
class Policy:
    """How often each kind of call is made, and what follows when all of them were busy.

    A number of calls includes the first; 0, the default, means no limit.
    """

    name: str
    source: str
    install_calls: int = 0
    """Calls of PAGE.AUG or SEPT.ADD before the fault handler gets the status."""
    exactly_sept: bool = False
    """Whether only 0x8000020000000092 is retried, or any operand; the VM does not survive
    another busy answer then.  The loops around TRACK and PAGE.WBINVD look at the code alone."""
    local_loop: bool = False
    """Whether the fault handler retries without entering the guest, until an event."""
    zap_calls: int = 0
    """Calls of RANGE.BLOCK, and of PAGE.REMOVE unless that has a number of its own."""
    remove_calls: int | None = None
    """Calls of PAGE.REMOVE; None: as many as of RANGE.BLOCK."""
    track_calls: int = 0
    kick: bool = False
    """Whether vCPUs are kicked and kept out of the guest for the last of these calls."""
    last_resort: str = "bug"
    """``bug``: the VM is dead; ``give_up``: the caller drops the operation."""
    doubling_from: int = 0
    """Busy answers after which to warn and double this limit, up to ``bug_at``; 0: never."""
    bug_at: int = 0
    one_at_a_time: bool = False
    """Whether a lock of the VM is held over each call and its retries."""
    flush_mmu_lock: bool = False
    """Whether mmu_lock is acquired and released before a busy TDH.VP.ENTER is repeated."""
    zaps_shared: bool = False
    """A bug: whether a zap holds mmu_lock for reading only, so that faults and other zaps run
    beside it.  Linux asserts the write lock (tdx_track, lockdep_assert_held_write)."""


# RANGE.BLOCK, TRACK and REMOVE: one call, a kick, one more; AUG and SEPT.ADD: once, and
# the loop of tdx_handle_ept_violation.  Linux 6.16 arch/x86/kvm/vmx/tdx.c; 6.19 the same
# as macro tdh_do_no_vcpus.
MAINLINE: Final = Policy(
    "mainline",
    "Linux 6.16 and later, arch/x86/kvm/vmx/tdx.c",
    install_calls=1,
    local_loop=True,
    zap_calls=2,
    track_calls=2,
    kick=True,
)
# SEAMCALL_RETRY_MAX 16, tested after the decrement: 17 calls while the whole word is
# TDX_ERROR_SEPT_BUSY; after these PAGE.AUG and SEPT.ADD answer -EAGAIN, and the guest is entered
# again; RANGE.BLOCK's failure is a KVM_BUG_ON (R. Edgecombe, 2024-09-09), and so is any other
# status.  PAGE.REMOVE, TRACK and PAGE.WBINVD stand in loops of their own without an end.
V1_SERIES: Final = Policy(
    "v1-series",
    "[PATCH 09/21] KVM: TDX: Retry seamcall when TDX_OPERAND_BUSY with operand SEPT, 2024-09-04",
    install_calls=17,
    exactly_sept=True,
    zap_calls=17,
    remove_calls=0,
)
# The loop of the mail: under a lock, until it succeeds; a warning and a doubled limit at
# 16, 32, 64 …; KVM_BUG_ON at the 1024th busy answer.
SEED_LOOP: Final = Policy(
    "seed-loop",
    "P. Bonzini, Re: [PATCH 09/21], 2024-09-10",
    doubling_from=16,
    bug_at=1024,
    one_at_a_time=True,
    flush_mmu_lock=True,
)
# A kernel that does not exist: the mistake that the rule "host against host is excluded by
# mmu_lock" is about (Yan Zhao, 2024-09-13 and 2024-11-21; S. Christopherson, 2024-09-10).
BROKEN_MMU_LOCK: Final = replace(
    MAINLINE,
    name="broken-mmu-lock",
    source="no kernel: mainline whose zaps hold mmu_lock for reading, a bug",
    zaps_shared=True,
)
ENDLESS: Final = Policy(
    "endless",
    "MEM.TRACK of the v1 series, for every call (Yan Zhao, 2024-09-14)",
    last_resort="give_up",
)
_NAMED: Final = {p.name: p for p in (MAINLINE, V1_SERIES, SEED_LOOP, ENDLESS, BROKEN_MMU_LOCK)}
NAMES: Final = (*_NAMED, "fixed-N")
_FIXED: Final = re.compile(r"^fixed-(?P<n>[1-9]\d{0,4})$")


def policy_named(name: str) -> Policy:
    """Return a policy by its name; ``fixed-N`` makes N calls and then gives the operation up.

    Raises:
        ValueError: If there is none of that name; the message names the nearest.
    """
    found = _FIXED.match(name)
    if found is not None:
        n = int(found["n"])
        return replace(
            ENDLESS,
            name=name,
            source="the question of the list: is 2, 5, 16 or 1024 enough?",
            install_calls=n,
            zap_calls=n,
            track_calls=n,
        )
    if name not in _NAMED:
        near = difflib.get_close_matches(name, NAMES, n=1, cutoff=0)[0]
        raise ValueError(f"no policy {name!r}; nearest: {near}; all: {', '.join(NAMES)}")
    return _NAMED[name]
