"""Zero-step counters and TLB epochs, transition by transition."""

from tdxtrace.simulate.module.state import TlbEpochs, ZeroStep

RIP, NEXT_RIP = 0x1000, 0x1007


def _fault(vcpu: ZeroStep, page: int | None, rip: int = RIP) -> bool:
    vcpu.on_exit(rip)
    armed = vcpu.on_counted_fault(page)
    vcpu.on_entry(rip)
    return armed


def test_the_seventh_fault_at_one_rip_arms_the_gate() -> None:
    vcpu = ZeroStep()
    assert [_fault(vcpu, 0x1000) for _ in range(8)] == [False] * 6 + [True, False]
    assert vcpu.pages == [0x1000]


def test_pages_count_together_and_only_rip_matters() -> None:
    vcpu = ZeroStep()
    for page in range(9):
        _fault(vcpu, page << 12)
    assert vcpu.counter == 6
    assert vcpu.pages == [6 << 12, 7 << 12, 8 << 12]


def test_the_first_fault_at_a_new_rip_counts_as_one() -> None:
    vcpu = ZeroStep()
    for _ in range(7):
        _fault(vcpu, 0x1000)
    _fault(vcpu, 0x2000, NEXT_RIP)
    assert (vcpu.counter, vcpu.pages) == (1, [])


def test_an_exit_at_the_same_rip_clears_nothing() -> None:
    vcpu = ZeroStep()
    for _ in range(7):
        _fault(vcpu, 0x1000)
    vcpu.on_exit(RIP)
    assert vcpu.armed
    assert vcpu.counter == 6


def test_the_list_holds_32_pages_and_no_more() -> None:
    vcpu = ZeroStep()
    for page in range(6 + 40):
        _fault(vcpu, page << 12)
    assert len(vcpu.pages) == 32
    assert vcpu.pages[-1] == 37 << 12


def test_a_shared_page_is_counted_but_not_logged() -> None:
    vcpu = ZeroStep()
    assert not any(_fault(vcpu, None) for _ in range(9))
    assert not vcpu.armed
    assert _fault(vcpu, 0x1000)


def test_one_track_succeeds_while_vcpus_of_the_current_epoch_run() -> None:
    td = TlbEpochs()
    inside = td.enter()
    assert td.advance()
    assert not td.advance()
    td.leave(inside)
    assert td.advance()
    assert td.current == 2


def test_a_block_is_tracked_once_no_vcpu_of_its_epoch_is_inside() -> None:
    td = TlbEpochs()
    td.advance()
    inside, blocked_in = td.enter(), td.current
    assert not td.is_tracked(blocked_in)
    td.advance()
    assert not td.is_tracked(blocked_in)
    td.leave(inside)
    assert td.is_tracked(blocked_in)


def test_a_block_two_epochs_old_is_tracked_whoever_runs() -> None:
    td = TlbEpochs()
    blocked_in = td.current
    td.advance()
    td.enter()
    td.advance()
    assert td.is_tracked(blocked_in)


def test_a_vcpu_counts_in_the_epoch_it_entered_in() -> None:
    td = TlbEpochs()
    first = td.enter()
    td.advance()
    second = td.enter()
    assert (first, second) == (0, 1)
    assert td.inside == [1, 1]
    td.leave(first)
    assert td.inside == [0, 1]
