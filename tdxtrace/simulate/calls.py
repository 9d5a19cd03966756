"""How KVM makes the calls that may be busy: the policy, applied."""

from __future__ import annotations

from collections.abc import Callable

from tdxtrace.simulate.draws import Span
from tdxtrace.simulate.journal import Request
from tdxtrace.simulate.machine import Asked
from tdxtrace.simulate.state import Call, Refusal
from tdxtrace.simulate.threads import Thread
from tdxtrace.simulate.vm import NO_PAGE, Vm
from tdxtrace.simulate.words import (
    ERROR_BIT,
    OPERAND,
    OPERAND_BUSY,
    PREVIOUS_TLB_EPOCH_BUSY,
    is_busy,
)

Make = Callable[[], Call]


def install(vm: Vm, thread: Thread, request: Request, make: Make) -> Asked:
    """PAGE.AUG or SEPT.ADD as the fault path makes it.

    Returns:
        The last status; a busy one means that the fault is to be tried again.
    """
    work = vm.machine.times.aug if request.leaf.endswith("AUG") else vm.machine.times.sept_add
    status = yield from _tries(vm, thread, request, make, (work, vm.policy.install_calls))
    if status & ERROR_BIT and not is_busy(status):
        vm.bug(thread, request.leaf, status)
    return status


def change(vm: Vm, thread: Thread, leaf: str, gpa: int = 0, level: int = 0) -> Asked:
    """RANGE.BLOCK, TRACK or PAGE.REMOVE as the zap path makes it; must not fail.

    Returns:
        The last status; with an error the VM is dead, or the operation was given up.
    """
    machine, policy = vm.machine, vm.policy
    request = vm.request(leaf, thread, NO_PAGE if leaf == "TDH.MEM.TRACK" else (gpa, level))
    work = getattr(machine.times, _WORK[leaf])
    limit = policy.track_calls if leaf == "TDH.MEM.TRACK" else policy.zap_calls

    def make() -> Call:
        return vm.call(leaf, gpa, level)

    before_kick = limit - 1 if policy.kick else limit
    status = yield from _tries(vm, thread, request, make, (work, before_kick))
    if policy.kick and is_busy(status):
        yield from vm.hold_off(thread, leaf)
        status = yield from machine.attempt(thread, request, make(), work)
        yield from vm.let_in(thread)
    if status == PREVIOUS_TLB_EPOCH_BUSY:
        name_laggards(vm, request)
    if status & ERROR_BIT:
        if policy.last_resort == "bug" or not is_busy(status):
            vm.bug(thread, leaf, status)
        else:
            vm.act(thread, "give_up", leaf, len(request.calls))
        machine.journal.leave(request)
    return status


_WORK = {
    "TDH.MEM.RANGE.BLOCK": "block",
    "TDH.MEM.TRACK": "track",
    "TDH.MEM.PAGE.REMOVE": "remove",
    "TDH.MEM.RANGE.UNBLOCK": "block",
    "TDH.MEM.PAGE.DEMOTE": "demote",
    "TDH.MEM.PAGE.PROMOTE": "promote",
}


def name_laggards(vm: Vm, request: Request) -> None:
    """Who kept TRACK from going on: vCPUs that still run in the previous epoch."""
    previous = vm.td.epochs.current - 1
    late = [t.entering for t in vm.tasks if t.vcpu.running and t.vcpu.epoch == previous]
    holders = tuple(call for call in late if call is not None)
    request.calls[-1].refusal = Refusal("PREVIOUS_EPOCH", holders, False)


def _tries(vm: Vm, thread: Thread, request: Request, make: Make, how: tuple[Span, int]) -> Asked:
    """Make the call until it is not busy, or the policy's number is reached."""
    work, limit = how
    if vm.policy.one_at_a_time:
        yield from vm.machine.lock(thread, vm.seamcall_lock, alone=True)
    status, n_busy = ERROR_BIT, 0
    while not vm.dead:
        status = yield from vm.machine.attempt(thread, request, make(), work)
        if not _again(vm, request.leaf, status):
            break
        n_busy += 1
        if n_busy == limit or (vm.policy.doubling_from and _doubled(vm, thread, request, n_busy)):
            break
        thread.now += thread.draws.span(vm.machine.times.wrapper_turn)
    if vm.policy.one_at_a_time:
        yield from vm.machine.catch_up(thread)
        vm.seamcall_lock.release()
    return status


def _again(vm: Vm, leaf: str, status: int) -> bool:
    # The v1 series compares the whole word, but in its loop around TRACK only the code.
    if vm.policy.exactly_sept and leaf != "TDH.MEM.TRACK":
        return status == OPERAND_BUSY | OPERAND["SEPT_TREE"]
    return is_busy(status)


def _doubled(vm: Vm, thread: Thread, request: Request, n_busy: int) -> bool:
    """Warn and double the number at its n-th busy answer; returns whether the VM is dead.

    The number is one for the whole host, and only equality is tested.
    """
    if n_busy != vm.machine.retry_max:
        return False
    vm.act(thread, "warn", request.leaf, n_busy)
    vm.machine.note(thread, "dmesg", "exceeded", n_busy)
    if n_busy == vm.policy.bug_at:
        vm.machine.note(thread, "dmesg", "crashing")
        vm.bug(thread, request.leaf, request.calls[-1].status)
        return True
    vm.machine.retry_max = 2 * n_busy
    return False
