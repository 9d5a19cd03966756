"""perf.data files made here: modes, layouts, rounds, names, losses, compression."""

from pathlib import Path

import polars as pl
import pytest
from support.perf_recorder import (
    CALLCHAIN,
    CPU,
    ID,
    IDENTIFIER,
    IP,
    RAW,
    READ,
    TID,
    TIME,
    USUAL,
    PerfRecording,
)
from support.recorder import ENTER, EXIT, FOREIGN, Machine

import tdxtrace
from tdxtrace.errors import FormatError
from tdxtrace.ingest.perfdata import ordered_events, reader

START = 10**9
BUSY = 0x8000020000000092
COLUMNS = ("seq", "start_ns", "end_ns", "cpu", "tid", "tgid", "gpa", "status")


def _read(tmp_path: Path, data: bytes) -> tdxtrace.Trace:
    path = tmp_path / "perf.data"
    path.write_bytes(data)
    trace = tdxtrace.read_trace(path)
    trace.check()
    return trace


def _simple() -> PerfRecording:
    made = PerfRecording()
    m = made.machine
    made.body = made.comm(0, 7, "perf") + made.comm(START + 5, 7, "vcpu 0")
    made.body += made.call(START + 10, 7, 0x1000, BUSY)
    made.body += made.sample(FOREIGN, START + 30, m.foreign(7))
    made.body += made.call(START + 40, 8, 0x2000, 0, cpu=1) + made.end_round()
    return made


@pytest.mark.parametrize("mode", ["file", "pipe"])
def test_files_and_pipes_are_read(mode: str, tmp_path: Path) -> None:
    made = _simple()
    trace = _read(tmp_path, made.file() if mode == "file" else made.pipe())
    assert trace.seamcalls.select(COLUMNS).rows() == [
        (2, START + 10, START + 20, 0, 7, 1, 0x1000, BUSY),
        (5, START + 40, START + 50, 1, 8, 1, 0x2000, 0),
    ]
    assert trace.threads.select("tid", "comm").rows() == [(7, "vcpu 0"), (8, ":8")]
    assert trace.losses.select("kind", "detail", "line_no").rows() == [("noise", "other:noise", 3)]
    source = trace.provenance.sources[0]
    assert (source.kernel, source.clock) == ("6.18.0-test", "perf")
    assert source.n_lines == (8 if mode == "file" else 12)


@pytest.mark.parametrize("mode", ["file", "pipe"])
@pytest.mark.parametrize(
    ("machine", "kind"),
    [(Machine(big_endian=True), "big-endian"), (Machine(long_size=4), "32-bit")],
)
def test_recordings_of_other_machines_are_refused(
    machine: Machine, kind: str, mode: str, tmp_path: Path
) -> None:
    made = PerfRecording(machine)
    made.body = made.call(START, 7, 0, 0)
    with pytest.raises(FormatError) as error:
        _read(tmp_path, made.file() if mode == "file" else made.pipe())
    assert f"perf.data was recorded on a {kind} machine" in str(error.value)
    assert "print it: perf script -i" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "kind",
    [
        TID | TIME | ID | CPU | RAW,
        IDENTIFIER | TID | TIME | CPU | RAW,
        USUAL | CALLCHAIN,
        USUAL | READ,
        USUAL | READ | CALLCHAIN,
    ],
)
def test_layouts_of_samples(kind: int, tmp_path: Path) -> None:
    made = PerfRecording(sample_types=dict.fromkeys((ENTER, EXIT), kind), read_format=4 | 8)
    m = made.machine
    made.body = made.sample(ENTER, START, m.enter(7, 0x1000), 0, [1, 2, 3])
    made.body += made.sample(EXIT, START + 9, m.leave(7, BUSY), 0, [4])
    trace = _read(tmp_path, made.file())
    assert trace.seamcalls.select("gpa", "status", "end_ns").rows() == [(0x1000, BUSY, START + 9)]


def test_events_of_several_layouts_are_distinguished_by_their_id(tmp_path: Path) -> None:
    kinds = {ENTER: IDENTIFIER | USUAL | CALLCHAIN, EXIT: IDENTIFIER | USUAL & ~IP}
    made = PerfRecording(sample_types=kinds)
    m = made.machine
    for n in range(20):
        made.body += made.sample(ENTER, START + n * 20, m.enter(7, n << 12), 0, [1] * n)
        made.body += made.sample(EXIT, START + n * 20 + 5, m.leave(7, n))
    trace = _read(tmp_path, made.file())
    assert trace.seamcalls.select("gpa", "status").rows() == [(n << 12, n) for n in range(20)]


def test_rounds_order_samples_by_time(tmp_path: Path) -> None:
    made = PerfRecording()
    for turn in range(5):
        for cpu in (1, 0):
            for n in range(3):
                time = START + 1000 * turn + 100 * n + 50 * cpu
                made.body += made.call(time, 7 + cpu, 0, turn, cpu)
        made.body += made.end_round()
    trace = _read(tmp_path, made.file())
    assert trace.seamcalls["end_ns"].is_sorted()
    assert trace.seamcalls["seq"].is_sorted()
    assert trace.seamcalls.height == 30


def test_a_round_may_hold_what_is_older_than_the_round_before(tmp_path: Path) -> None:
    made = PerfRecording()
    for turn in range(60):
        # CPU 1 is drained after CPU 0, and gives the samples of the time in between.
        for cpu, late in ((0, 0), (1, 700)):
            for n in range(4):
                time = START + 1000 * turn + 200 * n + late
                made.body += made.call(time, 7 + cpu, 0, turn, cpu)
        made.body += made.end_round()
    assert len(made.body) > 3 * (8 << 10)
    trace = _read(tmp_path, made.file())
    assert trace.seamcalls["end_ns"].is_sorted()
    assert trace.seamcalls.height == 480


def test_samples_of_one_moment_stay_in_the_order_of_the_file(tmp_path: Path) -> None:
    made = PerfRecording()
    m = made.machine
    for tid in (9, 3, 5):
        made.body += made.sample(EXIT, START, m.leave(tid, 0))
    assert _read(tmp_path, made.file()).seamcalls["tid"].to_list() == [9, 3, 5]


def test_names_are_those_of_the_moment(tmp_path: Path) -> None:
    made = PerfRecording()
    made.body = made.comm(0, 7, "qemu") + made.fork(START, 8, 7) + made.call(START + 10, 8, 0, 0)
    made.body += made.call(START + 100, 8, 0, 0) + made.comm(START + 50, 8, "CPU 0/KVM")
    trace = _read(tmp_path, made.file())
    assert trace.threads.select("tid", "comm").rows() == [(8, "CPU 0/KVM"), (8, "qemu")]


def test_lost_samples_have_a_place_and_a_count(tmp_path: Path) -> None:
    made = PerfRecording()
    made.body = made.call(START, 7, 0, 0) + made.call(START + 5, 8, 0, 0, cpu=1)
    made.body += made.lost(START + 50, 0, 12) + made.lost(START + 51, 0, 3)
    made.body += made.call(START + 60, 8, 0, 0, cpu=1) + made.call(START + 90, 7, 0, 0)
    trace = _read(tmp_path, made.file())
    columns = ("cpu", "line_no", "start_ns", "end_ns", "n_events", "n_lines")
    assert trace.losses.filter(pl.col("kind") == "lost_events").select(columns).rows() == [
        (0, 5, START + 10, START + 90, 15, 2)
    ]


@pytest.mark.parametrize("block", [96, 1 << 20])
def test_losses_without_a_time_follow_the_samples_before_them(
    block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without ``sample_id_all``: wherever blocks end."""
    for name in ("_SMALL_BYTES", "_BLOCK_BYTES"):
        monkeypatch.setattr(reader, name, block)
    made = PerfRecording(flags=0)
    lost = made.record(2, made.machine.pack("QQ", 71, 12))
    made.body = made.call(START, 7, 0, 0) + lost + made.call(START + 60, 7, 0, 0)
    made.body += made.end_round() + made.call(START + 90, 7, 0, 0) + lost
    trace = _read(tmp_path, made.file())
    found = trace.losses.filter(pl.col("kind") == "lost_events")
    assert found.select("line_no", "n_events").rows() == [(3, 12), (7, 12)]


def test_lost_samples_without_a_place_are_counted(tmp_path: Path) -> None:
    made = _simple()
    made.body += made.record(13, made.machine.pack("Q", 9) + made.trailer(0, 0))
    made.body += made.record(13, made.machine.pack("Q", 5) + made.trailer(0, 0), misc=1 << 15)
    losses = _read(tmp_path, made.file()).losses.filter(pl.col("kind") == "lost_events")
    assert losses.select("n_events", "detail").rows() == [(9, "LOST_SAMPLES record, no place")]


@pytest.mark.parametrize("kind", [81, 83])
def test_compressed_records_form_one_stream(kind: int, tmp_path: Path) -> None:
    plain, made = _simple(), PerfRecording()
    # The parts end in the middle of records, and lie at odd places of the file.
    made.body = made.compressed(plain.body, [3, 200, 77], kind) + plain.end_round()
    packed, expected = _read(tmp_path, made.file()), _read(tmp_path, plain.file())
    assert packed.seamcalls.equals(expected.seamcalls)
    assert packed.threads.equals(expected.threads)


@pytest.mark.parametrize(
    ("change", "loss"),
    [
        ({"period": 100}, ("sampled", "record with -c 1 (every event)")),
        (
            {"flags": 1 << 10 | 1 << 18},
            ("sampled", "record with -c 1 (every event)"),
        ),
        ({"flags": 1 << 4 | 1 << 18}, ("excluded", "record with events without :u or :k")),
    ],
)
def test_options_that_lose_data_are_named(
    change: dict[str, int], loss: tuple[str, str], tmp_path: Path
) -> None:
    made = PerfRecording(**change)  # type: ignore[arg-type]
    made.body = made.call(START, 7, 0, 0)
    assert loss in _read(tmp_path, made.file()).losses.select("kind", "detail").rows()


def test_unknown_records_are_counted_and_passed_over(tmp_path: Path) -> None:
    made = _simple()
    made.body = made.record(200, b"x" * 24) + made.body + made.record(201, b"") * 2
    trace = _read(tmp_path, made.file())
    rows = (
        trace.losses.filter(pl.col("kind") == "unknown_record").select("detail", "n_lines").rows()
    )
    assert rows == [("record of type 200", 1), ("record of type 201", 2)]
    assert trace.seamcalls.height == 2


def test_a_killed_recorder_leaves_a_file_without_formats(tmp_path: Path) -> None:
    made = _simple()
    data = bytearray(made.file()[: made.file().index(made.body) + len(made.body)])
    data[48:56] = bytes(8)
    with pytest.raises(FormatError, match="has no event formats: the file ends in its data"):
        _read(tmp_path, bytes(data))


def test_a_damaged_record_ends_what_can_be_read(tmp_path: Path) -> None:
    made = _simple()
    tail = b"\0" * 64 + made.call(START + 100, 9, 0, 0)
    made.body += tail
    trace = _read(tmp_path, made.file())
    assert trace.seamcalls["tid"].to_list() == [7, 8]
    assert trace.losses.filter(pl.col("kind") == "damaged")["detail"].to_list() == [
        f"{len(tail)} bytes of records"
    ]


def test_long_records_are_passed_over(tmp_path: Path) -> None:
    made = _simple()
    long = made.record(10, b"x" * 60_000)
    expected = _read(tmp_path, made.file())
    assert len(long) > reader._SMALL_BYTES
    made.body = long + made.body + long
    trace = _read(tmp_path, made.file())
    assert trace.seamcalls["gpa"].equals(expected.seamcalls["gpa"])
    assert trace.provenance.sources[0].n_lines == expected.provenance.sources[0].n_lines + 2


@pytest.mark.parametrize("n_waiting", [1, 500, 1 << 17])
def test_a_long_recording_is_read_in_pieces(
    n_waiting: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ordered_events, "_MIN_QUEUED", n_waiting)
    made = PerfRecording()
    calls = [made.call(START + 100 * n, 7 + n % 3, n << 12, n) for n in range(4000)]
    made.body = b"".join(calls[:2000]) + made.end_round() + b"".join(calls[2000:])
    trace = _read(tmp_path, made.file())
    assert trace.seamcalls["status"].to_list() == list(range(4000))
    assert trace.seamcalls["seq"].to_list() == list(range(2, 8001, 2))
