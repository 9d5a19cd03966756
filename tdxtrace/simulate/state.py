"""What the module keeps: TDs, their vCPUs, and the call that is being made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from tdxtrace.simulate.epochs import Epochs
from tdxtrace.simulate.generations import Generation
from tdxtrace.simulate.locks import Holder, Lock, Sharex, SharexHp
from tdxtrace.simulate.pamt import Bundle, PageLock
from tdxtrace.simulate.sept import Entry, Sept
from tdxtrace.simulate.threads import Thread
from tdxtrace.simulate.zero_step import ZeroStep

# OP_STATE numbers of TDCS: intel/tdx-module include/tdx_api_defs.h.
UNINITIALIZED: Final = 0
INITIALIZED: Final = 1
RUNNABLE: Final = 2
LIVE_EXPORT: Final = 3
LIVE_IMPORT: Final = 9
TRACKED_STATES: Final = (RUNNABLE, LIVE_EXPORT, LIVE_IMPORT)

NOWHERE: Final = -1


@dataclass(slots=True)
class Refusal:
    """Why a call was answered busy: which lock, and who held it."""

    resource: str
    holders: tuple[Holder, ...]
    for_host: bool
    """The lock was free, but kept for a host that had failed before."""


class Call:
    """One SEAMCALL or TDCALL, from its start to its return.

    Most words are seldom set: they are attributes of the class until then, because a
    run makes some hundred thousand of these.
    """

    gpa = 0
    level = 0
    page = 0
    package = 0
    version = 0
    operand = 0
    """A further word the wrapper is called with: an hkid, a field, a flag."""
    no_entropy = False
    unfinished = False
    """Whether an interrupt stops CACHE.WB before it is done."""
    interrupted = False
    """Whether an interrupt is pending for the processor while DEMOTE or PROMOTE work."""
    start_ns = 0
    end_ns = 0
    cpu = 0
    in_irq = False
    wrapper = 0
    """Which call of the kernel's wrapper it belongs to: sc_retry makes several SEAMCALLs."""
    status = 0
    asked = 0
    """What the guest's TDG.VP.VMCALL asks for, of a TDH.VP.ENTER that ends in one."""
    out_rcx = 0
    out_rdx = 0
    out_r8 = 0
    armed = False
    """Whether it is a TDH.VP.ENTER that met an armed zero-step gate."""
    entered = False
    """Whether it is one that ran the guest."""
    entry: Entry | None = None
    refusal: Refusal | None = None

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
        self.held: list[Lock | Bundle | PageLock] = []


class Td:
    """One TD: its locks, its Secure EPT, its epoch."""

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
        plain_or_hp = SharexHp if generation.host_priority else Sharex
        self.tree = SharexHp() if generation.tree_host_priority else Sharex()
        self.locks: dict[str, Sharex] = {
            "TDR": plain_or_hp(),
            "OP_STATE": plain_or_hp(),
            "TREE": self.tree,
            "EPOCH": Sharex(),
            "MIG": Sharex(),
            "MIGSC": Sharex(),
        }
        self.epochs = Epochs()
        self.sept = Sept()
        self.op_state = UNINITIALIZED
        # ATTRIBUTES.SEPT_VE_DISABLE: an access to a pending page exits to the host
        # instead of raising #VE in the guest.  Linux TDs require it.
        self.pending_ve_disable = True
        self.n_associated = 0


class Vcpu:
    """One vCPU of a TD, as the module sees it."""

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
        self.lock = SharexHp() if generation.host_priority else Sharex()
        self.zero_step = ZeroStep()
        self.lp = NOWHERE
        self.running = False
        self.epoch = 0
        self.rip = 0
        # First TDCALL answered busy for a host, since any other answer (hp_lock_busy_start).
        self.hp_busy_since: int | None = None
