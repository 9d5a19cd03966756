"""Returns of tdx_vcpu_run: entries, returns while held off, and repeated entries."""

from __future__ import annotations

import itertools

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.texts import is_accounted_for, line, lost, read_text

from tdxtrace.compiler import interpreted
from tdxtrace.ingest.decode import decoder
from tdxtrace.ingest.decode.runs import VcpuRuns
from tdxtrace.ingest.stats import SourceStats
from tdxtrace.tables.trace import Trace

BUSY, EPOCH, HLT, CALL = "0x8000020000000092", "0x80000200000000a9", "0xc", "0x4d"
LETTERS = {"B": BUSY, "D": EPOCH, "H": HLT, "C": CALL}


def events(story: str) -> str:
    """Text of a story: > kvm_entry, < kvm_exit, ( the call, B D H C its return, b d h c that of
    tdx_handle_exit, L and M a loss on CPU 1 and 2; a digit before a word is another thread."""
    texts, at = [], itertools.count(1)
    for word in story.split():
        tid, what = (word[0], word[1:]) if word[0].isdigit() else ("7", word)
        stamp, place = f"1.{next(at):06}", f"CPU 0/KVM-{tid}"
        if what in "LM":
            texts.append(f"CPU:{'LM'.index(what) + 1} [LOST 3 EVENTS]\n")
        elif what == ">":
            texts.append(line(stamp, "kvm_entry: vcpu 0, rip 0x0", place))
        elif what == "<":
            texts.append(line(stamp, "kvm_exit: vcpu 0 reason HLT rip 0x0 info 0 0", place))
        elif what == "(":
            texts.append(line(stamp, "run: (tdx_vcpu_run+0x4/0x230 [kvm_intel]) vcpu=0", place))
        elif what.isupper():
            where = "(vt_vcpu_run+0x2e/0x60 [kvm_intel] <- tdx_vcpu_run [kvm_intel])"
            texts.append(line(stamp, f"run_ret: {where} status={LETTERS[what]}", place))
        else:
            where = "(tdx_handle_exit+0x4/0x430 [kvm_intel])"
            texts.append(line(stamp, f"exits: {where} status={LETTERS[what.upper()]}", place))
    return "".join(texts)


def read(story: str) -> Trace:
    trace = read_text(events(story))
    trace.check()
    assert is_accounted_for(trace)
    return trace


def entries(story: str, tid: int = 7) -> str:
    """The statuses of TDH.VP.ENTER that are counted."""
    rows = read(story).seamcalls.filter(tid=tid).sort("seq")
    names = {int(word, 16): letter for letter, word in LETTERS.items()}
    assert set(rows["leaf"]) <= {0}
    return "".join(names[status] for status in rows["status"])


@pytest.mark.parametrize(
    ("story", "expected"),
    [
        ("> < C > < H", "CH"),
        # Held off, with the status of the entry before, whatever that was.
        ("> < C > < D D D D > < H", "CDH"),
        ("> < C C C > < H", "CH"),
        ("> < D > < D > < D > < H", "DDDH"),
        ("> D D > D D > H", "DDH"),
        # The first return of a thread may have entered before the trace.
        ("D > < D D > < H", "DDH"),
        ("D D > < H", "DDH"),
        # Another thread's entry is not its own.
        ("> < D 8> 8< 8C D > < H", "DH"),
        # kvm_entry is not recorded at all, or no longer: a new status is of a new entry.
        ("D D D H", "DDDH"),
        ("> < C C C H H C", "CCCHHC"),
        ("> < D D D H > < C C > < H", "DDDHCH"),
        ("> < D D > < D D D H D", "DDDDHD"),
        # It may have been lost.
        ("> < D L D > < H", "DDH"),
        ("> < D L D D > < H", "DDH"),
        # ... but not on another CPU, and not before the gap or after it.
        ("> < D M D > < H", "DH"),
        ("> < D D M L > < D D > < H", "DDH"),
        ("L > < D D > < H L", "DH"),
        # One of both events is enough.
        ("> < D < D < H", "DDH"),
        # The last ones may be entries, or not.
        ("> < H > < D D D", "HD"),
        ("> < H > < C C C", "HC"),
    ],
)
def test_a_return_without_an_entry_is_counted_if_kvm_entry_was_not_recorded(
    story: str, expected: str
) -> None:
    assert entries(story) == expected


@pytest.mark.parametrize(
    ("story", "expected"),
    [
        ("> < C c > < H h", "CH"),
        ("> < D d > < D d > < H h", "DDH"),
        ("> < D d D d D d > < H h", "DH"),
        ("C c H h", "CH"),
        ("D d D d H h", "DDH"),
        # Probed alone, or where the return probe missed one.
        ("> < c > < h", "CH"),
        ("c h h", "CHH"),
        ("C c c H", "CCH"),
        # It tells of something else.
        ("C h", "CH"),
        ("C > < c", "CC"),
        ("C 8c", "C"),
        ("C L c", "CC"),
    ],
)
def test_an_entry_repeated_by_tdx_handle_exit_counts_once(story: str, expected: str) -> None:
    assert entries(story) == expected


def test_without_threads_vcpus_are_distinguished_by_cpu() -> None:
    entry = "[00{}] 1.00000{}: kvm:kvm_entry: vcpu 0, rip 0x0\n"
    back = "[00{}] 1.00000{}: probe:run: (ffffffff81000000 <- ffffffff82000000) status=0xc\n"
    text = entry.format(1, 1) + "".join(
        back.format(cpu, at) for at, cpu in ((2, 1), (3, 2), (4, 1))
    )
    trace = read_text(text + entry.format(1, 5), mappings=["run=tdx_vcpu_run:return"])
    assert trace.seamcalls.select("cpu", "seq").rows() == [(1, 2), (2, 3)]


def test_a_call_that_is_held_off_goes_with_its_return() -> None:
    trace = read("( > < D ( D ( D ( > < H")
    assert trace.seamcalls.select("status", "n_lines").rows() == [(int(EPOCH, 16), 2), (12, 2)]
    assert lost(trace) == {"noise": 4}


def test_a_probe_named_for_the_leaf_is_held_off_where_its_function_is_not_printed() -> None:
    where = "(vt_vcpu_run+0x2e/0x60 [kvm_intel] <- tdx_vcpu_run [kvm_intel])"
    raw = "(ffffffffc0a4ec2e <- ffffffffc0a51240)"
    held_off = events("> < D D D > < H").replace(f"run_ret: {where}", f"vpenter: {raw}")
    assert read_text(held_off).seamcalls["status"].to_list() == [int(EPOCH, 16), 12]
    # Inside tdx_vcpu_run each return has a kvm_entry of its own.
    inside = events("> D < > D < > H <").replace(f"run_ret: {where}", f"vpenter: {raw}")
    assert read_text(inside).seamcalls.height == 3


def test_dropped_returns_are_counted() -> None:
    result = read("> < D d D d > < H h D").losses.filter(kind="noise").sort("detail")
    assert result.select("n_lines", "severity").rows() == [(3, "info"), (1, "info")]
    assert "tdx_handle_exit" in result["detail"][0]
    assert "held off" in result["detail"][1]


def test_tdx_handle_exit_without_a_status_is_ignored() -> None:
    text = line("1.000001", "exits: (tdx_handle_exit+0x4/0x430 [kvm_intel]) fast=1")
    assert read_text(text + events("> < C H")).seamcalls.height == 2


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from("> < C D H d c 8> 8D 8d ( L M".split()), max_size=30))
def test_batches_may_end_anywhere(words: list[str]) -> None:
    story = " ".join(["> < C", *words])
    whole = read(story)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(decoder, "BATCH_EVENTS", 1)
        in_parts = read_text(events(story))
    assert in_parts.seamcalls.sort("seq").equals(whole.seamcalls.sort("seq"))
    assert lost(in_parts) == lost(whole)
    assert pl.Series(in_parts.vm_entries["seq"].sort()).equals(whole.vm_entries["seq"].sort())


def test_losses_of_every_tick_are_used() -> None:
    """Each tick has as many losses as the one before, and others."""
    stats = SourceStats()
    runs = VcpuRuns(stats, interpreted)
    for start in (100, 500):
        stats.record_gap(0, 7, None, start, start + 50)
        assert [result.tolist() for result in runs._windows()[:2]] == [[start], [start + 50]]
        stats.reset()
