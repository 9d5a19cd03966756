"""trace.dat of versions 6 and 7, against the output of trace-cmd."""

from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
from support.recordings import (
    SAMPLES,
    as_ns,
    assert_same_events,
    read,
    rounded_to_us,
    shared,
)

PAIRS = [
    ("tracecmd-v7.dat", "tracecmd-v7.txt.xz", as_ns),
    ("tracecmd-v6.dat.xz", "tracecmd-v6.txt.xz", as_ns),
    ("lost.dat.xz", "lost.txt.xz", rounded_to_us),
]


@pytest.mark.parametrize(("binary", "text", "printed"), PAIRS)
def test_a_recording_and_its_text_give_the_same_events(
    binary: str, text: str, printed: Callable[[pl.Expr], pl.Expr]
) -> None:
    recorded = read(SAMPLES / binary)
    assert recorded.seamcalls.height > 500
    assert_same_events(recorded, read(SAMPLES / text), printed, only_binary=("in_irq",))


@pytest.mark.parametrize(
    "case", ["tracecmd-v7/trace.dat", "tracecmd-v6/trace.dat.xz", "lost-tracecmd/trace.dat.xz"]
)
def test_whole_files_with_their_symbols_read_the_same(case: str) -> None:
    path = shared(f"rig/{case}")
    assert_same_events(read(path), read(path.parent / "report.txt"), rounded_to_us, ("in_irq",))


def test_records_are_numbered_as_the_report_prints_them() -> None:
    binary, text = read(SAMPLES / "tracecmd-v7.dat"), read(SAMPLES / "tracecmd-v7.txt.xz")
    # The report's first line is "cpus=2".
    assert (text.seamcalls["seq"] - 1).to_list() == binary.seamcalls["seq"].to_list()
    assert binary.provenance.sources[0].n_lines == text.provenance.sources[0].n_lines - 1


def test_gaps_lie_where_the_report_has_its_markers() -> None:
    binary, text = read(SAMPLES / "lost.dat.xz"), read(SAMPLES / "lost.txt.xz")
    columns = ("kind", "severity", "cpu", "start_ns", "end_ns", "n_events")
    mine = binary.losses.filter(pl.col("kind") == "lost_events").select(columns)
    printed = text.losses.filter(pl.col("kind") == "lost_events").select(columns)
    mine = mine.with_columns(rounded_to_us(pl.col("start_ns", "end_ns")))
    assert mine.drop("n_events").rows() == printed.drop("n_events").rows()
    assert printed["n_events"].to_list() == [1754, 110, None]
    # The kernel's own count, which the report does not print, says how many the last one lost.
    assert mine["n_events"].to_list() == [1754, 110, 111]


def test_the_file_says_how_it_was_recorded() -> None:
    source = read(SAMPLES / "tracecmd-v7.dat").provenance.sources[0]
    assert (source.format, source.clock, source.clock_resolution_ns) == ("trace.dat", "mono", 1)
    assert (source.kernel, source.tool) == ("6.18.44-fc-v595", "trace-cmd 3.1.6")


def test_context_flags_are_read_where_they_tell_something() -> None:
    # Entries and returns of uprobes carry 0xff for every flag.
    assert read(SAMPLES / "tracecmd-v7.dat").seamcalls["in_irq"].is_null().all()


def test_a_kvm_host_with_a_cycle_counter_for_a_clock() -> None:
    trace = read(shared("public/tracedat-v7-kvm-host-x86tsc-6.5.dat"))
    source = trace.provenance.sources[0]
    assert (source.clock, source.n_lines) == ("x86-tsc", 7792)
    assert source.events == {"kvm_exit": 1558, "kvm_entry": 1558, "kvm_userspace_exit": 5}
    assert trace.vm_entries["exit_reason"].drop_nulls().len() == 1558
    # Linux 6.5 does not record whether an exit was forced.
    assert trace.vm_entries["immediate_exit"].is_null().all()
    assert "x86-tsc" in trace.provenance.notes[0]
    rows = trace.losses.select(pl.col("n_lines").sum()).item()
    assert rows + sum(source.events.values()) == source.n_lines


def test_a_recording_of_other_events_names_them() -> None:
    path: Path = shared("public/tracedat-v6-arm64-emptycpus-trappy.dat.xz")
    with pytest.raises(Exception, match="it has bprint, sched_switch; record kvm:kvm_entry"):
        read(path)
