"""The TDX module: SEAMCALLs acquire their locks in order, or are answered busy.

A call is made in two steps, because it takes time: ``begin`` acquires its locks, ``finish``
completes its work.  In between it holds its locks, and other calls that need one of them are
answered busy.
"""

from __future__ import annotations

from tdxtrace.simulate.module import abi, leaves
from tdxtrace.simulate.module.generations import Generation, LockSequence
from tdxtrace.simulate.module.locks import (
    ACQUIRED,
    BUSY_HOST_PRIORITY,
    Lock,
    LockGroup,
    Pamt,
    PamtPageLock,
    SharexLock,
)
from tdxtrace.simulate.module.state import BusyReason, Call

_INTERRUPTIBLE = ("TDH.MEM.PAGE.DEMOTE", "TDH.MEM.PAGE.PROMOTE")
# Leaves that walk the Secure EPT after they acquired the locks of the TD.
_WALKING = frozenset(
    f"TDH.MEM.{name}"
    for name in (
        "PAGE.ADD PAGE.AUG PAGE.REMOVE PAGE.DEMOTE PAGE.PROMOTE PAGE.RELOCATE "
        "RANGE.BLOCK RANGE.UNBLOCK SEPT.ADD SEPT.REMOVE SEPT.RD"
    ).split()
) | {"TDH.EXPORT.MEM"}
# Locks of the platform: one of each kind, or one for each package.
_PER_PACKAGE = ("KET", "WBCACHE")
_PLATFORM = ("KOT", *_PER_PACKAGE)


class Module:
    """The module of one platform; each call names its TD and vCPU."""

    def __init__(self, generation: Generation) -> None:
        self.generation = generation
        self.pamt = Pamt(generation.host_priority)
        self._platform: dict[tuple[str, int], SharexLock] = {}

    def begin(self, call: Call, version: int = 0) -> int:
        """Acquire the locks of a call and check that the state allows it.

        Returns:
            SUCCESS, and the call holds its locks until ``finish``; or the status of a call that
            fails immediately and holds no lock.  For a busy answer the holders of the lock are
            stored in ``call.busy_reason``.
        """
        sequences = self.generation.lock_sequences
        key = f"{call.leaf} v{version}"
        status = self.acquire(
            call, sequences[key] if version and key in sequences else sequences[call.leaf]
        )
        if status == abi.SUCCESS:
            status = abi.RND_NO_ENTROPY if call.no_entropy else leaves.check(call)
            if status != abi.SUCCESS:
                self.release(call)
        if status != abi.SUCCESS and call.entry is not None:
            # sept_manager.c set_arch_septe_details_in_vmm_regs: after a walk.
            call.out_rcx = call.entry.word()
            call.out_rdx = call.entry.level | call.entry.state << 8
        return status

    def finish(self, call: Call) -> int:
        """Complete a call for which ``begin`` succeeded, and release its locks."""
        status = self._interruption(call)
        if status == abi.SUCCESS:
            status = leaves.commit(call)
            entry = call.entry
            if entry is not None and not self.generation.entry_writes_keep_priority:
                entry.host_priority = False
        self.release(call)
        return status

    def _interruption(self, call: Call) -> int:
        """Return the status with which a long leaf stops for a pending interrupt, or SUCCESS."""
        if call.interrupted:
            return abi.INTERRUPTED_RESUMABLE
        if call.leaf in _INTERRUPTIBLE:
            if call.interrupt_pending:
                return abi.INTERRUPTED_RESTARTABLE
            assert call.td is not None
            if (
                getattr(call.td.tree, "host_priority", False)
                and self.generation.yields_to_tree_priority
            ):
                return abi.INTERRUPTED_BUSY
        return abi.SUCCESS

    def acquire(self, call: Call, sequence: LockSequence) -> int:
        """Acquire locks in order, in addition to those that ``call`` holds.

        On failure all of its locks are released, and ``call.busy_reason`` is set.

        Returns:
            SUCCESS, OPERAND_BUSY or HOST_PRIORITY_BUSY with an operand id, or
            EPT_WALK_FAILED if the table of the SEPT entry does not exist.
        """
        td, vcpu, held = call.td, call.vcpu, call.locks_held
        for resource, exclusive, operand in sequence:
            lock: Lock | LockGroup | PamtPageLock
            if td is not None and resource in td.locks:
                lock = td.locks[resource]
            elif resource == "TDVPR" and vcpu is not None:
                lock = vcpu.lock
            elif self._walk(call):
                lock = self._lock(resource, call)
            else:
                break
            result = lock.acquire(call, exclusive)
            if result != ACQUIRED:
                by_host_priority = result == BUSY_HOST_PRIORITY
                call.busy_reason = BusyReason(resource, lock.holders(), by_host_priority)
                self.release(call)
                return (abi.HOST_PRIORITY_BUSY if by_host_priority else abi.OPERAND_BUSY) | operand
            held.append(lock)
        if self._walk(call):
            return abi.SUCCESS
        self.release(call)
        return abi.EPT_WALK_FAILED | abi.OPERAND["RCX"]

    def release(self, call: Call) -> None:
        """Release all locks of ``call``, the last one first."""
        held = call.locks_held
        while held:
            held.pop().release(call)

    def _walk(self, call: Call) -> bool:
        """Find the SEPT entry of a call; False if its table does not exist."""
        if call.entry is None:
            if call.leaf not in _WALKING and not call.guest:
                return True
            assert call.td is not None
            call.entry = call.td.sept.walk(call.gpa, call.level)
        return call.guest or call.entry.level == call.level

    def _lock(self, resource: str, call: Call) -> Lock | LockGroup | PamtPageLock:
        entry = call.entry
        if resource == "ENTRY" and entry is not None:
            return entry
        if resource == "CHILDREN" and call.td is not None and entry is not None:
            return LockGroup(call.td.sept.children(entry))
        if resource in _PLATFORM:
            package = call.package if resource in _PER_PACKAGE else 0
            return self._platform.setdefault((resource, package), SharexLock())
        return self.pamt.page(*leaves.pamt_page(resource, call))
