"""Interrupt context and event names of single lines."""

from __future__ import annotations

import pytest
from support.texts import aug, aug_ret, line, read_text

from tdxtrace.ingest.batch import UNKNOWN
from tdxtrace.ingest.events.registry import EventRegistry
from tdxtrace.ingest.stats import SourceStats
from tdxtrace.ingest.text.reader import LineReader, in_irq


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (".....", 0),
        ("....", 0),
        ("d....", 0),
        ("dN...", 0),
        ("..s1.", 0),
        ("d.s1", 0),
        ("d.h1.", 1),
        ("d.h.", 1),
        ("d.H2.", 1),
        ("d.z2.", 1),
        ("d.Z2.", 1),
        # uprobe events carry all bits: they tell nothing.
        ("DBZff", UNKNOWN),
        ("dNHff", UNKNOWN),
        ("", UNKNOWN),
    ],
)
def test_the_third_flag_is_the_context(flags: str, expected: int) -> None:
    assert in_irq(flags) == expected


@pytest.mark.parametrize(("flags", "expected"), [("d.h1.", True), (".....", False)])
def test_a_call_in_interrupt_context_is_marked(flags: str, expected: bool) -> None:
    text = (aug("1.000001") + aug_ret("1.000002")).replace(".....", flags)
    assert read_text(text).seamcalls["in_irq"].to_list() == [expected]


def test_where_flags_tell_nothing_the_context_is_not_observed() -> None:
    text = (aug("1.000001") + aug_ret("1.000002")).replace(".....", "DBZff")
    assert read_text(text).seamcalls["in_irq"].to_list() == [None]


def test_after_very_many_names_further_ones_are_counted_together() -> None:
    text = "".join(line("1.000001", f"event_{k}: x") for k in range(5000))
    losses = read_text(text + aug("1.000001") + aug_ret("1.000002")).losses
    assert losses["n_lines"].sum() >= 5000
    assert losses.height < 4200


def test_a_name_is_one_event_however_often_it_comes() -> None:
    reader = LineReader("ftrace", EventRegistry(), SourceStats())
    for number in range(1, 4):
        reader.line(number, line(f"1.00000{number}", "kvm_entry: vcpu 0").encode().rstrip())
    assert [event.name for event in reader.registry.events] == ["kvm_entry"]
    assert reader.stats.events == {"kvm_entry": 3}
