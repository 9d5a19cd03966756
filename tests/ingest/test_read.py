"""Reading of files: every line becomes a row, a header or a loss."""

from __future__ import annotations

import gzip
import random
import re
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.texts import (
    BUSY,
    ONE_CALL,
    accounts,
    as_bytes,
    aug,
    aug_ret,
    is_accounted_for,
    line,
    lost,
    read_text,
)

import tdxtrace
from tdxtrace.errors import FormatError, InputError, QueryError, TdxtraceError
from tdxtrace.ingest.read import read_trace
from tdxtrace.tables.trace import Trace


def read(*texts: str | bytes, **options: Any) -> Trace:  # noqa: ANN401
    trace = read_text(*texts, **options)
    trace.check()
    assert is_accounted_for(trace), accounts(trace)
    return trace


def calls(*texts: str | bytes, **options: Any) -> list[tuple[Any, ...]]:  # noqa: ANN401
    frame = read(*texts, **options).seamcalls
    return frame.select("source", "seq", "gpa", "status").rows()


WHOLE = [(0, 2, 0x8000_0000, 0)]
NAMES = ("start_ns", "end_ns", "tid", "cpu", "leaf", "td_id", "gpa", "level", "status")


# What tools print of one call.

ONE_BUSY = (1_234_000_001_000, 1_234_000_003_000, 7, 1, 6, 0x7D000, 0x8000_0000, 0, BUSY)
SYMBOL = "(tdh_mem_page_aug+0x4/0xb0)"
CALLER = "tdx_sept_set_private_spte+0x9b/0x1a0 [kvm_intel]"
ARGS = "td=0x7d000 gpa=0x80000000 level=0"
RET = "ret=0x8000020000000092"
TOOLS = {
    "tracefs": (
        f"       CPU 0/KVM-7       [001] .....  1234.000001: aug: {SYMBOL} {ARGS}\n"
        f"       CPU 0/KVM-7       [001] .....  1234.000003: aug_ret: "
        f"({CALLER} <- tdh_mem_page_aug) {RET}\n"
    ),
    "no irq-info": (
        f"       CPU 0/KVM-7       [001]  1234.000001: aug: {SYMBOL} {ARGS}\n"
        f"       CPU 0/KVM-7       [001]  1234.000003: aug_ret: (0x1 <- 0x2) {RET}\n"
    ),
    "fields": (
        "       CPU 0/KVM-7       [001] .....  1234.000001: aug: __probe_ip=0x1 (1) "
        "td=0x7d000 (512000) gpa=0x80000000 (2147483648) level=0x0 (0)\n"
        "       CPU 0/KVM-7       [001] .....  1234.000003: aug_ret: __probe_func=0x1 (1) "
        f"__probe_ret_ip=0x2 (2) {RET} (-9223369837831520110)\n"
    ),
    "trace-cmd": (
        f"cpus=2\n       CPU 0/KVM-7     [001]  1234.000001: aug:                  (1) {ARGS}\n"
        f"       CPU 0/KVM-7     [001]  1234.000003: aug_ret:              (1 <- 2) {RET}\n"
    ),
    "trace-cmd -R": (
        f"cpus=2\n       CPU 0/KVM-7     [001]  1234.000001: aug:   __probe_ip=1 "
        "td=0x7d000 gpa=0x80000000 level=\n"
        f"       CPU 0/KVM-7     [001]  1234.000003: aug_ret:   __probe_func=1 "
        f"__probe_ret_ip=2 {RET}\n"
    ),
    "trace-cmd -t": (
        f"cpus=2\n       CPU 0/KVM-7     [001]  1234.000001000: aug:      (1) {ARGS}\n"
        f"       CPU 0/KVM-7     [001]  1234.000003000: aug_ret:  (1 <- 2) {RET}\n"
    ),
    "trace-cmd -l": (
        f"cpus=2\nCPU 0/KVM-7       1.....  1234.000001: aug:      (1) {ARGS}\n"
        f"CPU 0/KVM-7       1.....  1234.000003: aug_ret:  (1 <- 2) {RET}\n"
    ),
    "instance": (
        f"cpus=2\nrig:        CPU 0/KVM-7     [001]  1234.000001: aug:      (1) {ARGS}\n"
        f"rig:        CPU 0/KVM-7     [001]  1234.000003: aug_ret:  (1 <- 2) {RET}\n"
    ),
    "perf": (
        f"       CPU 0/KVM     7 [001]  1234.000001:      tdx:aug: (1) {ARGS}\n"
        f"       CPU 0/KVM     7 [001]  1234.000003:  tdx:aug_ret: (1 <- 2) {RET}\n"
    ),
    "perf --ns": (
        f"       CPU 0/KVM     7 [001]  1234.000001000:      tdx:aug: (1) {ARGS}\n"
        f"       CPU 0/KVM     7 [001]  1234.000003000:  tdx:aug_ret: (1 <- 2) {RET}\n"
    ),
    "perf pid,sym": (
        f"       CPU 0/KVM     4/7 [001]  1234.000001:      tdx:aug: (1) {ARGS}     "
        "5646b46b3a50 tdh_mem_page_aug\n"
        f"       CPU 0/KVM     4/7 [001]  1234.000003:  tdx:aug_ret: (1 <- 2) {RET}     "
        "5646b46b5e9e vcpu_main\n"
    ),
    "perf -g": (
        f"CPU 0/KVM     7 [001]  1234.000001:      tdx:aug: (1) {ARGS}\n"
        "\t    5646b46b3a50 tdh_mem_page_aug+0x0 (/usr/bin/x)\n"
        "\t    7f3b1c2d3e4f start_thread+0x1f (/lib/libc.so.6)\n"
        "\n"
        f"CPU 0/KVM     7 [001]  1234.000003:  tdx:aug_ret: (1 <- 2) {RET}\n"
        "\t    5646b46b5e9e vcpu_main+0x3e (/usr/bin/x)\n"
        "\n"
    ),
    "fprobe": (
        f"       CPU 0/KVM-7       [001] .....  1234.000001: tdh_mem_page_aug__entry: {SYMBOL} "
        "td=0x7d000 gpa=2147483648 level=0\n"
        "       CPU 0/KVM-7       [001] .....  1234.000003: tdh_mem_page_aug__exit: "
        f"({CALLER} <- tdh_mem_page_aug) arg1=9223374235878031506\n"
    ),
    "signed": (
        f"       CPU 0/KVM-7       [001] .....  1234.000001: aug: {SYMBOL} {ARGS}\n"
        "       CPU 0/KVM-7       [001] .....  1234.000003: aug_ret: (0x1 <- 0x2) "
        "ret=-9223369837831520110\n"
    ),
    "bare hex": (
        f"       CPU 0/KVM-7       [001] .....  1234.000001: aug: {SYMBOL} {ARGS}\n"
        "       CPU 0/KVM-7       [001] .....  1234.000003: aug_ret: (0x1 <- 0x2) "
        "ret=8000020000000092\n"
    ),
    "registers": (
        "       CPU 0/KVM-7       [001] .....  1234.000001: p_seamcall_ret_0: "
        "(__seamcall_ret+0x0/0x40) fn=0x6 rcx=0x80000000 rdx=0x7d000\n"
        "       CPU 0/KVM-7       [001] .....  1234.000003: r_seamcall_ret_0: "
        f"(tdh_mem_page_aug+0x9b/0xb0 <- __seamcall_ret) {RET}\n"
    ),
    "quoted mail": (
        f"> >        CPU 0/KVM-7       [001] .....  1234.000001: aug: {SYMBOL} {ARGS}\n"
        f"> >        CPU 0/KVM-7       [001] .....  1234.000003: aug_ret: (0x1 <- 0x2) {RET}\n"
    ),
}


@pytest.mark.parametrize("tool", TOOLS)
def test_one_call_reads_the_same_whatever_printed_it(tool: str) -> None:
    trace = read(TOOLS[tool])
    assert trace.seamcalls.select(NAMES).rows() == [ONE_BUSY]
    assert set(lost(trace)) <= {"callchain"}
    assert trace.threads.select("tid", "comm").rows() == [(7, "CPU 0/KVM")]


@pytest.mark.parametrize("tool", TOOLS)
def test_so_do_many(tool: str) -> None:
    """Enough lines that most are read by the fast path."""
    block = TOOLS[tool].removeprefix("cpus=2\n")
    parts = [block.replace(" 1234.", f" {1000 + k}.") for k in range(200)]
    seconds = pl.col("start_ns") // 1_000_000_000
    frame = read("".join(parts)).seamcalls
    assert frame.select(seconds)["start_ns"].to_list() == list(range(1000, 1200))
    kept = NAMES[2:]
    assert frame.select(kept).unique().rows() == [ONE_BUSY[2:]]
    assert (frame["end_ns"] - frame["start_ns"]).unique().to_list() == [2000]


@pytest.mark.parametrize(
    ("text", "span"),
    [
        (
            f"    CPU 0/K-7         1..... 29678us+: aug: {SYMBOL} {ARGS}\n"
            f"    CPU 0/K-7         1..... 29680us : aug_ret: (0x1 <- 0x2) {RET}\n",
            (29_678_000, 29_680_000),
        ),
        (
            f"       CPU 0/KVM   7   1 255 0000000f 00000000 [458dddec] 20.855ms (+0.029ms): "
            f"aug: {SYMBOL} {ARGS}\n"
            f"       CPU 0/KVM   7   1 255 0000000f 00000000 [458dddec] 20.857ms (+0.002ms): "
            f"aug_ret: (0x1 <- 0x2) {RET}\n",
            (20_855_000, 20_857_000),
        ),
    ],
)
def test_relative_times_are_read_and_said_to_be(text: str, span: tuple[int, int]) -> None:
    trace = read(text)
    assert trace.seamcalls.select("start_ns", "end_ns").rows() == [span]
    assert trace.provenance.sources[0].clock == "relative"
    assert any("cannot be merged" in note for note in trace.provenance.notes)


# Clocks.


@pytest.mark.parametrize(
    ("stamps", "expected", "resolution", "clock"),
    [
        (("1234.000001", "1234.000003"), ONE_BUSY[:2], 1000, "unnamed"),
        (("1234.000001007", "1234.000003009"),
         (1_234_000_001_007, 1_234_000_003_009), 1, "unnamed"),
        (("0.000000", "0.000001"), (0, 1000), 1000, "relative"),
        (("1795336205.146457", "1795336205.146458"),
         (1_795_336_205_146_457_000, 1_795_336_205_146_458_000), 1000, "unnamed"),
        (("9007199.254741", "9007199.254742"),
         (9_007_199_254_741_000, 9_007_199_254_742_000), 1000, "unnamed"),
        (("4217194507978", "4217194632513"), (4_217_194_507_978, 4_217_194_632_513), 1, "integer"),
        (("7", "8"), (7, 8), 1, "integer"),
    ],
)  # fmt: skip
def test_clocks(
    stamps: tuple[str, str], expected: tuple[int, int], resolution: int, clock: str
) -> None:
    trace = read(aug(stamps[0]) + aug_ret(stamps[1]))
    assert trace.seamcalls.select("start_ns", "end_ns").rows() == [expected]
    source = trace.provenance.sources[0]
    assert (source.clock_resolution_ns, source.clock) == (resolution, clock)
    assert (source.first_ns, source.last_ns) == expected
    assert any("integer clock" in note for note in trace.provenance.notes) == (clock == "integer")


@settings(max_examples=20)
@given(st.lists(st.integers(0, 9 * 10**9 * 10**6), min_size=1, max_size=20))
def test_microseconds_are_exact(micros: list[int]) -> None:
    """Through a float, one stamp in fifty comes out 1 ns early."""
    micros.sort()
    text = "".join(aug(f"{t // 10**6}.{t % 10**6:06}") for t in micros)
    found = read_text(text).seamcalls.sort("seq")["start_ns"].to_list()
    assert found == [t * 1000 for t in micros]


def test_a_stamp_that_no_clock_can_show_is_a_loss() -> None:
    trace = read(ONE_CALL + line("99999999999.000001", "kvm_entry: vcpu 0"))
    assert lost(trace) == {"unparsed": 1}


def test_a_clock_that_runs_backwards_makes_sound_tables() -> None:
    """Clock `local` of two CPUs, or perf without order: a return before its entry."""
    text = aug("1.000010", cpu=1) + aug_ret("1.000005", cpu=2) + ONE_CALL.replace("1.", "2.")
    trace = read(text)
    findings = tdxtrace.analyze(trace)
    findings.check()
    assert findings.retry_chains.height == 2


def test_lines_out_of_order_of_time_pair_in_the_order_of_the_file() -> None:
    text = "".join(
        [
            aug("1.000010", "gpa=0x1000", task="a-7", cpu=1),
            aug_ret("1.000011", "ret=0x1", task="a-7", cpu=1),
            aug("1.000005", "gpa=0x2000", task="b-8", cpu=2),
            aug_ret("1.000006", "ret=0x2", task="b-8", cpu=2),
        ]
    )
    assert calls(text) == [(0, 2, 0x1000, 1), (0, 4, 0x2000, 2)]
    source = read(text).provenance.sources[0]
    assert (source.first_ns, source.last_ns) == (1_000_005_000, 1_000_011_000)


# Several inputs.


def test_several_paths_are_several_sources() -> None:
    trace = read(ONE_CALL, gzip.compress(("# x\n" + ONE_CALL).encode()), TOOLS["perf"])
    assert trace.seamcalls.select("source", "seq").rows() == [(0, 2), (1, 3), (2, 2)]
    sources = trace.provenance.sources
    assert [s.compression for s in sources] == ["none", "gzip", "none"]
    assert [s.format for s in sources] == ["ftrace", "ftrace", "perf-script"]
    assert [s.n_headers for s in sources] == [0, 1, 0]
    assert trace.threads["source"].to_list() == [0, 1, 2]


def test_calls_do_not_pair_across_inputs() -> None:
    trace = read(aug("1.000001"), aug_ret("1.000003"))
    assert trace.seamcalls["n_lines"].to_list() == [1, 1]


def test_a_missing_path_is_refused() -> None:
    with pytest.raises(InputError, match="no input named"):
        read_trace()


def test_one_bad_input_among_good_ones_is_named() -> None:
    with pytest.raises(FormatError, match=r"1-trace\.txt is a JPEG"):
        read_text(ONE_CALL, b"\xff\xd8\xff\xe0")


# Bytes around and inside lines.

BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(BOM + ONE_CALL.encode(), id="BOM"),
        pytest.param(ONE_CALL.replace("\n", "\r\n"), id="CRLF"),
        pytest.param(BOM + ONE_CALL.replace("\n", "\r\n").encode(), id="BOM and CRLF"),
        pytest.param(ONE_CALL.removesuffix("\n"), id="no final newline"),
        pytest.param(ONE_CALL.replace("\n", "\r\n").removesuffix("\n"), id="no final newline, CR"),
        pytest.param(re.sub("(?m)^", "> ", ONE_CALL), id="quoted"),
        pytest.param(re.sub("(?m)^", "> > > ", ONE_CALL), id="quoted three times"),
        pytest.param(re.sub("(?m)^", ">>", ONE_CALL), id="quoted tightly"),
        pytest.param(re.sub("(?m)$", "  ", ONE_CALL), id="blanks at the end"),
    ],
)
def test_bytes_around_lines_change_nothing(text: str | bytes) -> None:
    expected = [(*row[:1], 2, *row[2:]) for row in WHOLE]
    found = [row for row in calls(text) if row[3] is not None]
    assert found == expected


def test_a_byte_order_mark_is_no_part_of_the_first_line() -> None:
    trace = read(BOM + ONE_CALL.encode())
    assert trace.threads["comm"].to_list() == ["CPU 0/KVM"]
    assert read(BOM + b"# tracer: nop\n" + ONE_CALL.encode()).provenance.sources[0].n_headers == 1
    assert lost(read(BOM + b"CPU:1 [LOST 5 EVENTS]\n" + ONE_CALL.encode())) == {"lost_events": 1}


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_truncated_last_line_is_a_loss(cut: int) -> None:
    text = ONE_CALL + ONE_CALL.splitlines()[0][:cut]
    trace = read(text)
    assert trace.seamcalls.filter(pl.col("end_ns").is_not_null()).height == 1
    assert trace.provenance.sources[0].n_lines == 3


@pytest.mark.parametrize("byte", [b"\0", b"\xff", b"\x80", b"\x1b[31m", b"\xc3\xa9", b"\xc2\x85"])
def test_bytes_that_are_no_text_in_a_name(byte: bytes) -> None:
    text = ONE_CALL.encode().replace(b"CPU 0", byte + b" 0")
    trace = read(text)
    assert trace.seamcalls.height == 1
    (comm,) = trace.threads["comm"]
    assert comm.endswith(" 0/KVM")


@pytest.mark.parametrize("byte", [b"\0", b"\xff\xfe", b"\x1b"])
def test_bytes_that_are_no_text_between_lines(byte: bytes) -> None:
    entry, leave = ONE_CALL.encode().splitlines(keepends=True)
    trace = read(entry + byte * 9 + b"\n" + leave)
    assert trace.seamcalls.height == 1
    assert sum(lost(trace).values()) + trace.provenance.sources[0].n_headers == 1


def test_samples_of_what_was_not_understood_are_shown_as_text() -> None:
    trace = read(ONE_CALL + "\x1b[31mwhat is this\x1b[0m\n")
    (sample,) = trace.losses.filter(kind="unparsed")["detail"]
    assert sample.isprintable()
    assert "what is this" in sample


def test_names_are_kept_as_recorded() -> None:
    text = aug("1.000001", task="[red]a<b>-7") + aug_ret("1.000002", task="[red]a<b>-7")
    assert read(text).threads["comm"].to_list() == ["[red]a<b>"]


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        (line("1.000001", "sched_switch: x") * 3, {"noise": 3}),
        (line("1.000001", "bprint: fig: cpu=0") + " gid=4\n", {"noise": 1, "unparsed": 1}),
        (line("1.000001", "sys_recvmsg -> 0x24"), {"noise": 1}),
        (" => entry_SYSCALL_64_after_hwframe\n", {"callchain": 1}),
        ("23598 1 1166397399621 type: 2326\n", {"no_payload": 1}),
        ("aug: (0x55c) gpa=0x1000\n", {"no_time": 1}),
        ("[    7.59] tdx: SEAMCALL failed: CPU 94: leaf 33\n", {"unparsed": 1}),
        ("CPU:1 [LOST 5 EVENTS]\n", {"lost_events": 1}),
        (line("1.000001", "p_0x1: (0x5)"), {"unmapped": 1}),
        (line("1.000001", "kvm_exit: TRAP"), {"undecoded": 1}),
        ("\n\n# comment\ncpus=2\nversion = 6\nCPU 3 is empty\n", {}),
        ("##### CPU 2 buffer started ####\n", {}),
    ],
)
def test_lines_that_become_no_row_are_counted(text: str, kinds: dict[str, int]) -> None:
    trace = read(ONE_CALL + text)
    assert lost(trace) == kinds


def test_losses_carry_a_place_a_severity_and_advice() -> None:
    trace = read(ONE_CALL + line("1.000005", "p_0x1: (0x5)") + "what\n" + "what else\n")
    rows = trace.losses.select("kind", "severity", "line_no", "n_lines", "detail").rows()
    assert rows == [("unmapped", "data_loss", 3, 1, "p_0x1"), ("unparsed", "error", 4, 2, "what")]
    assert all(trace.losses["advice"].str.len_chars() > 10)


def test_names_without_end_do_not_fill_the_table_of_losses() -> None:
    text = ONE_CALL + "".join(line("1.000005", f"event_{k}: x") for k in range(9000))
    trace = read(text)
    assert trace.losses.height < 5000
    assert trace.losses["n_lines"].sum() == 9000


# Markers of lost events, as each tool writes them.


@pytest.mark.parametrize(
    ("marker", "cpu", "n"),
    [
        ("CPU:1 [LOST 420 EVENTS]\n", 1, 420),
        ("CPU:1 [LOST EVENTS]\n", 1, None),
        ("CPU:1 [204600 EVENTS DROPPED]\n", 1, 204600),
        ("CPU:1 [EVENTS DROPPED]\n", 1, None),
        ("rig: CPU:1 [219 EVENTS DROPPED]\n", 1, 219),
        ("            fake 24454 [001]  1.500000: PERF_RECORD_LOST lost 489\n", 1, 489),
        ("            fake 24454 1.500000: PERF_RECORD_LOST lost 489\n", None, 489),
    ],
)
def test_a_marker_is_a_gap_between_events(marker: str, cpu: int | None, n: int | None) -> None:
    text = ONE_CALL + aug("1.000005", cpu=2) + marker + aug_ret("2.000001", cpu=2)
    text += aug("2.000005", cpu=1)
    gap = read(text).losses.filter(kind="lost_events").row(0, named=True)
    assert (gap["cpu"], gap["n_events"], gap["n_lines"], gap["line_no"]) == (cpu, n, 1, 4)
    last = 1_000_003_000 if cpu else 1_000_005_000
    after = 2_000_005_000 if cpu else 2_000_001_000
    assert (gap["start_ns"], gap["end_ns"]) == (last, after)


@pytest.mark.parametrize("n", [1, 300])
def test_a_gap_is_as_narrow_in_a_long_file(n: int) -> None:
    before = "".join(aug(f"1.{k:06}") + aug_ret(f"1.{k:06}") for k in range(n))
    after = before.replace(" 1.", " 2.")
    marker = "CPU:1 [LOST 5 EVENTS]\n"
    gap = read(before + marker + after).losses.filter(kind="lost_events").row(0, named=True)
    assert gap["start_ns"] == 1_000_000_000 + (n - 1) * 1000
    assert gap["end_ns"] == 2_000_000_000


# Wrapper and lower layer probed together.


def both(inner: list[tuple[int, int]], outer_status: int) -> str:
    """One call of the wrapper in which ``inner`` (stamp, status) SEAMCALLs were issued."""
    rcx = "fn=0x6 rcx=0x80000000 rdx=0x7d000"
    lines = [aug("1.000001", "td=0xff110 gpa=0x80000000 level=0")]
    for stamp, status in inner:
        lines += [
            line(f"1.{stamp:06}", f"sc_in: (__seamcall_ret+0x0/0x40) {rcx}"),
            line(
                f"1.{stamp + 1:06}",
                f"sc_out: (tdh_mem_page_aug+0x9b/0xb0 <- __seamcall_ret) ret={status:#x}",
            ),
        ]
    return "".join([*lines, aug_ret("1.000090", f"ret={outer_status:#x}")])


NO_ENTROPY = 0x8000_0203_0000_0000


def test_the_seamcalls_inside_a_wrapper_replace_it() -> None:
    text = both([(10, NO_ENTROPY), (20, NO_ENTROPY), (30, 0)], 0) * 1
    trace = read(text)
    rows = trace.seamcalls.select("probe", "status", "gpa", "td_id", "level").rows()
    # The wrapper knows the TD by another name than the registers do.
    assert [row[:3] for row in rows] == [
        ("seamcall", NO_ENTROPY, 0x8000_0000),
        ("seamcall", NO_ENTROPY, 0x8000_0000),
        ("seamcall", 0, 0x8000_0000),
    ]
    assert lost(trace) == {"merged": 2}
    assert len({row[3] for row in rows}) == 1
    assert tdxtrace.analyze(trace).retry_chains["n_attempts"].to_list() == [3]


def test_the_level_in_a_register_is_not_replaced_by_that_of_the_wrapper() -> None:
    """The wrappers of Linux 7.2 number a 4K page as 1, the module as 0."""
    text = both([(10, 0)], 0).replace("level=0", "level=1")
    trace = read("# tracer: nop\n#\n# os release : 7.2.0\n#\n" + text)
    columns = ("probe", "gpa", "level", "td_id")
    assert trace.seamcalls.select(columns).rows() == [("seamcall", 0x8000_0000, 0, 0xFF110)]


def test_a_wrapper_without_a_seamcall_inside_stays() -> None:
    text = both([(10, 0)], 0) + aug("2.000001") + aug_ret("2.000002", "ret=0x5")
    trace = read(text)
    assert trace.seamcalls.select("probe", "status").rows() == [("seamcall", 0), ("wrapper", 5)]


def test_seamcalls_without_a_wrapper_stay() -> None:
    inner = both([(10, 0)], 0).splitlines(keepends=True)[1:3]
    text = "".join(inner) + aug("2.000001") + aug_ret("2.000002", "ret=0x5")
    trace = read(text)
    assert trace.seamcalls.select("probe", "status").rows() == [("seamcall", 0), ("wrapper", 5)]
    assert lost(trace) == {}


def test_seamcalls_after_a_wrappers_call_are_not_inside_it() -> None:
    inner = both([(10, 0)], 0).splitlines(keepends=True)[1:3]
    text = aug("0.000001") + aug_ret("0.000002", "ret=0x5") + "".join(inner)
    trace = read(text)
    assert trace.seamcalls.select("probe", "status").rows() == [("wrapper", 5), ("seamcall", 0)]
    assert lost(trace) == {}


def test_a_seamcall_of_a_thread_without_wrapper_is_not_inside_anothers() -> None:
    mine = both([(10, 0)], 0).splitlines(keepends=True)
    other = [text.replace("CPU 0/KVM-7 ", "CPU 0/KVM-8 ") for text in mine[1:3]]
    rows = read("".join([mine[0], *other, mine[3]])).seamcalls
    assert rows.sort("tid").select("tid", "probe").rows() == [(7, "wrapper"), (8, "seamcall")]


def test_one_line_returns_inside_a_wrapper_replace_it() -> None:
    done = (
        "sc_ret: (tdh_mem_page_aug+0x9b/0xb0 <- __seamcall_ret) ret={:#x} fn=0x6 rcx=0x803 rdx=0x1"
    )
    text = "".join(
        [
            aug("1.000001", "td=0x7d000 gpa=0x80000000 level=0"),
            line("1.000010", done.format(NO_ENTROPY)),
            line("1.000020", done.format(0)),
            aug_ret("1.000030", "ret=0x0"),
        ]
    )
    trace = read(text)
    rows = trace.seamcalls.select("probe", "status", "gpa", "td_id").rows()
    assert rows == [
        ("seamcall", NO_ENTROPY, 0x8000_0000, 0x7D000),
        ("seamcall", 0, 0x8000_0000, 0x7D000),
    ]
    assert tdxtrace.analyze(trace).retry_chains["n_attempts"].to_list() == [2]


def test_a_one_line_wrapper_after_its_seamcalls_is_no_second_attempt() -> None:
    inner = both([(10, NO_ENTROPY), (20, 0)], 0).splitlines(keepends=True)[1:5]
    done = "aug_done: (tdx_x+0x1/0x2 <- tdh_mem_page_aug) ret=0x0 td=0x7d000 gpa=0x80000000 level=0"
    trace = read("".join(inner) + line("1.000090", done))
    assert trace.seamcalls["status"].to_list() == [NO_ENTROPY, 0]
    assert lost(trace) == {"merged": 1}


def test_threads_do_not_stand_for_each_other() -> None:
    mine = both([(10, 0)], 0).splitlines(keepends=True)
    other = aug("1.000005", "gpa=0x5000", task="b-8") + aug_ret("1.000050", "ret=0x7", task="b-8")
    text = "".join([*mine[:2], other, *mine[2:]])
    rows = read(text).seamcalls.sort("tid", "seq").select("tid", "probe", "status").rows()
    assert rows == [(7, "seamcall", 0), (8, "wrapper", 7)]


# Bad words.


def test_a_malformed_mapping_is_refused() -> None:
    with pytest.raises(QueryError, match="not a mapping"):
        read_text(ONE_CALL, mappings=["x"])


@pytest.mark.parametrize("cpus", ["99999", "4294967296", "9" * 5000])
@pytest.mark.parametrize("where", ["line", "loss"])
def test_no_cpu_is_too_large(where: str, cpus: str) -> None:
    odd = (
        f"       CPU 0/KVM-7       [{cpus}] .....  1.000009: kvm_entry: vcpu 0\n"
        if where == "line"
        else f"CPU:{cpus} [LOST 5 EVENTS]\n"
    )
    read(ONE_CALL + odd + ONE_CALL.replace("1.", "2."))


@pytest.mark.parametrize("number", ["99999999999", "9" * 5000])
@pytest.mark.parametrize(
    "odd",
    [
        "       CPU 0/KVM-{}       [001] .....  1.000009: kvm_entry: vcpu 0\n",
        "       CPU 0/KVM-7     ({:>7}) [001] .....  1.000009: kvm_entry: vcpu 0\n",
        "       CPU 0/KVM-7       [001] .....  {}.000009: kvm_entry: vcpu 0\n",
        "       CPU 0/KVM-7       [001] .....  {}: kvm_entry: vcpu 0\n",
        "       CPU 0/KVM-7       [001] .....  1.{}: kvm_entry: vcpu 0\n",
        "       CPU 0/KVM-7       [001] .....  1.000009: kvm_entry: vcpu {}\n",
        "       CPU 0/KVM-7       [001] .....  1.000009: kvm_exit: vcpu 0 reason {} rip 0x0\n",
        "       CPU 0/KVM-7       [001] .....  1.000009: kvm_exit: reason UNKNOWN ({}) rip 0x0\n",
        "       CPU 0/KVM-7       [001] .....  1.000009: kvm_userspace_exit: reason X ({})\n",
        "       CPU 0/KVM-7       [001] .....  1.000009: aug: (0x1) gpa={}\n",
        "       CPU 0/KVM-7       [001] .....  1.000009: tdx_seamcall: op: X({}) 0 0 0\n",
        "       CPU 0/KVM {} [001]  1.000009: kvm:kvm_entry: vcpu 0\n",
        "       CPU 0/KVM {}/7 [001]  1.000009: kvm:kvm_entry: vcpu 0\n",
        "       CPU 0/KVM 7 [{}]  1.000009: kvm:kvm_entry: vcpu 0\n",
        "       CPU 0/KVM 7 [001]  1.000009: PERF_RECORD_LOST lost {}\n",
        "    CPU 0/K-7         1..... {}us+: kvm_entry: vcpu 0\n",
        "    CPU 0/K-7         {}..... 29678us+: kvm_entry: vcpu 0\n",
        "CPU:1 [LOST {} EVENTS]\n",
        "CPU:1 [{} EVENTS DROPPED]\n",
        "   50.000010 |   {})  CPU 0/KVM-7    |   1.000 us    |  tdh_mem_track(); /* ret=0x0 */\n",
    ],
)
def test_no_number_is_too_long(odd: str, number: str) -> None:
    trace = read(ONE_CALL + odd.format(number) + ONE_CALL.replace("1.", "2."))
    assert trace.seamcalls.filter(pl.col("status") == 0).height >= 2


GRAPH = "   50.000010 |   1)  CPU 0/KVM-7    |   1.000 us    |  tdh_mem_track(); /* ret=0x0 */\n"


@pytest.mark.parametrize("number", ["99999999999", "9" * 5000])
@pytest.mark.parametrize(
    "odd",
    [
        "   {}.000010 |   1)  CPU 0/KVM-7    |   1.000 us    |  tdh_mem_track(); /* ret=0x0 */\n",
        "   50.000010 |   {})  CPU 0/KVM-7    |   1.000 us    |  tdh_mem_track(); /* ret=0x0 */\n",
        "   50.000010 |   1)  CPU 0/KVM-{}    |   1.000 us    |  tdh_mem_track(); /* ret=0x0 */\n",
        "   50.000010 |   1)  CPU 0/KVM-7    |   {}.000 us   |  tdh_mem_track(); /* ret=0x0 */\n",
        "   50.000010 |   1)  CPU 0/KVM-7    |   1.000 us    |  tdh_mem_track(); /* ret={} */\n",
        "   1)    <idle>-0    =>  CPU 0/KVM-{}   \n",
        "   {})    <idle>-0    =>  CPU 0/KVM-7   \n",
    ],
)
def test_no_number_of_a_graph_is_too_long(odd: str, number: str) -> None:
    trace = read(GRAPH + odd.format(number) + GRAPH)
    assert trace.seamcalls.height >= 2


# The law: whatever the lines are, none vanishes and nothing raises but our own errors.

POOL = [
    *(row for tool in TOOLS.values() for row in tool.splitlines(keepends=True)),
    *ONE_CALL.splitlines(keepends=True),
    line("1.000005", "kvm_entry: vcpu 0, rip 0x0"),
    line("1.000006", "kvm_exit: vcpu 0 reason EPT_VIOLATION rip 0x0 info1 0x2 info2 0x0"),
    line("1.000006", "kvm_exit: vcpu 0 reason 0xffff FAILED_VMENTRY 0x7fff0000 rip 0x0"),
    line("1.000007", "kvm_page_fault: vcpu 0 rip 0x0 address 0x0000000080000000 error_code 0x2"),
    line("1.000007", "kvm_page_fault: address 80000000 error_code 181"),
    line("1.000008", "kvm_userspace_exit: reason KVM_EXIT_IO (2)"),
    line("1.000008", "sched_switch: prev_comm=swapper/1 prev_pid=0 ==> next_pid=7"),
    line("1.000009", "tdx_seamcall: op: TDH_MEM_PAGE_AUG(6) 80000000 12000 13000 0 0"),
    line("1.000010", "tdx_seamret: op: TDH_MEM_PAGE_AUG(6) err: TDX_SUCCESS(0) 0 0 0 0 0 0"),
    *both([(10, NO_ENTROPY), (20, 0)], 0).splitlines(keepends=True),
    "CPU:1 [LOST 420 EVENTS]\n",
    "            fake 24454 [001]  1203.336878: PERF_RECORD_LOST lost 489\n",
    "# entries-in-buffer/entries-written: 156/41484   #P:2\n",
    "cpus=2\n",
    "\n",
    "what is this\n",
    "23598 1 1166397399621 type: 2326\n",
    GRAPH,
    "   50.000020 |   1)  CPU 0/KVM-7    |               |  tdh_mem_page_aug(gpa=0x1000) {\n",
    "   50.000030 |   1)  CPU 0/KVM-7    |   9.000 us    |  } /* tdh_mem_page_aug ret=0x1 */\n",
]
lines = st.sampled_from(POOL).map(as_bytes)
BYTES = b"\0\xff\xc3\x1b\t >[]()<>-.:=0x9af\r"


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A line of the pool with a byte changed, left out, doubled, or its end cut off."""
    text = draw(lines)
    at = draw(st.integers(0, len(text) - 1))
    how = draw(st.sampled_from(["change", "leave out", "double", "cut", "insert"]))
    byte = bytes([draw(st.sampled_from(BYTES))])
    if how == "cut":
        return text[:at] + b"\n"
    middle = {"change": byte, "leave out": b"", "double": text[at : at + 1] * 2}
    if how == "insert":
        return text[:at] + byte + text[at:]
    return text[:at] + middle[how] + text[at + 1 :]


def obeys(text: bytes, *, is_analyzed: bool = True, **options: Any) -> None:  # noqa: ANN401
    message = "a trace"
    try:
        trace = read_text(text, **options)
    except TdxtraceError as error:
        message = str(error)
    else:
        trace.check()
        assert accounts(trace) == [(n, n) for n, _ in accounts(trace)]
        n_lines = text.count(b"\n") + (not text.endswith(b"\n"))
        assert trace.provenance.sources[0].n_lines == n_lines
        if is_analyzed:
            findings = tdxtrace.analyze(trace)
            findings.check()
            assert findings.retry_chains["n_attempts"].sum() == trace.seamcalls.height
    assert message.isprintable()


@settings(max_examples=15)
@given(st.lists(st.one_of(lines, lines, damaged()), min_size=1, max_size=40).map(b"".join))
def test_any_mixture_of_lines_is_accounted_for(text: bytes) -> None:
    obeys(text)


@settings(max_examples=25)
@given(
    st.lists(st.one_of(lines, damaged()), min_size=1, max_size=30).map(b"".join),
    st.sampled_from(
        ["ftrace", "ftrace-latency", "ftrace-verbose", "function-graph", "perf-script"]
    ),
)
def test_any_mixture_of_lines_is_accounted_for_in_any_format(text: bytes, form: str) -> None:
    obeys(text, input_format=form)


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.lists(damaged(), max_size=10), st.integers(1, 200))
def test_a_long_file_with_damaged_lines_is_accounted_for(
    seed: int, odd: list[bytes], n: int
) -> None:
    """So long that the fast path reads most of it; cut somewhere, some of it doubled.

    A third is analyzed, which takes ten times as long as to read it.
    """
    luck = random.Random(seed)
    kinds = [as_bytes(POOL[luck.randrange(len(POOL))]) for _ in range(4)]
    parts = [kinds[luck.randrange(4)] for _ in range(100 + n)]
    for text in odd:
        parts.insert(luck.randrange(len(parts)), text)
    at = luck.randrange(len(parts))
    parts[at:at] = parts[at : at + 20]
    text = b"".join(parts)
    obeys(text[: len(text) - luck.randrange(80)], is_analyzed=n % 3 == 0)


@settings(max_examples=25)
@given(st.binary(max_size=300))
def test_any_bytes_are_a_trace_or_one_clear_line(data: bytes) -> None:
    # Noise leaves no more to analyze than the call: others see to that.
    obeys(data or b"\n", is_analyzed=False)
    obeys(ONE_CALL.encode() + data, is_analyzed=False)
