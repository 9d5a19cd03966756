"""SEAMCALLs that may be answered busy, retried according to the policy."""

from __future__ import annotations

from collections.abc import Callable

from tdxtrace.simulate.durations import Duration
from tdxtrace.simulate.host.scheduler import SimProcess
from tdxtrace.simulate.journal import BrokenRule, Request
from tdxtrace.simulate.kvm.policies import Policy
from tdxtrace.simulate.kvm.vm import NO_PAGE, Vm
from tdxtrace.simulate.module import abi
from tdxtrace.simulate.module.state import BusyReason, Call
from tdxtrace.simulate.thread import Thread

MakeCall = Callable[[], Call]


def install(vm: Vm, thread: Thread, request: Request, make_call: MakeCall) -> SimProcess[int]:
    """Call PAGE.AUG or SEPT.ADD as in the page fault path.

    Returns:
        The last status; if it is busy, the fault must be retried.
    """
    durations = vm.machine.durations
    work = durations.aug if request.leaf.endswith("AUG") else durations.sept_add
    limits = work, vm.policy.install_calls
    status = yield from _call_until_settled(vm, thread, request, make_call, limits)
    is_retried = _should_retry(vm, request.leaf, status)
    if status & abi.ERROR_BIT and not is_retried:
        vm.kvm_bug_on(thread, request.leaf, status)
    return status


def zap_call(vm: Vm, thread: Thread, leaf: str, gpa: int = 0, level: int = 0) -> SimProcess[int]:
    """Call RANGE.BLOCK, TRACK or PAGE.REMOVE as in the zap path, where a failure is a bug.

    Returns:
        The last status; after an error the VM is dead, or the operation was given up.
    """
    machine, policy = vm.machine, vm.policy
    request = vm.request(leaf, thread, NO_PAGE if leaf == "TDH.MEM.TRACK" else (gpa, level))
    work = getattr(machine.durations, _WORK[leaf])
    limit = _limit_of(policy, leaf)

    def make_call() -> Call:
        return vm.call(leaf, gpa, level)

    before_kick = limit - 1 if policy.kick else limit
    status = yield from _call_until_settled(vm, thread, request, make_call, (work, before_kick))
    if policy.kick and abi.is_busy(status):
        yield from vm.no_vcpus_enter_start(thread, leaf)
        status = yield from machine.seamcall(thread, request, make_call(), work)
        if abi.is_busy(status):
            _blame_after_kick(vm, request)
        yield from vm.no_vcpus_enter_stop(thread)
    if status == abi.PREVIOUS_TLB_EPOCH_BUSY:
        blame_previous_epoch(vm, request)
    if status & abi.ERROR_BIT:
        if policy.last_resort == "bug" or not abi.is_busy(status):
            vm.kvm_bug_on(thread, leaf, status)
        else:
            vm.log_action(thread, "give_up", leaf, len(request.calls))
        machine.journal.abandon(request)
    return status


_WORK = {
    "TDH.MEM.RANGE.BLOCK": "block",
    "TDH.MEM.TRACK": "track",
    "TDH.MEM.PAGE.REMOVE": "remove",
}


def _limit_of(policy: Policy, leaf: str) -> int:
    if leaf == "TDH.MEM.TRACK":
        return policy.track_calls
    if leaf == "TDH.MEM.PAGE.REMOVE" and policy.remove_calls is not None:
        return policy.remove_calls
    return policy.zap_calls


def _blame_after_kick(vm: Vm, request: Request) -> None:
    """Record that the call after a kick was busy although no vCPU could enter."""
    call = request.calls[-1]
    holders = call.busy_reason.holders if call.busy_reason is not None else ()
    held_by = next((holder for holder in holders if isinstance(holder, Call)), None)
    vm.machine.journal.broken.append(BrokenRule("busy_after_kick", call, held_by))


def blame_previous_epoch(vm: Vm, request: Request) -> None:
    """Record the reason of a busy TRACK: the vCPUs that still run in the previous epoch."""
    previous = vm.td.epochs.current - 1
    vcpus = [v for v in vm.vcpus if v.vcpu.running and v.vcpu.epoch == previous]
    holders = tuple(v.entering for v in vcpus if v.entering is not None)
    call = request.calls[-1]
    call.busy_reason = BusyReason("PREVIOUS_EPOCH", holders, False)
    held_by = holders[0] if holders else None
    vm.machine.journal.broken.append(BrokenRule("track_without_kick", call, held_by))


def _call_until_settled(
    vm: Vm, thread: Thread, request: Request, make_call: MakeCall, limits: tuple[Duration, int]
) -> SimProcess[int]:
    """Repeat a call until it is not busy or the policy's limit is reached; returns the status.

    Args:
        vm: The VM.
        thread: The calling thread.
        request: The request to which the attempts belong.
        make_call: Returns the next call, not yet made.
        limits: Duration of the leaf's work, and number of calls (0: no limit).
    """
    work, limit = limits
    if vm.policy.one_at_a_time:
        yield from vm.machine.acquire_lock(thread, vm.seamcall_lock, exclusive=True)
    status, n_busy = abi.ERROR_BIT, 0
    while not vm.dead:
        status = yield from vm.machine.seamcall(thread, request, make_call(), work)
        if not _should_retry(vm, request.leaf, status):
            break
        n_busy += 1
        if n_busy == limit or (
            vm.policy.doubling_from and _warn_and_double(vm, thread, request, n_busy)
        ):
            break
        thread.now += thread.random.duration(vm.machine.durations.wrapper_turn)
    if vm.policy.one_at_a_time:
        yield from vm.machine.sync_clock(thread)
        vm.seamcall_lock.release()
    return status


def _should_retry(vm: Vm, leaf: str, status: int) -> bool:
    # The v1 series compares the whole word; only its loop around TRACK compares just the code.
    if vm.policy.exactly_sept and leaf != "TDH.MEM.TRACK":
        return status == abi.OPERAND_BUSY | abi.OPERAND["SEPT_TREE"]
    return abi.is_busy(status)


def _warn_and_double(vm: Vm, thread: Thread, request: Request, n_busy: int) -> bool:
    """Warn and double the limit when it is reached; returns whether the VM was killed.

    There is one limit for the whole host, and the code tests only for equality.
    """
    if n_busy != vm.machine.retry_max:
        return False
    vm.log_action(thread, "warn", request.leaf, n_busy)
    vm.machine.log_event(thread, "dmesg", "exceeded", n_busy)
    if n_busy == vm.policy.bug_at:
        vm.machine.log_event(thread, "dmesg", "crashing")
        vm.kvm_bug_on(thread, request.leaf, request.calls[-1].status)
        return True
    vm.machine.retry_max = 2 * n_busy
    return False
