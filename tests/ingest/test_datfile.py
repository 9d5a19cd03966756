"""trace.dat files made here for any machine: sections, options, clocks, instances, damage."""

from pathlib import Path

import polars as pl
import pytest
from support.recorder import FORMATS, Machine, Recording, format_file

import tdxtrace
from tdxtrace.errors import FormatError
from tdxtrace.ingest.tracedat import merge

START = 10**9
BUSY = 0x8000020000000092
LITTLE = Machine()


def _call(m: Machine, tid: int, gpa: int, ret: int, delta: int = 10) -> bytes:
    return m.event(delta, m.enter(tid, gpa, level=0)) + m.event(delta, m.leave(tid, ret))


def _read(tmp_path: Path, data: bytes) -> tdxtrace.Trace:
    path = tmp_path / "trace.dat"
    path.write_bytes(data)
    trace = tdxtrace.read_trace(path)
    trace.check()
    return trace


def _simple(m: Machine, **options: object) -> Recording:
    first = m.page(START, _call(m, 7, 0x1000, BUSY) + m.event(1, m.foreign(7)))
    second = m.page(START + 15, _call(m, 8, 0x2000, 0))
    return Recording(m, (first, second), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("version", ["6", "7", "7 zlib", "7 zstd"])
def test_every_version_gives_the_same_rows(version: str, tmp_path: Path) -> None:
    recording = _simple(LITTLE)
    if " " in version:
        recording.compression = version.split()[1]
    trace = _read(tmp_path, recording.v6() if version == "6" else recording.v7())
    columns = ("seq", "start_ns", "end_ns", "cpu", "tid", "td_id", "gpa", "level", "status")
    assert trace.seamcalls.select(columns).rows() == [
        (2, START + 10, START + 20, 0, 7, 0xFF11, 0x1000, 0, BUSY),
        (5, START + 25, START + 35, 1, 8, 0xFF11, 0x2000, 0, 0),
    ]
    assert trace.threads.select("tid", "comm").rows() == [(7, "vcpu 0"), (8, "vcpu 1")]
    assert trace.losses.select("kind", "detail", "line_no").rows() == [("noise", "noise", 3)]


@pytest.mark.parametrize("version", ["6", "7"])
@pytest.mark.parametrize(
    ("machine", "kind"),
    [(Machine(big_endian=True), "big-endian"), (Machine(long_size=4), "32-bit")],
    ids=["big-endian", "32-bit"],
)
def test_recordings_of_other_machines_are_refused(
    machine: Machine, kind: str, version: str, tmp_path: Path
) -> None:
    recording = _simple(machine)
    with pytest.raises(FormatError, match=f"recorded on a {kind} machine; only") as refused:
        _read(tmp_path, recording.v6() if version == "6" else recording.v7())
    assert "\n" not in str(refused.value)


def test_records_of_one_moment_are_numbered_by_cpu(tmp_path: Path) -> None:
    m = LITTLE
    pages = [m.page(START, m.event(5, m.leave(tid, 0))) for tid in (9, 8, 7)]
    trace = _read(tmp_path, Recording(m, pages).v7())
    assert trace.seamcalls.sort("seq")["tid"].to_list() == [9, 8, 7]


@pytest.mark.parametrize("version", ["6", "7"])
def test_instances_are_read_beside_the_top_buffer(version: str, tmp_path: Path) -> None:
    recording = _simple(LITTLE)
    recording.buffers = {"rig": (LITTLE.page(START + 100, _call(LITTLE, 9, 0x3000, 0)), b"")}
    trace = _read(tmp_path, recording.v6() if version == "6" else recording.v7())
    assert trace.seamcalls["tid"].to_list() == [7, 8, 9]
    assert trace.threads["comm"].to_list() == ["vcpu 0", "vcpu 1", "<...>"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([(7, b"0x10\0")], START + 26),
        ([(7, b"-5\0")], START + 5),
        ([(1, b"2\0")], START + 10 + 2000),
        ([(14, LITTLE.pack("IIQ", 3 << 20, 20, 99))], 3 * (START + 10)),
        ([(14, LITTLE.pack("IIQ", 0x80000000, 40, 0))], (START + 10) >> 9),
        ([(14, LITTLE.pack("IIQ", 1, 77, 0))], START + 10),
    ],
    ids=["offset", "negative", "date in us", "tsc", "tsc, wide shift", "tsc, absurd shift"],
)
def test_clock_options_move_time(
    options: list[tuple[int, bytes]], expected: int, tmp_path: Path
) -> None:
    trace = _read(tmp_path, _simple(LITTLE, options=options).v7())
    assert trace.seamcalls["start_ns"].to_list()[0] == expected


def test_cycle_counters_keep_all_their_bits() -> None:
    import numpy as np

    from tdxtrace.ingest.tracedat.options import Clock

    stamps = [303283603803226, (1 << 61) + 12345, 17]
    clock = Clock(mult=0x6AAAAAAB, shift=32)
    made = clock.to_ns(np.array(stamps, np.int64)).tolist()
    assert made == [stamp * 0x6AAAAAAB >> 32 for stamp in stamps]


@pytest.mark.parametrize(
    ("flags", "samples", "expected"),
    [
        (0, [(0, 100, 1)], 10 + 100),
        (0, [(0, 100, 1), (START + 11, 300, 1)], 10 + 100),
        (1, [(START, 100, 1), (START + 20, 300, 1)], 10 + 200),
        (1, [(START, 100, 1), (START + 20, 90, 1)], 10 + 100 - 4),
        (0, [(START, -7, 1), (START + 5, -9, 1), (START + 500, 0, 1)], 10 - 9),
    ],
)
def test_guest_clocks_are_corrected(
    flags: int, samples: list[tuple[int, int, int]], expected: int, tmp_path: Path
) -> None:
    m = LITTLE
    each = m.pack("I", len(samples))
    for column in range(3):
        each += b"".join(m.pack("q", sample[column]) for sample in samples)
    option = m.pack("QII", 1, flags, 2) + each * 2 + m.pack("Q", 0) * 2 * len(samples)
    trace = _read(tmp_path, _simple(m, options=[(12, option)]).v7())
    assert trace.seamcalls["start_ns"].to_list()[0] == START + expected


def test_lists_of_options_that_form_a_circle_end(tmp_path: Path) -> None:
    data = bytearray(_simple(LITTLE).v7())
    first = data.index(b"none\0\0") + 6
    at = int.from_bytes(data[first : first + 8], "little")
    data[-8:] = at.to_bytes(8, "little")
    trace = _read(tmp_path, bytes(data))
    assert trace.seamcalls.height == 2
    assert "its lists of options form a cycle" in trace.losses["detail"].to_list()


def test_counters_of_the_kernel_become_losses(tmp_path: Path) -> None:
    text = (
        b"CPU: 0\nentries: 4\noverrun: 5\ncommit overrun: 6\nbytes: 0\n"
        b"dropped events: 7\nread events: 3\n\0"
    )
    trace = _read(tmp_path, _simple(LITTLE, options=[(2, text)]).v7())
    rows = trace.losses.filter(pl.col("cpu") == 0).select("kind", "n_events").rows()
    assert sorted(rows) == [
        ("buffer_full", 7),
        ("lost_events", 6),
        ("overwritten", 5),
        ("unread", 4),
    ]


def test_lost_events_have_a_place_and_a_count(tmp_path: Path) -> None:
    m = LITTLE
    pages = m.page(START, _call(m, 7, 0x1000, 0)) + m.page(START + 90, _call(m, 7, 0, 0), lost=12)
    pages += m.page(START + 200, b"", lost=3) + m.page(START + 300, _call(m, 7, 0, 0), lost=4)
    pages += m.page(START + 400, b"", lost=5)
    trace = _read(tmp_path, Recording(m, (pages,)).v7())
    columns = ("cpu", "line_no", "start_ns", "end_ns", "n_events")
    assert trace.losses.filter(pl.col("kind") == "lost_events").select(columns).rows() == [
        (0, 3, START + 20, START + 100, 12),
        (0, 5, START + 110, START + 310, 7),
        (0, 7, START + 320, None, 5),
    ]


def test_pieces_and_batches_of_any_size_lose_and_double_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    m = LITTLE
    cpus = [
        b"".join(
            m.page(START + 100 * n + cpu, _call(m, cpu, n << 12, 0, 7 + cpu), lost=n % 7 == 3)
            for n in range(200)
        )
        for cpu in range(5)
    ]
    data = Recording(m, cpus).v7()
    whole = _read(tmp_path, data)
    assert whole.seamcalls.height == 1000
    for n_pages, n_rows, n_gaps in ((1, 1, 1), (1, 500, 2), (2, 64, 100), (17, 1 << 17, 3)):
        monkeypatch.setattr(merge, "_CPU_BYTES", n_pages * m.page_size)
        monkeypatch.setattr(merge, "BATCH_ROWS", n_rows)
        monkeypatch.setattr(merge, "_GAPS", n_gaps)
        small = _read(tmp_path, data)
        assert small.seamcalls.equals(whole.seamcalls)
        assert small.losses.equals(whole.losses)


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        (("u64 td@8+8", "u64 ret@4000+8"), "undecoded"),
        (("unsigned long __probe_func@8+8", "unsigned long __probe_ret_ip@16+8"), "undecoded"),
        (("u64 ret@8+8",), "noise"),
    ],
    ids=["beyond the record", "no return value", "no probe"],
)
def test_formats_that_lie_or_lack_are_losses(
    fields: tuple[str, ...], kind: str, tmp_path: Path
) -> None:
    probes = () if kind == "noise" else ("unsigned long __probe_ret_ip@16+8",)
    made = format_file("tdh_mem_page_aug_exit", 302, *fields, *probes)
    formats = {"tdx": [FORMATS["tdx"][0], made]}
    trace = _read(tmp_path, _simple(LITTLE, formats=formats).v7())
    assert trace.seamcalls["end_ns"].is_null().all()
    rows = trace.losses.filter(pl.col("detail") == "tdh_mem_page_aug_exit")
    assert rows.select("kind", "n_lines").rows() == [(kind, 2)]


def test_probes_with_odd_names_are_known_by_their_address(tmp_path: Path) -> None:
    formats = {
        "kprobes": [
            format_file("mine", 301, "unsigned long __probe_ip@8+8", "u64 gpa@28+8"),
            format_file(
                "mine_r",
                302,
                "unsigned long __probe_func@8+8",
                "unsigned long __probe_ret_ip@16+8",
                "u64 ret@24+8",
            ),
        ]
    }
    symbols = b"0000000000000ffc T tdh_mem_page_remove\t[kvm_intel]\n0000000000001f00 T other\n"
    recording = _simple(LITTLE, formats=formats)
    data = recording.v7()
    at = len(data)
    section = LITTLE.pack("HHIQ", 19, 0, 0, 4 + len(symbols)) + LITTLE.pack("I", len(symbols))
    recording.options = [(19, LITTLE.pack("Q", at))]
    data = recording.v7()
    grown = len(data)
    recording.options = [(19, LITTLE.pack("Q", grown))]
    trace = _read(tmp_path, recording.v7() + section + symbols)
    assert trace.seamcalls.select("leaf", "gpa").rows()[0] == (29, 0x1000)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x17\x08\x44tracing5\0", "trace.dat of version '5'; tdxtrace reads 6 and 7"),
        (b"\x17\x08\x44tracing7\0\0", "truncated trace.dat: its header is incomplete"),
        (b"\x17\x08\x44tracing7\0\0\x05\0\x10\0\0", "damaged trace.dat: its header has longs of 5"),
        (b"\x17\x08\x44tracing7\0\0\x08\0\x10\0\0lzma\0001\0" + b"\0" * 8, "with 'lzma'; only"),
        (_simple(LITTLE).v7()[:400], "is cut short or damaged: the file ends before its last"),
        (Recording(LITTLE, (b"", b"")).v7(), "has no trace data: all its buffers are empty"),
    ],
)
def test_unreadable_files_are_refused(data: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=message):
        _read(tmp_path, data)


def test_latency_tracers_write_text(tmp_path: Path) -> None:
    data = _simple(LITTLE).v6().replace(b"flyrecord\0", b"latency  \0")
    with pytest.raises(FormatError, match="has text of a latency tracer; print it with trace-cmd"):
        _read(tmp_path, data)


LISTLESS = "the file ends before its last list of options"


@pytest.mark.parametrize("compression", ["none", "zlib", "zstd"])
def test_pages_are_found_without_the_list_of_cpus(compression: str, tmp_path: Path) -> None:
    recording = _simple(LITTLE)
    recording.compression = compression
    data = recording.v7()
    whole = _read(tmp_path, data)
    # The list begins with its header, the options that say where the parts are in it.
    cut = data[: data.rindex(LITTLE.pack("HI", 16, 8)) - 16]
    trace = _read(tmp_path, cut)
    assert trace.seamcalls.drop("cpu", "start_cpu").equals(whole.seamcalls.drop("cpu", "start_cpu"))
    assert trace.seamcalls["cpu"].null_count() == 2
    result = f"{LISTLESS}; the CPUs of its pages are unknown"
    assert result in trace.losses.filter(pl.col("kind") == "truncated")["detail"].to_list()


@pytest.mark.parametrize("n_cpus", [1, 2, 3])
def test_cpus_are_named_only_if_all_were_found(n_cpus: int, tmp_path: Path) -> None:
    """One without events leaves nothing: fewer runs of pages than CPUs tell nothing."""
    m = LITTLE
    cpus = [m.page(START + 50 - 50 * cpu, _call(m, 7 + cpu, 0x1000, 0)) for cpu in (0, 1)]
    data = Recording(m, cpus).v7()
    cut = bytearray(data[: data.rindex(m.pack("HI", 16, 8)) - 16])
    options = m.pack("HI", 8, 4) + m.pack("I", n_cpus)
    options += m.pack("HI", 0, 8) + m.pack("Q", len(cut) + 10**6)
    # A first list, in front of the pages: it names the number of CPUs and the next list.
    section = m.pack("HHIQ", 0, 0, 0, len(options)) + options
    at = cut.index(m.pack("HHI", 3, 0, 0))
    head = cut.index(b"none\0\0") + 6
    cut[head : head + 8] = m.pack("Q", at)
    data = bytes(cut[:at]) + section + bytes(cut[at:])
    pages = data.index(m.pack("Q", START + 50), at + len(section))
    begin = at + len(section) + 16
    data = data[:begin] + bytes(-begin % m.page_size) + data[pages:]
    if n_cpus == 1:
        with pytest.raises(FormatError, match=LISTLESS):
            _read(tmp_path, data)
        return
    trace = _read(tmp_path, data)
    assert trace.seamcalls["cpu"].to_list() == ([1, 0] if n_cpus == 2 else [None, None])
    result = [d for d in trace.losses["detail"].to_list() if d.startswith(LISTLESS)]
    assert ["the CPUs of" in d for d in result] == [n_cpus == 3]


def test_a_recorder_that_died_leaves_pages_of_no_length(tmp_path: Path) -> None:
    m = LITTLE
    data = bytearray(_simple(m).v7())
    data = data[: data.rindex(m.pack("HI", 16, 8)) - 16]
    at = data.index(m.pack("HHI", 3, 0, 0)) + 8
    data[at : at + 8] = bytes(8)
    assert _read(tmp_path, bytes(data)).seamcalls.height == 2


def test_a_real_file_cut_anywhere_gives_a_part_that_says_so(tmp_path: Path) -> None:
    data = (Path(__file__).parents[2] / "sample_traces" / "tracecmd-v7.dat").read_bytes()
    whole = _read(tmp_path, data)
    heights = []
    for end in range(20_300, len(data), 97):
        trace = _read(tmp_path, data[:end])
        assert (trace.losses["kind"] == "truncated").any() or trace.seamcalls.height == 612
        known = trace.seamcalls.drop_nulls("cpu").join(
            whole.seamcalls, on=["start_ns", "end_ns", "cpu", "tid", "gpa"], nulls_equal=True
        )
        assert known.height == trace.seamcalls["cpu"].count()
        heights.append(trace.seamcalls.height)
    assert heights[0] > 0
    assert heights == sorted(heights)
    assert heights[-1] == whole.seamcalls.height


def test_a_file_cut_short_gives_what_is_there(tmp_path: Path) -> None:
    m = LITTLE
    pages = b"".join(m.page(START + 100 * n, _call(m, 7, n << 12, 0)) for n in range(10))
    data = Recording(m, (pages,)).v6()
    trace = _read(tmp_path, data[: -5 * m.page_size])
    assert trace.seamcalls.height == 5
    assert "the file ends in the middle of a CPU's pages" in trace.losses["detail"].to_list()


@pytest.mark.parametrize("size", [512, 1024])
def test_data_of_several_cpus_in_one_place_is_read_once(size: int, tmp_path: Path) -> None:
    m = Machine(page_size=512)
    pages = b"".join(m.page(START + 100 * n, _call(m, 7, n << 12, 0)) for n in range(4))
    data = bytearray(Recording(m, (pages, pages[:size])).v6())
    at = data.index(b"flyrecord\0") + 10
    first = int.from_bytes(data[at : at + 8], "little")
    data[at + 16 : at + 24] = m.pack("Q", first + 1024)
    trace = _read(tmp_path, bytes(data))
    assert (
        trace.seamcalls["gpa"].sort().to_list() == [0, 1 << 12, 2 << 12, 3 << 12][: 2 + size // 512]
    )
    assert "the data of its CPUs overlap" in trace.losses["detail"]


def test_formats_that_unpack_to_far_more_than_formats_do_are_damaged(tmp_path: Path) -> None:
    many = format_file("much", 9, *["u32 @8+4"] * 80_000)
    recording = Recording(LITTLE, (LITTLE.page(START, _call(LITTLE, 7, 1 << 12, 0)),))
    recording.compression, recording.formats = "zstd", {**FORMATS, "more": [many]}
    with pytest.raises(FormatError, match="event 301 without a format"):
        _read(tmp_path, recording.v7())
