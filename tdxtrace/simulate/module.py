"""The TDX module: SEAMCALLs that take their locks in order, or are answered busy.

A call is made in two steps, because it takes time: ``begin`` at the instant it tries
its locks, ``finish`` when its work is done.  Between the two it holds what it took,
and whoever needs that is answered busy.
"""

from __future__ import annotations

from tdxtrace.simulate import leaves
from tdxtrace.simulate.generations import Generation
from tdxtrace.simulate.lock_plans import Plan
from tdxtrace.simulate.locks import BUSY_FOR_HOST, TAKEN, Lock, Sharex
from tdxtrace.simulate.pamt import Bundle, PageLock, Pamt
from tdxtrace.simulate.state import Call, Refusal
from tdxtrace.simulate.words import (
    EPT_WALK_FAILED,
    HOST_PRIORITY_BUSY,
    INTERRUPTED_BUSY,
    INTERRUPTED_RESTARTABLE,
    INTERRUPTED_RESUMABLE,
    OPERAND,
    OPERAND_BUSY,
    RND_NO_ENTROPY,
    SUCCESS,
)

_LONG = ("TDH.MEM.PAGE.DEMOTE", "TDH.MEM.PAGE.PROMOTE")
# Leaves that walk the Secure EPT, once they have the locks of the TD.
_WALKING = frozenset(
    f"TDH.MEM.{name}"
    for name in (
        "PAGE.ADD PAGE.AUG PAGE.REMOVE PAGE.DEMOTE PAGE.PROMOTE PAGE.RELOCATE "
        "RANGE.BLOCK RANGE.UNBLOCK SEPT.ADD SEPT.REMOVE SEPT.RD"
    ).split()
) | {"TDH.EXPORT.MEM"}
# Locks of the platform: one of its kind, or one in each package.
_PER_PACKAGE = ("KET", "WBCACHE")
_PLATFORM = ("KOT", *_PER_PACKAGE)


class Module:
    """The module of one platform; TDs and vCPUs are handed in with each call."""

    def __init__(self, generation: Generation) -> None:
        self.generation = generation
        self.pamt = Pamt(generation.host_priority)
        self._platform: dict[tuple[str, int], Sharex] = {}

    def begin(self, call: Call, version: int = 0) -> int:
        """Try a call's locks and look whether the state allows it.

        Returns:
            SUCCESS, and the call now holds its locks until ``finish``; or the status
            that it is answered with at once, holding nothing.  A busy answer leaves
            who held the lock in ``call.refusal``.
        """
        plans = self.generation.plans
        key = f"{call.leaf} v{version}"
        status = self.take(call, plans[key] if version and key in plans else plans[call.leaf])
        if status == SUCCESS:
            status = RND_NO_ENTROPY if call.no_entropy else leaves.check(call)
            if status != SUCCESS:
                self.release(call)
        if status != SUCCESS and call.entry is not None:
            # sept_manager.c set_arch_septe_details_in_vmm_regs: after a walk.
            call.out_rcx = call.entry.word()
            call.out_rdx = call.entry.level | call.entry.state << 8
        return status

    def finish(self, call: Call) -> int:
        """Do what a call is for that ``begin`` let through, and give its locks back."""
        status = self._stopped(call)
        if status == SUCCESS:
            status = leaves.commit(call)
            entry = call.entry
            if entry is not None and not self.generation.entry_writes_keep_priority:
                entry.host_priority = False
        self.release(call)
        return status

    def _stopped(self, call: Call) -> int:
        """Whether a long leaf stops at its check for what is pending; nothing is committed."""
        if call.unfinished:
            return INTERRUPTED_RESUMABLE
        if call.leaf in _LONG:
            if call.interrupted and self.generation.demote_interruptible:
                return INTERRUPTED_RESTARTABLE
            assert call.td is not None
            if (
                getattr(call.td.tree, "host_priority", False)
                and self.generation.yields_to_tree_priority
            ):
                return INTERRUPTED_BUSY
        return SUCCESS

    def take(self, call: Call, plan: Plan) -> int:
        """Take locks in order, on top of what ``call`` holds; all of it is lost on failure."""
        td, vcpu, held = call.td, call.vcpu, call.held
        for resource, exclusive, operand in plan:
            lock: Lock | Bundle | PageLock
            if td is not None and resource in td.locks:
                lock = td.locks[resource]
            elif resource == "TDVPR" and vcpu is not None:
                lock = vcpu.lock
            elif self._walk(call):
                lock = self._lock(resource, call)
            else:
                break
            result = lock.take(call, exclusive)
            if result != TAKEN:
                for_host = result == BUSY_FOR_HOST
                call.refusal = Refusal(resource, lock.holders(), for_host)
                self.release(call)
                return (HOST_PRIORITY_BUSY if for_host else OPERAND_BUSY) | operand
            held.append(lock)
        if self._walk(call):
            return SUCCESS
        self.release(call)
        return EPT_WALK_FAILED | OPERAND["RCX"]

    def release(self, call: Call) -> None:
        """Give back everything ``call`` holds, the last lock first."""
        held = call.held
        while held:
            held.pop().drop(call)

    def _walk(self, call: Call) -> bool:
        """Find the SEPT entry a call works on; False if its table is not there."""
        if call.entry is None:
            if call.leaf not in _WALKING and not call.guest:
                return True
            assert call.td is not None
            call.entry = call.td.sept.walk(call.gpa, call.level)
        return call.guest or call.entry.level == call.level

    def _lock(self, resource: str, call: Call) -> Lock | Bundle | PageLock:
        entry = call.entry
        if resource == "ENTRY" and entry is not None:
            return entry
        if resource == "CHILDREN" and call.td is not None and entry is not None:
            return Bundle([(child, True) for child in call.td.sept.children(entry)])
        if resource in _PLATFORM:
            package = call.package if resource in _PER_PACKAGE else 0
            return self._platform.setdefault((resource, package), Sharex())
        return self.pamt.page(*leaves.page_of(resource, call))
