"""The module's state: calls, TDs with their TLB epochs and Secure EPT, vCPUs with zero-step.

Sources: intel/tdx-module ``src/common/helpers/helpers.c adjust_tlb_tracking_state``,
``helpers.h is_tlb_tracked``, ``src/vmm_dispatcher/api_calls/tdh_mem_track.c``;
``src/common/memory_handlers/sept_manager.{c,h}`` (the Secure EPT);
``src/td_transitions/td_exit_stepping.{c,h}`` (``vmexit_stepping_filter``,
``td_exit_epf_stepping_log``, ``td_entry_stepping_filter``), ``tdh_vp_enter.c``
(``handle_stepping_filter``); the stepping constants are the same in every release from
1.0.00 to 1.5.25.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from tdxtrace.simulate.module import abi
from tdxtrace.simulate.module.generations import Generation
from tdxtrace.simulate.module.locks import (
    EntryLock,
    Holder,
    Lock,
    LockGroup,
    PamtPageLock,
    SharexHpLock,
    SharexLock,
)
from tdxtrace.simulate.thread import Thread

BLOCKED_STATE: Final = {
    abi.MAPPED: abi.BLOCKED,
    abi.PENDING: abi.PENDING_BLOCKED,
    abi.NL_MAPPED: abi.NL_BLOCKED,
}
UNBLOCKED_STATE: Final = {blocked: state for state, blocked in BLOCKED_STATE.items()}


class TlbEpochs:
    """TLB tracking of one TD: its epoch, and the number of vCPUs in each of the last two epochs.

    ``inside`` counts vCPUs by the lowest bit of the epoch in which they entered.
    """

    __slots__ = ("current", "inside")

    def __init__(self) -> None:
        self.current = 0
        self.inside = [0, 0]

    def enter(self) -> int:
        """Count an entry; returns the epoch, to be passed to ``leave``."""
        self.inside[self.current & 1] += 1
        return self.current

    def leave(self, epoch: int) -> None:
        """Count an exit, or an entry that was refused after it was counted."""
        self.inside[epoch & 1] -= 1

    def advance(self) -> bool:
        """Begin the next epoch (TRACK); False if a vCPU still runs in the previous one."""
        if self.inside[(self.current - 1) & 1]:
            return False
        self.current += 1
        return True

    def is_tracked(self, blocked_in: int) -> bool:
        """Return whether no running vCPU can still use a translation blocked in an epoch."""
        previous = self.current - 1
        if blocked_in < previous:
            return True
        return blocked_in == previous and not self.inside[previous & 1]


# STEPPING_EPF_THRESHOLD: counted EPT violations at one RIP before pages are logged.
STEPPING_EPF_THRESHOLD: Final = 6
# EPF_GPA_LIST_SIZE: maximum number of logged pages.
EPF_GPA_LIST_SIZE: Final = 32


class ZeroStep:
    """Zero-step mitigation of one vCPU: counted faults and logged pages.

    The state persists over exits; only progress of RIP clears it.
    """

    __slots__ = ("counter", "entry_rip", "pages")

    def __init__(self) -> None:
        self.counter = 0
        self.pages: list[int] = []
        self.entry_rip = 0

    @property
    def armed(self) -> bool:
        """Return whether the next TDH.VP.ENTER has to pass the gate."""
        return bool(self.pages)

    def on_entry(self, rip: int) -> None:
        """Store RIP at an entry that reaches the filter, even if it is refused."""
        self.entry_rip = rip

    def on_exit(self, rip: int) -> None:
        """Clear the state at a VM exit with a new RIP, even one that the module handles itself."""
        if rip != self.entry_rip:
            self.counter = 0
            self.pages.clear()

    def on_counted_fault(self, page: int | None) -> bool:
        """Count an EPT violation on a private page that becomes a TD exit.

        Must not be called for faults that do not count: on a shared page, on a pending page
        that raises #VE, and by TDG.MEM.PAGE.ACCEPT or ATTR.

        Args:
            page: The page that faulted; None for a shared page, which generation A counts
                but does not log (1.0.03 ``vmexit_stepping_filter``).

        Returns:
            Whether this fault armed the gate; the seventh at one RIP does.
        """
        if self.counter < STEPPING_EPF_THRESHOLD:
            self.counter += 1
            return False
        was_armed = self.armed
        if page is not None and page not in self.pages and len(self.pages) < EPF_GPA_LIST_SIZE:
            self.pages.append(page)
        return self.armed and not was_armed


# OP_STATE numbers of TDCS: intel/tdx-module include/tdx_api_defs.h.
UNINITIALIZED: Final = 0
INITIALIZED: Final = 1
RUNNABLE: Final = 2
LIVE_EXPORT: Final = 3
LIVE_IMPORT: Final = 9
TRACKED_STATES: Final = (RUNNABLE, LIVE_EXPORT, LIVE_IMPORT)

NOWHERE: Final = -1


@dataclass(slots=True)
class BusyReason:
    """Reason of a busy answer: the lock and its holders, or another condition."""

    resource: str
    holders: tuple[Holder, ...]
    by_host_priority: bool
    """Whether the lock was free, but reserved for a host that had failed before."""


class Call:
    """One SEAMCALL or TDCALL, from its start to its return.

    Defaults are class attributes, because a run makes some hundred thousand calls and most fields
    are seldom set.
    """

    gpa = 0
    level = 0
    page = 0
    further_pages: tuple[int, ...] = ()
    """Pages of a call after the first one."""
    package = 0
    version = 0
    operand = 0
    """A further argument of the wrapper: an hkid, a field, a flag."""
    no_entropy = False
    interrupted = False
    """Whether an interrupt stops CACHE.WB before it completes."""
    interrupt_pending = False
    """Whether an interrupt is pending on the CPU during DEMOTE or PROMOTE."""
    start_ns = 0
    end_ns = 0
    cpu = 0
    in_irq = False
    wrapper_call = 0
    """Number of the wrapper call that it belongs to; sc_retry makes several SEAMCALLs in one."""
    status = 0
    vmcall_reason = 0
    """Reason of the TDG.VP.VMCALL that ended a TDH.VP.ENTER, as a VMX exit reason."""
    out_rcx = 0
    out_rdx = 0
    out_r8 = 0
    armed = False
    """Whether it is a TDH.VP.ENTER whose zero-step gate was armed."""
    entered = False
    """Whether it is a TDH.VP.ENTER that ran the guest."""
    executed = False
    """Whether it is a TDH.VP.ENTER in which the guest completed an instruction."""
    entry: SeptEntry | None = None
    busy_reason: BusyReason | None = None

    def __init__(
        self,
        leaf: str,
        thread: Thread | None = None,
        td: Td | None = None,
        vcpu: Vcpu | None = None,
        guest: bool = False,
    ) -> None:
        self.leaf = leaf
        self.thread = thread
        self.td = td
        self.vcpu = vcpu
        self.guest = guest
        self.locks_held: list[Lock | LockGroup | PamtPageLock] = []


class Td:
    """One TD: its locks, its Secure EPT, its TLB epochs."""

    __slots__ = (
        "epochs",
        "locks",
        "n_associated",
        "number",
        "op_state",
        "pending_ve_disable",
        "sept",
        "tree",
    )

    def __init__(self, generation: Generation, number: int = 0) -> None:
        self.number = number
        plain_or_hp = SharexHpLock if generation.host_priority else SharexLock
        self.tree = SharexHpLock() if generation.tree_host_priority else SharexLock()
        self.locks: dict[str, SharexLock] = {
            "TDR": plain_or_hp(),
            "OP_STATE": plain_or_hp(),
            "TREE": self.tree,
            "EPOCH": SharexLock(),
            "MIG": SharexLock(),
            "MIGSC": SharexLock(),
        }
        self.epochs = TlbEpochs()
        self.sept = Sept()
        self.op_state = UNINITIALIZED
        # ATTRIBUTES.SEPT_VE_DISABLE: an access to a pending page exits to the host
        # instead of raising #VE in the guest.  Linux TDs require it.
        self.pending_ve_disable = True
        self.n_associated = 0


class Vcpu:
    """The module's state of one vCPU of a TD."""

    __slots__ = (
        "epoch",
        "hp_busy_since",
        "lock",
        "lp",
        "number",
        "rip",
        "running",
        "td",
        "zero_step",
    )

    def __init__(self, td: Td, number: int, generation: Generation) -> None:
        self.td = td
        self.number = number
        self.lock = SharexHpLock() if generation.host_priority else SharexLock()
        self.zero_step = ZeroStep()
        self.lp = NOWHERE
        self.running = False
        self.epoch = 0
        self.rip = 0
        # Time of the first of consecutive TDCALLs refused by host priority (hp_lock_busy_start).
        self.hp_busy_since: int | None = None


class SeptEntry(EntryLock):
    """One Secure EPT entry: lock, state, page that it maps, epoch in which it was blocked."""

    __slots__ = ("blocked_by", "blocked_in", "gpa", "level", "page", "state")

    def __init__(self, gpa: int, level: int) -> None:
        super().__init__()
        self.gpa = gpa
        self.level = level
        self.state = abi.FREE
        self.page = 0
        self.blocked_in = 0
        self.blocked_by: Call | None = None

    def word(self) -> int:
        """Return the entry's value in RCX of a failed leaf; the model has only the page."""
        return self.page


class Sept:
    """The entries of a TD's Secure EPT; free entries that were never accessed are not stored.

    An entry that points to a table of the next level is NL_MAPPED; one that maps a page is a leaf.
    """

    __slots__ = ("entries",)

    def __init__(self) -> None:
        self.entries: dict[int, SeptEntry] = {}

    def entry(self, gpa: int, level: int) -> SeptEntry:
        """Return the entry of ``level`` that covers ``gpa``, even if its table does not exist."""
        base = gpa & -abi.page_bytes(level)
        found = self.entries.get(base | level)
        if found is None:
            found = self.entries[base | level] = SeptEntry(base, level)
        return found

    def walk(self, gpa: int, level: int) -> SeptEntry:
        """Walk down to ``level``; returns the entry where the walk ends, possibly above it.

        The loop walks up from ``level``, with the same result: KVM and the module add tables from
        the top down, so that a table exists only if all of its parents do.
        """
        entries = self.entries
        ended = level
        for above in range(level + 1, abi.ROOT_LEVEL + 1):
            parent = entries.get((gpa & -abi.PAGE_BYTES[above]) | above)
            if parent is not None and parent.state == abi.NL_MAPPED:
                break
            ended = above
        return self.entry(gpa, ended)

    def mapping(self, gpa: int) -> SeptEntry:
        """Return the entry where a guest's access to ``gpa`` ends: a leaf, or a free entry."""
        return self.walk(gpa, 0)

    def children(self, entry: SeptEntry) -> list[SeptEntry]:
        """Return the 512 entries of the table below ``entry``."""
        step = abi.page_bytes(entry.level - 1)
        return [self.entry(entry.gpa + i * step, entry.level - 1) for i in range(512)]
