"""TLB tracking: who may advance the epoch, and when a blocked entry is tracked."""

from tdxtrace.simulate.epochs import Epochs


def test_one_track_succeeds_while_vcpus_of_the_current_epoch_run() -> None:
    td = Epochs()
    inside = td.enter()
    assert td.advance()
    assert not td.advance()
    td.leave(inside)
    assert td.advance()
    assert td.current == 2


def test_a_block_is_tracked_once_nobody_of_its_epoch_is_inside() -> None:
    td = Epochs()
    td.advance()
    inside, blocked_in = td.enter(), td.current
    assert not td.tracked(blocked_in)
    td.advance()
    assert not td.tracked(blocked_in)
    td.leave(inside)
    assert td.tracked(blocked_in)


def test_a_block_two_epochs_old_is_tracked_whoever_runs() -> None:
    td = Epochs()
    blocked_in = td.current
    td.advance()
    td.enter()
    td.advance()
    assert td.tracked(blocked_in)


def test_a_vcpu_counts_in_the_epoch_it_entered_in() -> None:
    td = Epochs()
    first = td.enter()
    td.advance()
    second = td.enter()
    assert (first, second) == (0, 1)
    assert td.inside == [1, 1]
    td.leave(first)
    assert td.inside == [0, 1]
