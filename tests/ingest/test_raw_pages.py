"""Raw ring-buffer pages, as trace_pipe_raw gives them: the pages of a trace.dat."""

import lzma
import shutil
from pathlib import Path

import pytest
from polars.testing import assert_frame_equal
from support.recorder import Machine
from support.recordings import SAMPLES, read

import tdxtrace
from tdxtrace.errors import FormatError, InputError
from tdxtrace.ingest.records.datafile import open_file
from tdxtrace.ingest.tracedat.file import read_dat


@pytest.fixture(scope="module")
def tracefs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like /sys/kernel/tracing with the pages and formats of tracecmd-v6.dat."""
    folder = tmp_path_factory.mktemp("tracing")
    data = lzma.decompress((SAMPLES / "tracecmd-v6.dat.xz").read_bytes())
    (folder / "trace.dat").write_bytes(data)
    dat = read_dat(open_file(str(folder / "trace.dat")))
    for cpu in dat.options.buffers[0].cpus:
        place = folder / "per_cpu" / f"cpu{cpu.cpu}"
        place.mkdir(parents=True)
        (place / "trace_pipe_raw").write_bytes(data[cpu.at : cpu.at + cpu.size])
    (folder / "saved_cmdlines").write_text(dat.cmdlines)
    (folder / "saved_tgids").write_text("15700 15699\n15701 15699\n")
    (folder / "trace_clock").write_text("local global [mono] boot\n")
    header = dat.formats.header_page
    (folder / "events").mkdir()
    (folder / "events" / "header_page").write_text(header)
    for made in dat.formats.events.values():
        place = folder / "events" / made.system / made.name
        place.mkdir(parents=True)
        fields = "".join(
            f"\tfield:{'char' if not f.is_number else 'long'} {f.name}"
            f"{'' if f.is_number else '[]'};\toffset:{f.offset};\tsize:{f.size};"
            f"\tsigned:{int(f.signed)};\n"
            for f in made.fields.values()
        )
        (place / "format").write_text(f"name: {made.name}\nID: {made.number}\nformat:\n{fields}\n")
    return folder


def test_pages_give_what_the_recording_with_them_gives(tracefs: Path) -> None:
    trace = tdxtrace.read_trace(tracefs)
    trace.check()
    expected = read(SAMPLES / "tracecmd-v6.dat.xz")
    assert_frame_equal(trace.seamcalls.drop("tgid"), expected.seamcalls.drop("tgid"))
    assert trace.threads["comm"].to_list() == expected.threads["comm"].to_list()
    source = trace.provenance.sources[0]
    assert (source.format, source.clock) == ("trace_pipe_raw", "mono")


def test_processes_come_from_saved_tgids(tracefs: Path) -> None:
    trace = tdxtrace.read_trace(tracefs)
    rows = dict(trace.seamcalls.select("tid", "tgid").unique().rows())
    assert (rows[15700], rows[15701], rows[15702]) == (15699, 15699, None)


def test_one_cpu_is_read_alone_given_the_formats(tracefs: Path) -> None:
    path = tracefs / "per_cpu" / "cpu1" / "trace_pipe_raw"
    trace = tdxtrace.read_trace(path, formats=tracefs / "events")
    assert trace.seamcalls["cpu"].unique().to_list() == [1]


def test_formats_are_of_the_pages_alone_not_of_a_log_beside_them(
    tracefs: Path, tmp_path: Path
) -> None:
    log = tmp_path / "dmesg"
    log.write_text("[    1.000001] tdx: TDX module initialized\n")
    trace = tdxtrace.read_trace(tracefs, formats=tracefs / "events", dmesg=[log])
    assert [source.format for source in trace.provenance.sources] == [
        "trace_pipe_raw",
        "kernel-log",
    ]
    assert trace.kernel_messages["message"].to_list() == ["module_state"]


def test_formats_must_be_somewhere(tracefs: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no event formats; name a copy of /sys/kernel"):
        tdxtrace.read_trace(tracefs, formats=tmp_path)


def test_other_files_are_no_pages(tracefs: Path, tmp_path: Path) -> None:
    (tmp_path / "cpu0.raw").write_bytes(b"\xff" * 8192)
    with pytest.raises(FormatError, match="does not begin with a ring-buffer page of 4096 bytes"):
        tdxtrace.read_trace(tmp_path, formats=tracefs / "events")


@pytest.mark.parametrize("upper", [0, 0xFFFFFFFF], ids=["plain", "sign-extended"])
def test_the_first_page_may_report_lost_events(upper: int, tracefs: Path, tmp_path: Path) -> None:
    """A recorder that comes late finds the flag on its first page, as the kernel adds it."""
    page = bytearray((tracefs / "per_cpu" / "cpu1" / "trace_pipe_raw").read_bytes()[:4096])
    flagged = int.from_bytes(page[8:12], "little") | 1 << 31
    page[8:16] = flagged.to_bytes(4, "little") + upper.to_bytes(4, "little")
    path = tmp_path / "cpu1.raw"
    path.write_bytes(page)
    trace = tdxtrace.read_trace(path, formats=tracefs / "events")
    assert not trace.seamcalls.is_empty()
    assert trace.losses.filter(kind="lost_events")["cpu"].to_list() == [1]


@pytest.mark.parametrize(
    ("machine", "kind"),
    [(Machine(big_endian=True), "big-endian"), (Machine(long_size=4), "32-bit")],
    ids=["big-endian", "32-bit"],
)
def test_pages_of_other_machines_are_refused(
    machine: Machine, kind: str, tracefs: Path, tmp_path: Path
) -> None:
    (tmp_path / "cpu0.raw").write_bytes(machine.page(10**9, machine.event(1, b"a" * 8)))
    shutil.copytree(tracefs / "events", tmp_path / "events")
    (tmp_path / "events" / "header_page").write_bytes(machine.header_page)
    with pytest.raises(FormatError, match=f"recorded on a {kind} machine; only") as refused:
        tdxtrace.read_trace(tmp_path)
    assert "\n" not in str(refused.value)


def test_a_page_cut_short_gives_the_events_before_the_cut(tracefs: Path, tmp_path: Path) -> None:
    whole = (tracefs / "per_cpu" / "cpu1" / "trace_pipe_raw").read_bytes()
    path = tmp_path / "cpu1.raw"
    path.write_bytes(whole[: 4096 + 2000])
    trace = tdxtrace.read_trace(path, formats=tracefs / "events")
    events = trace.provenance.sources[0].n_lines
    path.write_bytes(whole[:4096])
    less = tdxtrace.read_trace(path, formats=tracefs / "events").provenance.sources[0].n_lines
    assert less < events < 2 * less
    assert "damaged" in trace.losses["kind"].to_list()
