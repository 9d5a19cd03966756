"""How a TD comes and goes, and the calls KVM makes on other processors for it.

Sources: Linux 6.16 ``arch/x86/kvm/vmx/tdx.c __tdx_td_init``, ``tdx_td_vcpu_init``,
``tdx_gmem_post_populate``, ``tdx_td_finalize``, ``tdx_flush_vp_on_cpu``,
``tdx_mmu_release_hkid``, ``smp_func_do_phymem_cache_wb``, ``tdx_reclaim_page``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from tdxtrace.simulate import zap
from tdxtrace.simulate.draws import Span
from tdxtrace.simulate.machine import POLL_NS, Asked, Steps
from tdxtrace.simulate.sept import ROOT_LEVEL, page_bytes
from tdxtrace.simulate.state import NOWHERE, Call, Vcpu
from tdxtrace.simulate.threads import Thread
from tdxtrace.simulate.vm import NO_PAGE, PRESENT, Vm
from tdxtrace.simulate.words import INTERRUPTED_RESUMABLE, SUCCESS

if TYPE_CHECKING:
    from tdxtrace.simulate.vcpu import VcpuTask

# Control pages of a TD and of a vCPU: TDCS and TDCX pages, module 1.5 metadata
# (TDCS_BASE_SIZE, TDVPS_BASE_SIZE) as Linux reads them; 4 and 5 beside the roots.
_TDCS_PAGES: Final = 4
_TDVPS_PAGES: Final = 5
_CHUNKS: Final = 16
"""TDH.MR.EXTEND measures 256 bytes; a page takes sixteen."""
_CACHE_WB_CALLS: Final = 10_000
"""TDX_SEAMCALL_RETRIES: Linux arch/x86/kvm/vmx/tdx.c."""
KVM_EXIT_HYPERCALL: Final = 3


def _plain(vm: Vm, thread: Thread, make: Callable[[], Call], work: Span) -> Asked:
    """A call that is made once, whatever comes of it; a failure of it kills the VM."""
    call = make()
    page = (call.gpa, call.level) if call.gpa else NO_PAGE
    request = vm.request(call.leaf, thread, page)
    status = yield from vm.machine.attempt(thread, request, call, work)
    if status >> 63:
        vm.bug(thread, call.leaf, status)
    return status


def _about(
    vm: Vm, leaf: str, page: int = 0, vcpu: Vcpu | None = None, operand: int = 0
) -> Callable[[], Call]:
    def make() -> Call:
        call = vm.call(leaf)
        call.page, call.vcpu, call.operand = page, vcpu, operand
        # Linux passes version 1 of TDH.VP.INIT (tdh_vp_init, 1 << 16); 1.0.x has only 0.
        is_v1 = leaf == "TDH.VP.INIT" and vm.machine.module.generation.name != "A"
        call.version = int(is_v1)
        return call

    return make


def build(vm: Vm, thread: Thread, gpas: list[int], scarcity: float) -> Steps:
    """Make a TD: create it, its vCPUs and its first pages, measure them, finalize.

    Args:
        vm: Which; its vCPUs exist in the model, not yet for the module.
        thread: The VMM's.
        gpas: Guest pages it starts with.
        scarcity: Chance that the module finds no entropy when it needs some.
    """
    machine, manage = vm.machine, vm.machine.times.manage
    # tdx_lock keeps two TDs from meeting at the key ownership table.
    yield from machine.lock(thread, machine.tdx_lock, alone=True)
    yield from _with_entropy(vm, thread, "TDH.MNG.CREATE", scarcity)
    yield from machine.catch_up(thread)
    machine.tdx_lock.release()
    yield from _plain(vm, thread, _about(vm, "TDH.MNG.KEY.CONFIG"), manage)
    for i in range(_TDCS_PAGES):
        needs = scarcity if i == _TDCS_PAGES - 1 else 0.0
        yield from _with_entropy(vm, thread, "TDH.MNG.ADDCX", needs)
    yield from _plain(vm, thread, _about(vm, "TDH.MNG.INIT"), manage)
    for task in vm.tasks:
        for leaf, n in (("TDH.VP.CREATE", 1), ("TDH.VP.ADDCX", _TDVPS_PAGES), ("TDH.VP.INIT", 1)):
            for _ in range(n):
                page = vm.new_page() if leaf != "TDH.VP.INIT" else 0
                yield from _plain(vm, thread, _about(vm, leaf, page, task.vcpu), manage)
    for gpa in gpas:
        yield from _add(vm, thread, gpa)
    yield from _plain(vm, thread, _about(vm, "TDH.MR.FINALIZE"), manage)


def _with_entropy(vm: Vm, thread: Thread, leaf: str, scarcity: float) -> Steps:
    """A call that may find no entropy: -EAGAIN then, and the VMM asks again."""
    request = vm.request(leaf, thread)
    make = _about(vm, leaf, vm.new_page(), operand=vm.hkid)
    while True:
        status = yield from vm.machine.with_entropy(thread, request, make, scarcity)
        if status == SUCCESS:
            return
        thread.now += thread.draws.span(vm.machine.times.userspace)


def _add(vm: Vm, thread: Thread, gpa: int) -> Steps:
    times = vm.machine.times
    for level in range(ROOT_LEVEL, 0, -1):
        key = gpa & -page_bytes(level) | level
        if key not in vm.sptes:
            vm.sptes[key] = PRESENT
            yield from _page_call(vm, thread, "TDH.MEM.SEPT.ADD", key, times.sept_add)
    vm.sptes[gpa] = PRESENT
    yield from _page_call(vm, thread, "TDH.MEM.PAGE.ADD", gpa, times.page_add)
    for chunk in range(_CHUNKS):
        yield from _page_call(vm, thread, "TDH.MR.EXTEND", gpa + chunk * 256, times.extend)


def _page_call(vm: Vm, thread: Thread, leaf: str, key: int, work: Span) -> Steps:
    def make() -> Call:
        extending = leaf == "TDH.MR.EXTEND"
        call = vm.call(leaf, key if extending else key & -4096, 0 if extending else key & 0xFF)
        call.page = vm.new_page()
        return call

    yield from _plain(vm, thread, make, work)


def on_cpu(vm: Vm, thread: Thread, cpu: int) -> Steps:
    """Wait until an IPI to ``cpu`` is handled there: out of a guest first, between two calls."""
    machine = vm.machine
    thread.now += thread.draws.span(machine.times.send_ipi)
    yield from machine.catch_up(thread)
    yield machine.env.timeout(thread.draws.span(machine.times.ipi_flight))
    while machine.in_handler[cpu]:
        yield machine.env.timeout(POLL_NS)
    machine.in_handler[cpu] = True
    thread.parked = True
    while (current := machine.cpus.current[cpu]) is not None and not current.thread.parked:
        current.kick()
        yield machine.env.timeout(POLL_NS)
    thread.parked = False
    thread.now = int(machine.env.now)


def _handler(vm: Vm, thread: Thread, cpu: int) -> Thread:
    """The interrupt handler on ``cpu``: it runs under the name of whatever it interrupted."""
    current = vm.machine.cpus.current[cpu]
    made = Thread(0, 0, "<idle>", thread.draws)
    if current is not None:
        running = current.thread
        made = Thread(running.tid, running.tgid, running.comm, thread.draws)
    made.cpu, made.now = cpu, int(vm.machine.env.now)
    return made


def flush_elsewhere(vm: Vm, thread: Thread, vcpu: Vcpu) -> Steps:
    """VP.FLUSH of a vCPU on the processor it ran on, before it runs on another."""
    cpu = vcpu.lp
    yield from on_cpu(vm, thread, cpu)
    handler = _handler(vm, thread, cpu)
    request = vm.request("TDH.VP.FLUSH", handler)
    call = vm.call("TDH.VP.FLUSH")
    call.vcpu, call.in_irq = vcpu, True
    yield from vm.machine.attempt(handler, request, call, vm.machine.times.flush)
    yield from vm.machine.catch_up(handler)
    vm.machine.in_handler[cpu] = False
    thread.now = max(thread.now, handler.now)


def tear_down(vm: Vm, thread: Thread, packages: int) -> Steps:
    """End a stopped TD: flush its vCPUs, free its key, take its pages back one by one."""
    machine, times = vm.machine, vm.machine.times
    for task in vm.tasks:
        if task.vcpu.lp != NOWHERE:
            yield from flush_elsewhere(vm, thread, task.vcpu)
    yield from machine.lock(thread, machine.tdx_lock, alone=True)
    yield from _plain(vm, thread, _about(vm, "TDH.MNG.VPFLUSHDONE"), times.manage)
    n_cpus = len(machine.in_handler)
    for package in range(packages):
        yield from _write_back_cache(vm, thread, package, package * n_cpus // packages)
    yield from _plain(vm, thread, _about(vm, "TDH.MNG.KEY.FREEID"), times.manage)
    yield from machine.catch_up(thread)
    machine.tdx_lock.release()
    pages = [e.page for e in vm.td.sept.entries.values() if e.page]
    for page in pages:
        yield from _plain(vm, thread, _about(vm, "TDH.PHYMEM.PAGE.RECLAIM", page), times.reclaim)
        write = _about(vm, "TDH.PHYMEM.PAGE.WBINVD", page, operand=vm.hkid)
        yield from _plain(vm, thread, write, times.wbinvd)
        thread.now += thread.draws.span(times.clear_page)


def _write_back_cache(vm: Vm, thread: Thread, package: int, cpu: int) -> Steps:
    """CACHE.WB on one processor of a package, resumed as often as interrupts stop it."""
    yield from on_cpu(vm, thread, cpu)
    handler = _handler(vm, thread, cpu)
    request = vm.request("TDH.PHYMEM.CACHE.WB", handler)
    n_left = 1 + thread.draws.below(6)
    for turn in range(_CACHE_WB_CALLS):
        call = Call("TDH.PHYMEM.CACHE.WB")
        call.package, call.in_irq, call.operand, call.td = package, True, int(turn > 0), vm.td
        call.unfinished = turn + 1 < n_left
        work = vm.machine.times.cache_wb_pass
        status = yield from vm.machine.attempt(handler, request, call, work)
        if status != INTERRUPTED_RESUMABLE:
            break
    yield from vm.machine.catch_up(handler)
    vm.machine.in_handler[cpu] = False
    thread.now = max(thread.now, handler.now)


def convert(task: VcpuTask) -> Steps:
    """Serve MapGPA: the VMM changes the attributes, and what becomes shared is zapped."""
    if not task.asked:
        return
    pages, to_shared = task.asked
    yield from task.in_userspace(KVM_EXIT_HYPERCALL)
    task.thread.now += task.draws.span(task.times.convert)
    if to_shared:
        yield from zap.zap(task.vm, task.thread, pages)
        task.vm.shared_pages.update(pages)
    else:
        task.vm.shared_pages.difference_update(pages)
