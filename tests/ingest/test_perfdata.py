"""perf.data, against the output of perf script."""

import polars as pl
import pytest
from support.recordings import SAMPLES, as_ns, assert_same_events, cut_to_us, read, shared

import tdxtrace

_ONLY_BINARY = ("in_irq", "tgid")


def test_a_recording_and_its_script_give_the_same_events() -> None:
    recorded = read(SAMPLES / "qemu.perf.data.xz")
    assert recorded.seamcalls.height == 810
    assert_same_events(recorded, read(SAMPLES / "qemu.perf.txt.xz"), cut_to_us, _ONLY_BINARY)


@pytest.mark.parametrize(
    ("case", "text", "printed"),
    [
        ("perf", "script--ns.txt", as_ns),
        ("perf", "script.txt", cut_to_us),
        ("qemu-names", "perf.script.txt", cut_to_us),
    ],
)
def test_captures_and_their_scripts_give_the_same_events(
    case: str, text: str, printed: object
) -> None:
    path = shared(f"rig/{case}/perf.data")
    assert callable(printed)
    assert_same_events(read(path), read(path.parent / text), printed, _ONLY_BINARY)


def test_records_are_numbered_as_the_script_prints_them() -> None:
    binary, text = read(SAMPLES / "qemu.perf.data.xz"), read(SAMPLES / "qemu.perf.txt.xz")
    assert text.seamcalls["seq"].to_list() == binary.seamcalls["seq"].to_list()


def test_processes_come_with_the_samples() -> None:
    trace = read(SAMPLES / "qemu.perf.data.xz")
    assert trace.seamcalls["tgid"].unique().to_list() == [14399]
    names = trace.threads.filter(pl.col("tid") == 14402)["comm"].to_list()
    assert names == ["CPU 1/KVM", "qemu-system-x86"]


def test_every_record_is_accounted_for() -> None:
    trace = read(SAMPLES / "qemu.perf.data.xz")
    source = trace.provenance.sources[0]
    rows = sum(
        frame["n_lines"].sum() for name, frame in trace.tables().items() if name != "threads"
    )
    assert rows + source.n_headers == source.n_lines


def test_the_file_says_how_it_was_recorded() -> None:
    source = read(SAMPLES / "qemu.perf.data.xz").provenance.sources[0]
    assert (source.format, source.clock) == ("perf.data", "monotonic")
    assert (source.kernel, source.tool) == ("6.18.44-fc-v595", "perf 6.1.187")


@pytest.mark.parametrize(
    ("name", "events"),
    [
        ("kdab-probe-uprobe", "probe_untitled1:main; name the probed functions with --map"),
        ("kdab-probe-uprobe-stream", "probe_untitled1:main; name the probed functions with --map"),
        ("mstange-sleep.compressed2", "cycles:Pu; record kvm:kvm_entry"),
        ("quipper-lost_samples-4.4", "cycles:pp, instructions:pp, branch-instructions:pp"),
    ],
)
def test_recordings_of_other_events_name_them(name: str, events: str) -> None:
    with pytest.raises(tdxtrace.TdxtraceError, match=events):
        read(shared(f"public/perfdata-{name}.data"))


@pytest.mark.parametrize(
    ("mode", "row"),
    [
        ("kdab-probe-uprobe", (0, 0, 30594, 13732862216676)),
        ("kdab-probe-uprobe-stream", (0, 5, 30603, 13780586519837)),
    ],
)
def test_files_and_pipes_are_read(mode: str, row: tuple[int, ...]) -> None:
    path = shared(f"public/perfdata-{mode}.data")
    trace = tdxtrace.read_trace(path, mappings=["probe_untitled1:main=tdh_vp_enter"])
    trace.check()
    assert trace.seamcalls.select("leaf", "cpu", "tid", "start_ns").rows() == [row]
    assert trace.threads["comm"].to_list() == ["untitled1"]
