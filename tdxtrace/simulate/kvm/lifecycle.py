"""The life cycle of a TD: build, flush, teardown, including KVM's calls on other CPUs.

Sources: Linux 6.16 ``arch/x86/kvm/vmx/tdx.c __tdx_td_init``, ``tdx_td_vcpu_init``,
``tdx_gmem_post_populate``, ``tdx_td_finalize``, ``tdx_flush_vp_on_cpu``,
``tdx_mmu_release_hkid``, ``smp_func_do_phymem_cache_wb``, ``tdx_reclaim_page``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from tdxtrace.simulate.durations import Duration
from tdxtrace.simulate.host.machine import POLL_NS
from tdxtrace.simulate.host.scheduler import SimProcess
from tdxtrace.simulate.host.vcpu_state import VcpuState
from tdxtrace.simulate.kvm.vm import NO_PAGE, PRESENT, Vm
from tdxtrace.simulate.module.abi import (
    INTERRUPTED_RESUMABLE,
    OPERAND_BUSY,
    ROOT_LEVEL,
    SUCCESS,
    is_busy,
    page_bytes,
)
from tdxtrace.simulate.module.state import NOWHERE, Call, Vcpu
from tdxtrace.simulate.thread import Thread

# Control pages of a TD and of a vCPU: TDCS and TDCX pages, module 1.5 metadata
# (TDCS_BASE_SIZE, TDVPS_BASE_SIZE) as read by Linux; 4 and 5 besides the root pages.
_TDCS_PAGES: Final = 4
_TDVPS_PAGES: Final = 5
_EXTEND_CALLS: Final = 16
"""TDH.MR.EXTEND measures 256 bytes; a page takes sixteen."""
_CACHE_WB_CALLS: Final = 10_000
"""TDX_SEAMCALL_RETRIES: Linux arch/x86/kvm/vmx/tdx.c."""


def _call_once(
    vm: Vm, thread: Thread, make_call: Callable[[], Call], work: Duration
) -> SimProcess[int]:
    """Make a call once; if it fails, mark the VM dead."""
    call = make_call()
    page = (call.gpa, call.level) if call.gpa else NO_PAGE
    request = vm.request(call.leaf, thread, page)
    status = yield from vm.machine.seamcall(thread, request, call, work)
    if status >> 63:
        vm.kvm_bug_on(thread, call.leaf, status)
    return status


def _call_maker(
    vm: Vm, leaf: str, page: int = 0, vcpu: Vcpu | None = None, operand: int = 0
) -> Callable[[], Call]:
    def make_call() -> Call:
        call = vm.call(leaf)
        call.page, call.vcpu, call.operand = page, vcpu, operand
        # Linux passes version 1 of TDH.VP.INIT (tdh_vp_init, 1 << 16); 1.0.x has only 0.
        is_v1 = leaf == "TDH.VP.INIT" and vm.machine.module.generation.name != "A"
        call.version = int(is_v1)
        return call

    return make_call


def build(vm: Vm, thread: Thread, gpas: list[int], no_entropy: float) -> SimProcess[None]:
    """Build a TD: create it, its vCPUs and its first pages, measure them, finalize.

    Args:
        vm: The VM; its vCPUs exist in the model, but not yet in the module.
        thread: The main thread of the VMM.
        gpas: Addresses of its first guest pages.
        no_entropy: Probability that the module finds no entropy when it needs some.
    """
    machine, manage = vm.machine, vm.machine.durations.manage
    # tdx_lock keeps two TDs from contending for the key ownership table.
    yield from machine.acquire_lock(thread, machine.tdx_lock, exclusive=True)
    yield from _retry_until_entropy(vm, thread, "TDH.MNG.CREATE", no_entropy)
    yield from machine.sync_clock(thread)
    machine.tdx_lock.release()
    yield from _call_once(vm, thread, _call_maker(vm, "TDH.MNG.KEY.CONFIG"), manage)
    for i in range(_TDCS_PAGES):
        chance = no_entropy if i == _TDCS_PAGES - 1 else 0.0
        yield from _retry_until_entropy(vm, thread, "TDH.MNG.ADDCX", chance)
    yield from _call_once(vm, thread, _call_maker(vm, "TDH.MNG.INIT"), manage)
    n_inits = 0 if vm.racing_init else 1
    leaves = ("TDH.VP.CREATE", 1), ("TDH.VP.ADDCX", _TDVPS_PAGES), ("TDH.VP.INIT", n_inits)
    for state in vm.vcpus:
        for leaf, n in leaves:
            for _ in range(n):
                page = vm.new_page() if leaf != "TDH.VP.INIT" else 0
                yield from _call_once(vm, thread, _call_maker(vm, leaf, page, state.vcpu), manage)
    if vm.racing_init:
        yield from _init_all_at_once(vm, thread)
    for gpa in gpas:
        yield from _add(vm, thread, gpa)
    yield from _call_once(vm, thread, _call_maker(vm, "TDH.MR.FINALIZE"), manage)


def _init_all_at_once(vm: Vm, thread: Thread) -> SimProcess[None]:
    """Call KVM_TDX_INIT_VCPU for every vCPU on its own thread, all at the same time.

    Version 1 of TDH.VP.INIT takes the TDR exclusively: all but one call are busy with operand TDR,
    the ioctl fails, and the VMM tries again (Yan Zhao, 2025-09-02: SEAMCALL TDH_VP_INIT failed:
    0x8000020000000080; Linux 6.19 prevents it by additional locks).
    """
    env = vm.machine.env
    yield from vm.machine.sync_clock(thread)
    thread.irqs_enabled = True
    yield env.all_of([env.process(_init_vcpu(vm, state)) for state in vm.vcpus])
    thread.irqs_enabled = False
    thread.now = int(env.now)


def _init_vcpu(vm: Vm, state: VcpuState) -> SimProcess[None]:
    machine, thread = vm.machine, state.thread
    thread.cpu = yield from machine.cpus.acquire(state, thread.cpu)
    thread.now = int(machine.env.now)
    make_call, status = _call_maker(vm, "TDH.VP.INIT", vcpu=state.vcpu), OPERAND_BUSY
    while is_busy(status):
        request = vm.request("TDH.VP.INIT", thread)
        status = yield from machine.seamcall(thread, request, make_call(), machine.durations.manage)
        if is_busy(status):
            machine.log_event(thread, "dmesg", "failed", "TDH.VP.INIT", status)
            thread.now += thread.random.duration(machine.durations.userspace)
    yield from machine.sync_clock(thread)
    machine.cpus.release(thread.cpu)


def _retry_until_entropy(vm: Vm, thread: Thread, leaf: str, no_entropy: float) -> SimProcess[None]:
    """Repeat a call until it finds entropy, as the VMM repeats its ioctl after each -EAGAIN."""
    request = vm.request(leaf, thread)
    make_call = _call_maker(vm, leaf, vm.new_page(), operand=vm.hkid)
    while True:
        status = yield from vm.machine.sc_retry(thread, request, make_call, no_entropy)
        if status == SUCCESS:
            return
        thread.now += thread.random.duration(vm.machine.durations.userspace)


def _add(vm: Vm, thread: Thread, gpa: int) -> SimProcess[None]:
    durations = vm.machine.durations
    for level in range(ROOT_LEVEL, 0, -1):
        key = gpa & -page_bytes(level) | level
        if key not in vm.sptes:
            vm.sptes[key] = PRESENT
            yield from _page_call(vm, thread, "TDH.MEM.SEPT.ADD", key, durations.sept_add)
    vm.sptes[gpa] = PRESENT
    yield from _page_call(vm, thread, "TDH.MEM.PAGE.ADD", gpa, durations.page_add)
    for chunk in range(_EXTEND_CALLS):
        yield from _page_call(vm, thread, "TDH.MR.EXTEND", gpa + chunk * 256, durations.extend)


def _page_call(vm: Vm, thread: Thread, leaf: str, key: int, work: Duration) -> SimProcess[None]:
    def make_call() -> Call:
        extending = leaf == "TDH.MR.EXTEND"
        call = vm.call(leaf, key if extending else key & -4096, 0 if extending else key & 0xFF)
        call.page = vm.new_page()
        return call

    yield from _call_once(vm, thread, make_call, work)


def interrupt_cpu(vm: Vm, thread: Thread, cpu: int) -> SimProcess[Thread]:
    """Send an IPI to a CPU and wait until its handler runs.

    The handler has the identity of the task that it interrupts; before it runs, that task exits
    its guest and completes the SEAMCALL in progress.

    Args:
        vm: The VM for which it is sent.
        thread: The sending thread.
        cpu: Another CPU.

    Returns:
        The handler's thread; until in_irq_handler of its CPU is reset, nothing else runs there.
    """
    machine = vm.machine
    thread.now += thread.random.duration(machine.durations.send_ipi)
    yield from machine.sync_clock(thread)
    yield machine.env.timeout(thread.random.duration(machine.durations.ipi_flight))
    while machine.in_irq_handler[cpu]:
        yield machine.env.timeout(POLL_NS)
    machine.in_irq_handler[cpu] = True
    thread.irqs_enabled = True
    while (current := machine.cpus.current[cpu]) is not None and not current.thread.irqs_enabled:
        current.kick()
        yield machine.env.timeout(POLL_NS)
    thread.irqs_enabled = False
    thread.now = int(machine.env.now)
    handler = Thread(0, 0, "<idle>", thread.random)
    if current is not None:
        task = current.thread
        handler = Thread(task.tid, task.tgid, task.comm, thread.random)
    handler.cpu, handler.now = cpu, thread.now
    return handler


def _return_from_interrupt(vm: Vm, thread: Thread, handler: Thread) -> SimProcess[None]:
    """End an interrupt handler, for which the thread that sent the IPI waits."""
    yield from vm.machine.sync_clock(handler)
    vm.machine.in_irq_handler[handler.cpu] = False
    thread.now = max(thread.now, handler.now)


def flush_on_last_cpu(vm: Vm, thread: Thread, vcpu: Vcpu) -> SimProcess[None]:
    """Call VP.FLUSH for a vCPU on the CPU on which it last ran, before it runs on another."""
    handler = yield from interrupt_cpu(vm, thread, vcpu.lp)
    request = vm.request("TDH.VP.FLUSH", handler)
    call = vm.call("TDH.VP.FLUSH")
    call.vcpu, call.in_irq = vcpu, True
    yield from vm.machine.seamcall(handler, request, call, vm.machine.durations.flush)
    yield from _return_from_interrupt(vm, thread, handler)


def tear_down(vm: Vm, thread: Thread, packages: int) -> SimProcess[None]:
    """End a stopped TD: flush its vCPUs, free its key, reclaim its pages one by one."""
    machine, durations = vm.machine, vm.machine.durations
    for state in vm.vcpus:
        if state.vcpu.lp != NOWHERE:
            yield from flush_on_last_cpu(vm, thread, state.vcpu)
    yield from machine.acquire_lock(thread, machine.tdx_lock, exclusive=True)
    yield from _call_once(vm, thread, _call_maker(vm, "TDH.MNG.VPFLUSHDONE"), durations.manage)
    yield from _write_back_caches(vm, thread, packages)
    yield from _call_once(vm, thread, _call_maker(vm, "TDH.MNG.KEY.FREEID"), durations.manage)
    yield from machine.sync_clock(thread)
    machine.tdx_lock.release()
    pages = [e.page for e in vm.td.sept.entries.values() if e.page]
    for page in pages:
        yield from _call_once(
            vm, thread, _call_maker(vm, "TDH.PHYMEM.PAGE.RECLAIM", page), durations.reclaim
        )
        write = _call_maker(vm, "TDH.PHYMEM.PAGE.WBINVD", page, operand=vm.hkid)
        yield from _call_once(vm, thread, write, durations.wbinvd)
        thread.now += thread.random.duration(durations.clear_page)


def _write_back_caches(vm: Vm, thread: Thread, packages: int) -> SimProcess[None]:
    """Call CACHE.WB on one CPU of each package concurrently, and wait for all.

    Linux 6.16 tdx_mmu_release_hkid interrupts all of these CPUs at the same time.
    """
    machine = vm.machine
    n_cpus = len(machine.in_irq_handler)
    yield from machine.sync_clock(thread)
    running = []
    for package in range(packages):
        sender = Thread(thread.tid, thread.tgid, thread.comm, thread.random)
        sender.cpu, sender.now = thread.cpu, thread.now
        cpu = package * n_cpus // packages
        running.append(machine.env.process(_write_back_cache(vm, sender, package, cpu)))
    thread.irqs_enabled = True
    yield machine.env.all_of(running)
    thread.irqs_enabled = False
    thread.now = int(machine.env.now)


def _write_back_cache(vm: Vm, thread: Thread, package: int, cpu: int) -> SimProcess[None]:
    """Call CACHE.WB on one CPU of a package, and resume it after each interruption."""
    handler = yield from interrupt_cpu(vm, thread, cpu)
    request = vm.request("TDH.PHYMEM.CACHE.WB", handler)
    n_calls = 1 + thread.random.below(6)
    for i in range(_CACHE_WB_CALLS):
        call = Call("TDH.PHYMEM.CACHE.WB")
        call.package, call.in_irq, call.operand, call.td = package, True, int(i > 0), vm.td
        call.interrupted = i + 1 < n_calls
        work = vm.machine.durations.cache_wb_pass
        status = yield from vm.machine.seamcall(handler, request, call, work)
        if status != INTERRUPTED_RESUMABLE:
            break
    yield from _return_from_interrupt(vm, thread, handler)
