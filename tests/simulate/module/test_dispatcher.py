"""Calls of the module: states, tracking, host priority, interruption, VM entry."""

import pytest

from tdxtrace.simulate.module import vp_enter
from tdxtrace.simulate.module.abi import (
    BLOCKED,
    EPT_ENTRY_STATE_INCORRECT,
    EPT_WALK_FAILED,
    FREE,
    GPA_RANGE_ALREADY_BLOCKED,
    GPA_RANGE_NOT_BLOCKED,
    HOST_PRIORITY_BUSY,
    INTERRUPTED_BUSY,
    INTERRUPTED_RESTARTABLE,
    MAPPED,
    NL_BLOCKED,
    NL_MAPPED,
    OPERAND_BUSY,
    PENDING,
    PREVIOUS_TLB_EPOCH_BUSY,
    RND_NO_ENTROPY,
    SUCCESS,
    TLB_TRACKING_NOT_DONE,
    VCPU_ASSOCIATED,
    VCPU_NOT_ASSOCIATED,
    VCPU_STATE_INCORRECT,
)
from tdxtrace.simulate.module.dispatcher import Module
from tdxtrace.simulate.module.generations import ACCEPT, GENERATIONS
from tdxtrace.simulate.module.state import RUNNABLE, Call, Td, Vcpu

GPA, PAGE = 0x8000_0000, 0x1_0000_0000
RCX, TREE, EPOCH = 1, 0x92, 0xA9


class Host:
    """A runnable TD with one vCPU and tables down to the 4K level."""

    def __init__(self, generation: str = "C") -> None:
        kind = GENERATIONS[generation]
        self.module, self.td = Module(kind), Td(kind)
        self.vcpus = [Vcpu(self.td, number, kind) for number in range(2)]
        self.td.op_state = RUNNABLE
        for level in (3, 2, 1):
            self.td.sept.entry(GPA, level).state = NL_MAPPED

    @property
    def entry_state(self) -> int:
        return self.td.sept.entry(GPA, 0).state

    def start(self, leaf: str, level: int = 0, guest: bool = False) -> tuple[int, Call]:
        call = Call(leaf, td=self.td, vcpu=self.vcpus[0], guest=guest)
        call.gpa, call.level, call.page = GPA, level, PAGE
        return self.module.begin(call), call

    def do(self, leaf: str, level: int = 0, interrupt_pending: bool = False) -> int:
        status, call = self.start(leaf, level)
        call.interrupt_pending = interrupt_pending
        return status or self.module.finish(call)

    def enter(self, number: int = 0, lp: int = 0) -> tuple[int, Call]:
        call = Call("TDH.VP.ENTER", td=self.td, vcpu=self.vcpus[number])
        status = vp_enter.acquire_entry_locks(self.module, call, lp)
        status = status or vp_enter.pass_zero_step_gate(self.module, call)
        if status == SUCCESS:
            vp_enter.enter_guest(call)
        return status, call

    def arm(self, pages: int = 1, number: int = 0) -> None:
        zero_step = self.vcpus[number].zero_step
        zero_step.on_entry(0)
        for _ in range(6):
            zero_step.on_counted_fault(GPA)
        for page in range(pages):
            zero_step.on_counted_fault(GPA + (page << 12))


def test_a_page_is_added_blocked_tracked_and_removed() -> None:
    host = Host()
    assert host.do("TDH.MEM.PAGE.AUG") == SUCCESS
    assert host.entry_state == PENDING
    assert host.do("TDH.MEM.PAGE.AUG") == EPT_ENTRY_STATE_INCORRECT | RCX
    assert host.do("TDH.MEM.PAGE.REMOVE") == GPA_RANGE_NOT_BLOCKED | RCX
    assert host.do("TDH.MEM.RANGE.BLOCK") == SUCCESS
    assert host.do("TDH.MEM.RANGE.BLOCK") == GPA_RANGE_ALREADY_BLOCKED | RCX
    assert host.do("TDH.MEM.PAGE.REMOVE") == TLB_TRACKING_NOT_DONE | RCX
    assert host.do("TDH.MEM.TRACK") == SUCCESS
    assert host.do("TDH.MEM.PAGE.REMOVE") == SUCCESS
    assert host.entry_state == FREE


def test_a_failed_walk_returns_entry_and_level() -> None:
    host = Host()
    host.td.sept.entry(GPA, 1).state = FREE
    status, call = host.start("TDH.MEM.PAGE.AUG")
    assert status == EPT_WALK_FAILED | RCX
    assert call.out_rdx == 1 | FREE << 8
    assert host.do("TDH.MEM.SEPT.ADD", level=1) == SUCCESS
    assert host.do("TDH.MEM.PAGE.AUG") == SUCCESS


def test_unblock_needs_tracking_only_while_the_td_runs() -> None:
    host = Host()
    host.do("TDH.MEM.PAGE.AUG")
    host.do("TDH.MEM.RANGE.BLOCK")
    assert host.do("TDH.MEM.RANGE.UNBLOCK") == TLB_TRACKING_NOT_DONE | RCX
    host.td.op_state = 1
    assert host.do("TDH.MEM.RANGE.UNBLOCK") == SUCCESS
    assert host.entry_state == PENDING


def test_track_is_busy_while_a_vcpu_of_the_previous_epoch_runs() -> None:
    host = Host()
    status, inside = host.enter()
    assert status == SUCCESS
    assert host.do("TDH.MEM.TRACK") == SUCCESS
    assert host.do("TDH.MEM.TRACK") == PREVIOUS_TLB_EPOCH_BUSY
    vp_enter.exit_guest(host.module, inside)
    assert host.do("TDH.MEM.TRACK") == SUCCESS


def test_entry_and_track_refuse_each_other_for_the_epoch() -> None:
    host = Host()
    entering = Call("TDH.VP.ENTER", td=host.td, vcpu=host.vcpus[0])
    assert vp_enter.acquire_entry_locks(host.module, entering, lp=0) == SUCCESS
    assert host.do("TDH.MEM.TRACK") == OPERAND_BUSY | EPOCH
    vp_enter.pass_zero_step_gate(host.module, entering)
    _, tracking = host.start("TDH.MEM.TRACK")
    status, second = host.enter(number=1)
    assert status == OPERAND_BUSY | EPOCH
    assert second.busy_reason is not None
    assert second.busy_reason.holders == (tracking,)
    assert host.td.epochs.inside == [1, 0]


def test_a_running_guest_keeps_only_tdvpr_and_tdr() -> None:
    host = Host()
    _, inside = host.enter()
    assert host.do("TDH.MEM.RANGE.BLOCK") == EPT_ENTRY_STATE_INCORRECT | RCX
    assert host.do("TDH.MR.FINALIZE") == OPERAND_BUSY | RCX
    assert host.do("TDH.VP.FLUSH") == OPERAND_BUSY | RCX
    vp_enter.exit_guest(host.module, inside)
    assert host.do("TDH.VP.FLUSH") == SUCCESS
    assert host.do("TDH.VP.FLUSH") == VCPU_NOT_ASSOCIATED


def test_a_vcpu_is_associated_with_the_cpu_that_entered_it() -> None:
    host = Host()
    _, inside = host.enter(lp=3)
    assert host.enter(lp=3)[0] == VCPU_STATE_INCORRECT
    vp_enter.exit_guest(host.module, inside)
    assert host.enter(lp=4)[0] == VCPU_ASSOCIATED
    host.do("TDH.VP.FLUSH")
    assert host.enter(lp=4)[0] == SUCCESS


@pytest.mark.parametrize(
    ("generation", "leaf", "is_refused"),
    [
        ("B", "TDH.MEM.PAGE.AUG", True),
        ("C", "TDH.MEM.PAGE.AUG", False),
        ("B", "TDH.MEM.RANGE.BLOCK", True),
        ("C", "TDH.MEM.RANGE.BLOCK", True),
    ],
)
def test_an_armed_entry_needs_the_tree(generation: str, leaf: str, is_refused: bool) -> None:
    host = Host(generation)
    host.td.sept.entry(GPA, 0).state = MAPPED if leaf.endswith("BLOCK") else FREE
    _, holder = host.start(leaf)
    host.arm()
    status, call = host.enter()
    assert (status == OPERAND_BUSY | TREE) == is_refused
    if is_refused:
        assert call.busy_reason is not None
        assert call.busy_reason.holders == (holder,)
        assert host.vcpus[0].zero_step.armed
        assert host.td.epochs.inside == [0, 0]


def test_a_page_still_missing_gives_an_emulated_write_fault() -> None:
    host = Host()
    host.arm(pages=2)
    host.td.sept.entry(GPA, 0).state = MAPPED
    status, call = host.enter()
    assert (status, call.gpa, call.out_rcx, call.out_rdx) == (48, GPA + 4096, 2, 0)
    assert not call.locks_held
    assert host.vcpus[0].zero_step.counter == 6
    assert len(host.vcpus[0].zero_step.pages) == 2


def test_an_armed_entry_releases_the_tree_before_the_guest_runs() -> None:
    host = Host("B")
    host.arm()
    host.td.sept.entry(GPA, 0).state = MAPPED
    entering = Call("TDH.VP.ENTER", td=host.td, vcpu=host.vcpus[0])
    vp_enter.acquire_entry_locks(host.module, entering, lp=0)
    assert vp_enter.pass_zero_step_gate(host.module, entering) == SUCCESS
    assert host.do("TDH.MEM.SEPT.RD") == OPERAND_BUSY | TREE
    vp_enter.enter_guest(entering)
    assert host.do("TDH.MEM.SEPT.RD") == SUCCESS


@pytest.mark.parametrize(
    ("generation", "ve_disable", "enters"),
    [("B", False, False), ("C", False, True), ("B", True, False), ("C", True, False)],
)
def test_whether_the_gate_passes_a_pending_page(
    generation: str, ve_disable: bool, enters: bool
) -> None:
    host = Host(generation)
    host.td.pending_ve_disable = ve_disable
    host.do("TDH.MEM.PAGE.AUG")
    host.arm()
    assert (host.enter()[0] == SUCCESS) == enters


def test_a_guest_is_refused_after_the_host_failed_and_gave_up() -> None:
    host = Host()
    _, accepting = host.start(ACCEPT, guest=True)
    assert host.start("TDH.MEM.PAGE.AUG")[0] == OPERAND_BUSY | RCX
    host.module.release(accepting)
    status, call = host.start(ACCEPT, guest=True)
    assert status == HOST_PRIORITY_BUSY | RCX
    assert call.busy_reason is not None
    assert call.busy_reason.by_host_priority
    assert host.do("TDH.MEM.SEPT.RD") == SUCCESS
    assert host.start(ACCEPT, guest=True)[0] == SUCCESS


@pytest.mark.parametrize(("generation", "survives"), [("B", False), ("C", True)])
def test_whether_a_write_of_the_entry_keeps_the_priority(generation: str, survives: bool) -> None:
    host = Host(generation)
    _, accepting = host.start(ACCEPT, guest=True)
    host.start("TDH.MEM.PAGE.AUG")
    host.module.finish(accepting)
    assert host.td.sept.entry(GPA, 0).host_priority == survives


@pytest.mark.parametrize("generation", ["B", "C"])
def test_demote_stops_for_an_interrupt(generation: str) -> None:
    host = Host(generation)
    entry = host.td.sept.entry(GPA, 1)
    entry.state, entry.page = BLOCKED, 1 << 40
    host.do("TDH.MEM.TRACK")
    assert (
        host.do("TDH.MEM.PAGE.DEMOTE", level=1, interrupt_pending=True) == INTERRUPTED_RESTARTABLE
    )
    assert entry.state == BLOCKED
    assert host.do("TDH.MEM.PAGE.DEMOTE", level=1) == SUCCESS
    assert entry.state == NL_MAPPED
    assert host.td.sept.entry(GPA + 0x1000, 0).page == (1 << 40) + 0x1000


def test_demote_yields_to_a_host_that_wants_the_tree_from_1_5_20() -> None:
    host = Host("C")
    entry = host.td.sept.entry(GPA, 1)
    entry.state, entry.page = BLOCKED, 1 << 40
    host.do("TDH.MEM.TRACK")
    status, demoting = host.start("TDH.MEM.PAGE.DEMOTE", level=1)
    assert status == SUCCESS
    assert host.do("TDH.MEM.RANGE.BLOCK", level=2) == OPERAND_BUSY | TREE
    assert host.module.finish(demoting) == INTERRUPTED_BUSY
    assert entry.state == BLOCKED


def test_promote_joins_what_demote_split() -> None:
    host = Host("C")
    entry = host.td.sept.entry(GPA, 1)
    entry.state, entry.page = BLOCKED, 1 << 40
    host.do("TDH.MEM.TRACK")
    host.do("TDH.MEM.PAGE.DEMOTE", level=1)
    host.do("TDH.MEM.RANGE.BLOCK", level=1)
    assert entry.state == NL_BLOCKED
    host.do("TDH.MEM.TRACK")
    assert host.do("TDH.MEM.PAGE.PROMOTE", level=1) == SUCCESS
    assert (entry.state, entry.page) == (MAPPED, 1 << 40)


def test_work_on_a_large_page_conflicts_with_work_on_its_small_ones() -> None:
    host = Host()
    _, small = host.start("TDH.MEM.PAGE.AUG")
    large = Call("TDH.MEM.PAGE.AUG", td=host.td)
    large.gpa, large.level, large.page = GPA + (1 << 21), 1, PAGE
    assert host.module.begin(large) == OPERAND_BUSY | 8
    host.module.finish(small)
    large.entry = None
    assert host.module.begin(large) == SUCCESS


def test_no_entropy_is_returned_after_the_locks_were_acquired() -> None:
    host = Host()
    call = Call("TDH.MNG.CREATE")
    call.page, call.no_entropy = PAGE, True
    assert host.module.begin(call) == RND_NO_ENTROPY
    call.no_entropy = False
    assert host.module.begin(call) == SUCCESS
