"""Busy policies: KVM's reaction to a busy status, as merged, posted or proposed."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace
from typing import Final


@dataclass(frozen=True, slots=True)
class Policy:
    """Maximum number of calls of each kind, and the reaction if all of them are busy.

    Numbers of calls include the first; 0, the default, means no limit.
    """

    name: str
    source: str
    install_calls: int = 0
    """Calls of PAGE.AUG or SEPT.ADD before the fault handler gets the status."""
    exactly_sept: bool = False
    """Whether only 0x8000020000000092 is retried, not any operand; another busy answer then kills
    the VM.  The loops around TRACK and PAGE.WBINVD compare only the code."""
    local_loop: bool = False
    """Whether the fault handler retries without entering the guest, until an event."""
    zap_calls: int = 0
    """Calls of RANGE.BLOCK, and of PAGE.REMOVE unless ``remove_calls`` is set."""
    remove_calls: int | None = None
    """Calls of PAGE.REMOVE; None: the same number as of RANGE.BLOCK."""
    track_calls: int = 0
    kick: bool = False
    """Whether vCPUs are kicked and prevented from entering for the last of these calls."""
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
    """Whether a zap holds mmu_lock for reading only, a bug: faults and other zaps run
    concurrently.  Linux asserts the write lock (tdx_track, lockdep_assert_held_write)."""


# RANGE.BLOCK, TRACK and REMOVE: one call, a kick, another call; AUG and SEPT.ADD: one call, and
# the loop of tdx_handle_ept_violation.  Linux 6.16 arch/x86/kvm/vmx/tdx.c; the same in 6.19, as
# macro tdh_do_no_vcpus.
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
# status.  PAGE.REMOVE, TRACK and PAGE.WBINVD are called in endless loops.
V1_SERIES: Final = Policy(
    "v1-series",
    "[PATCH 09/21] KVM: TDX: Retry seamcall when TDX_OPERAND_BUSY with operand SEPT, 2024-09-04",
    install_calls=17,
    exactly_sept=True,
    zap_calls=17,
    remove_calls=0,
)
# The loop proposed in the mail: under a lock, until success; a warning and a doubled limit at
# 16, 32, 64 …; KVM_BUG_ON at the 1024th busy answer.
SEED_LOOP: Final = Policy(
    "seed-loop",
    "P. Bonzini, Re: [PATCH 09/21], 2024-09-10",
    doubling_from=16,
    bug_at=1024,
    one_at_a_time=True,
    flush_mmu_lock=True,
)
# A hypothetical kernel that breaks the rule that mmu_lock excludes conflicts between host calls
# (Yan Zhao, 2024-09-13 and 2024-11-21; S. Christopherson, 2024-09-10).
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
    """Return a policy by its name; ``fixed-N`` makes N calls and then gives up the operation.

    Raises:
        ValueError: If the name is unknown; the message gives the nearest name.
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
        nearest = difflib.get_close_matches(name, NAMES, n=1, cutoff=0)[0]
        raise ValueError(f"no policy {name!r}; nearest: {nearest}; all: {', '.join(NAMES)}")
    return _NAMED[name]
