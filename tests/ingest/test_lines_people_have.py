"""Lines as users have them: all tool options, wrapped, quoted, of other hosts.

The files are in ``tests/lines``; what is right of each is what its test says.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from support.texts import ONE_CALL, is_accounted_for, lost, read_text

import tdxtrace
from tdxtrace.errors import FormatError
from tdxtrace.ingest.batch import UNKNOWN
from tdxtrace.ingest.text.line_formats import formats_of, read_prefix
from tdxtrace.tables.trace import Trace

LINES = Path(__file__).parent.parent / "lines"
BUSY = 0x8000_0200_0000_0092
_PAIRED = ("tid", "cpu", "gpa", "start_ns", "end_ns", "status")


def read(name: str) -> Trace:
    trace = tdxtrace.read_trace(LINES / name)
    trace.check()
    assert is_accounted_for(trace)
    return trace


def refused(text: str) -> str:
    with pytest.raises(FormatError) as raised:
        read_text(text)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def attempts(trace: Trace) -> list[tuple[object, ...]]:
    return trace.seamcalls.sort("seq").select(_PAIRED).rows()


# Columns of perf script.


def test_the_misc_column_is_no_part_of_the_name() -> None:
    trace = read("perf-script-misc-column.txt")
    assert attempts(trace) == [
        (14401, 1, 0x1000, 1_000_100_000, 1_000_102_000, BUSY),
        (14402, 2, 0x2000, 1_000_101_000, 1_000_103_000, 0),
    ]
    assert trace.threads["comm"].to_list() == ["CPU 0/KVM", "CPU 1/KVM"]
    assert lost(trace) == {}


EVENT = "probe:tdh_mem_page_aug: (ffffffffc0a01000) td=0x10 gpa=0x1000 level=0"
NO = UNKNOWN


@pytest.mark.parametrize(
    ("head", "place"),
    [
        ("       CPU 0/KVM 14401 [001] K      ", ("CPU 0/KVM", 14401, NO, 1)),
        ("       CPU 0/KVM 14401 K      ", ("CPU 0/KVM", 14401, NO, NO)),
        ("       CPU 0/KVM K      ", ("CPU 0/KVM", NO, NO, NO)),
        ("       CPU 0/KVM 14401 [001] KE     2026-11-22 09:20:49.651814 ", ("CPU 0/KVM", 14401)),
        (" qemu-system-x86 14401 [001] 2026-11-22 09:20:49.651814  ", ("qemu-system-x86", 14401)),
        ("       CPU 0/KVM   14399/14401   [001] U      ", ("CPU 0/KVM", 14401, 14399, 1)),
        # -L: eight bytes of the name, and a CPU in three columns without brackets.
        ("CPU 0/KV 14401   0  ", ("CPU 0/KV", 14401, NO, 0)),
        ("CPU 0/KV   14401   0  ", ("CPU 0/KV", 14401, NO, 0)),
        ("CPU 0/KV    77  12 U      ", ("CPU 0/KV", 77, NO, 12)),
        ("    qemu 14401 123  ", ("    qemu".strip(), 14401, NO, 123)),
        ("CPU 0/KV 14399/14401   0  ", ("CPU 0/KV", 14401, 14399, 0)),
        ("CPU 0/KV 14399/77      0  ", ("CPU 0/KV", 77, 14399, 0)),
        ("CPU 0/KV   0  ", ("CPU 0/KV", NO, NO, 0)),
        ("CPU 0/KV 14401  ", ("CPU 0/KV", 14401, NO, NO)),
        ("14401   0  ", ("", 14401, NO, 0)),
        ("  0  ", ("", NO, NO, 0)),
        # Without -L the same widths are of a thread.
        ("            a 12    77  ", ("a 12", 77, NO, NO)),
        ("        fake_tdx   123  ", ("fake_tdx", 123, NO, NO)),
        ("fake_tdx   123  ", ("fake_tdx", 123, NO, NO)),
        ("14401  ", ("", 14401, NO, NO)),
        ("   77  ", ("", 77, NO, NO)),
    ],
)
def test_columns_of_perf_script(head: str, place: tuple[object, ...]) -> None:
    for form in ("perf-script", "ftrace"):
        made = read_prefix(f"{head}4212.603129: {EVENT}", formats_of(form))
        assert made is not None
        assert (made.comm, made.tid, made.tgid, made.cpu)[: len(place)] == place
        assert made.ts == (4212, "603129")
        assert made.event == "probe:tdh_mem_page_aug"


def test_a_column_that_is_not_known_is_no_part_of_the_name() -> None:
    line = f"CPU 0/KVM 14401 [001] Q7 1.000100: {EVENT}"
    assert read_prefix(line, formats_of("perf-script")) is None


def test_without_threads_only_calls_that_nothing_overlaps_are_paired() -> None:
    trace = read("perf-script-no-thread.txt")
    assert attempts(trace) == [
        (None, None, 0x1000, 1_000_100_000, None, None),
        (None, None, 0x2000, 1_000_101_000, None, None),
        (None, None, None, None, 1_000_102_000, BUSY),
        (None, None, None, None, 1_000_103_000, 0),
    ]
    assert ("no_thread", 4) in trace.losses.select("kind", "n_events").rows()
    chains = tdxtrace.analyze(trace).retry_chains
    assert chains["outcome"].unique().to_list() == ["cut"]
    assert chains["n_attempts"].to_list() == [1] * 4


def no_thread(*events: str) -> str:
    """Lines of perf script -F time,event,trace: "a1" enters with gpa 1, "a" returns."""
    return "".join(
        f"  1.{at:06}:  probe:tdh_mem_page_{'aug' if e[0] == 'a' else 'remove'}"
        + (f": (ffffffffc0a01000) td=0x10 gpa=0x{e[1]}000 level=0\n" if e[1:] else "__return: ")
        + ("" if e[1:] else f"(ffffffffc0a01000 <- ffffffffc0a02000) ret={at:#x}\n")
        for at, e in enumerate(events, 1)
    )


@pytest.mark.parametrize(
    ("events", "pairs"),
    [
        ("a1 a", {(1, 2)}),
        ("a1 a a2 a", {(1, 2), (2, 4)}),
        # Those of other functions are not mistaken for each other.
        ("a1 r2 a r", {(1, 3), (2, 4)}),
        ("a1 a2 a a", set()),
        ("a1 a2 a a3 a a", set()),
        # As many returned as had begun: what begins now is alone again.
        ("a1 a2 a a a3 a", {(3, 6)}),
        # One never returned: whose return this is cannot be told.
        ("a1 a2 a a3 a", set()),
    ],
)
def test_what_could_be_paired_two_ways_is_left_open(
    events: str, pairs: set[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tdxtrace.ingest.decode import decoder

    for size in (1, 2, 3, 1 << 15):
        monkeypatch.setattr(decoder, "BATCH_EVENTS", size)
        calls = read_text(no_thread(*events.split())).seamcalls
        whole = calls.drop_nulls(["start_ns", "end_ns"]).select("gpa", "status").rows()
        assert {(gpa >> 12, status) for gpa, status in whole} == pairs
        n_ends = 2 * calls.height - calls["start_ns"].null_count() - calls["end_ns"].null_count()
        assert n_ends == len(events.split())


def test_steps_between_events_are_refused() -> None:
    text = (LINES / "perf-script-deltatime.txt").read_text()
    assert "perf script --deltatime" in refused(text)
    # From the middle of such a text on.
    assert "--deltatime" in refused("".join(text.splitlines(keepends=True)[1:]))


def test_times_since_the_first_event_are_read_and_named() -> None:
    text = (LINES / "report-ts-diff.txt").read_text()
    for stamp, n in (("1.000100", 0), ("1.000103", 3), ("1.000105", 5), ("1.000109", 9)):
        text = text.replace(stamp, f"0.{n:06}")
    trace = read_text(text)
    assert trace.provenance.sources[0].clock == "relative"
    assert "times count from the first event" in trace.provenance.notes[0]
    assert trace.seamcalls["end_ns"].to_list() == [3000, 9000]


def test_events_in_another_order_are_no_steps() -> None:
    lines = (LINES / "perf-script-misc-column.txt").read_text().splitlines(keepends=True)
    trace = read_text("".join(reversed(lines)))
    assert trace.seamcalls["start_ns"].drop_nulls().min() == 1_000_100_000


def of_threads(*names: str) -> str:
    return "".join(
        f"{name:>16} 14399 [00{n % 2}]  1.0001{n:02}: {EVENT}\n" for n, name in enumerate(names)
    )


def test_processes_in_place_of_threads_are_refused() -> None:
    assert "-F +tid" in refused(of_threads(*["CPU 0/KVM", "CPU 1/KVM"] * 3))
    assert "-F +tid" in refused(of_threads(*["CPU 0/KVM", "CPU 1/KVM", "qemu"] * 3))


def test_a_cpu_without_brackets_is_no_process() -> None:
    """perf script -L -F -tid: only the CPU is before the time."""
    text = "".join(f"CPU {n % 2}/KV   1  1.0001{n:02}: {EVENT}\n" for n in range(8))
    trace = read_text(text)
    assert trace.seamcalls["cpu"].unique().to_list() == [1]
    assert trace.seamcalls["tid"].null_count() == 8


@pytest.mark.parametrize(
    "names",
    [
        ["qemu-system-x86"] * 5 + ["CPU 0/KVM"] * 5,
        ["perf-exec"] * 4 + ["qemu-system-x86"] * 5 + ["CPU 0/KVM"] * 5,
        # A name that is damaged on some lines.
        ["CPU 0/KVM", "CPU", "CPU 0/KVM", "C?U 0/KVM", "CPU 0/KVM", "CPU"],
    ],
)
def test_a_thread_may_have_several_names(names: list[str]) -> None:
    assert read_text(of_threads(*names)).seamcalls.height == len(names)


def test_a_thread_may_be_renamed() -> None:
    text = "".join(
        f"{name:>16} 14399 [001]  1.00010{n}: {EVENT}\n"
        for n, name in enumerate(("qemu-system-x86", "CPU 0/KVM"))
    )
    assert read_text(text).threads["comm"].to_list() == ["CPU 0/KVM", "qemu-system-x86"]


# Columns of trace-cmd report.


def test_steps_beside_the_times_are_passed_over() -> None:
    trace = read("report-ts-diff.txt")
    chains = tdxtrace.analyze(trace).retry_chains
    assert chains.select("n_attempts", "outcome").rows() == [(2, "succeeded")]
    assert lost(trace) == {}


@pytest.mark.parametrize(
    ("line", "place", "stamp"),
    [
        ("rig: fake_tdx-17916   0dNHff  4242.006741: ", ("fake_tdx", 17916, 0), (4242, "006741")),
        (
            "rig: fake_tdx-17916   0dNHff4242006741251: ",
            ("fake_tdx", 17916, 0),
            (4242006741251, ""),
        ),
        ("fake_tdx-17916   0d..1.4242006741251: ", ("fake_tdx", 17916, 0), (4242006741251, "")),
        (
            "fake_tdx-17916   0dNHff  4242.006744: (+3)     ",
            ("fake_tdx", 17916, 0),
            (4242, "006744"),
        ),
        (
            " CPU 0/KVM-17916 [002]4242006741251: (+12) ",
            ("CPU 0/KVM", 17916, 2),
            (4242006741251, ""),
        ),
    ],
)
def test_columns_of_trace_cmd_report(
    line: str, place: tuple[object, ...], stamp: tuple[int, str]
) -> None:
    made = read_prefix(f"{line}tdh_vp_enter_enter: (55d8f3965f40) vp=0x1", formats_of("ftrace"))
    assert made is not None
    assert (made.comm, made.tid, made.cpu, made.ts) == (*place, stamp)
    assert made.event == "tdh_vp_enter_enter"


# Other tools, other hosts.


def test_probes_are_known_by_the_function_in_the_brackets() -> None:
    trace = read("foreign-probes.txt")
    assert trace.seamcalls.select("leaf", "status").rows() == [(6, 0x8000_0200_0000_0001), (6, 0)]
    assert lost(trace) == {"noise": 3}


@pytest.mark.parametrize("suffix", [".isra.0", ".constprop.0", ".part.12", ""])
def test_what_a_compiler_appends_to_a_name_is_left_out(suffix: str) -> None:
    text = (LINES / "foreign-probes.txt").read_text()
    trace = read_text(text.replace("tdh_mem_page_aug+", f"tdh_mem_page_aug{suffix}+"))
    assert trace.seamcalls.height == 2


def test_a_wrapper_of_another_kernel_can_be_mapped() -> None:
    line = " qemu-100   [015] ..... 95922.997057: mine: ({}+0x0/0x70) si=0x18b082000\n"
    text = (LINES / "foreign-probes.txt").read_text()
    for function, kind in (
        ("tdh_new_call", "unmapped"),
        ("seamcall_new", "unmapped"),
        ("f", "noise"),
    ):
        assert lost(read_text(text + line.format(function)))[kind] == 1 + 3 * (kind == "noise")


def test_an_arm_host_is_named() -> None:
    assert "of an ARM host" in refused((LINES / "arm.txt").read_text())


def test_an_exit_reason_that_is_not_known_keeps_its_name() -> None:
    """KVM of AMD has reasons of its own, here beside a SEAMCALL of another host."""
    trace = read_text((LINES / "svm-exit-names.txt").read_text() + ONE_CALL)
    assert trace.vm_entries.select("exit_reason", "start_ns", "end_ns").rows() == [
        (None, 1_000_001_000, 1_000_004_000)
    ]
    result = trace.losses.select("kind", "severity", "n_events", "n_lines", "detail").rows()
    assert result == [("undecoded", "error", 1, 0, "exit reason EXIT_NPF (AMD, not Intel)")]


def test_a_trace_of_an_amd_host_is_refused() -> None:
    said = refused((LINES / "svm-exit-names.txt").read_text())
    assert "AMD host; TDX is an Intel feature" in said
    assert "kvm_entry, kvm_exit would be read there" in said


def test_exit_reasons_that_are_not_known_are_counted_in_every_line() -> None:
    pair = (LINES / "svm-exit-names.txt").read_text()
    lines = [pair.replace("1.0000", f"1.{n:04}") for n in range(1, 400)]
    for run in ("interpreted", "compiled"):
        from support.ways import blocks_of

        from tdxtrace import compiler
        from tdxtrace.ingest.events.registry import EventRegistry
        from tdxtrace.ingest.stats import SourceStats
        from tdxtrace.ingest.text.reader import LineReader, TextReader

        reader = LineReader("ftrace", EventRegistry(), SourceStats())
        texts = "".join(lines).encode().split(b"\n")[:-1]
        for _ in TextReader(reader).batches(blocks_of(texts, (100,)), getattr(compiler, run)):
            pass
        result = reader.stats.losses(0).filter(kind="undecoded")["n_events"].to_list()
        assert result == [399]


def test_the_number_of_a_reason_without_a_name_is_its_number() -> None:
    text = (LINES / "svm-exit-names.txt").read_text()
    trace = read_text(text.replace("EXIT_NPF", "UNKNOWN (77)"))
    assert trace.vm_entries["exit_reason"].to_list() == [77]
    assert lost(trace) == {}


# Tracepoints out of tree.

SEAM = """\
 qemu-100 [015] ..... 5.000001: seamcall_enter: {0}op: {1} 80000001 12000 13000 0 0 0
 qemu-100 [015] ..... 5.000003: seamcall_exit: {0}op: {1} err: {2}({3}) 807 401 0 0 0 0
"""


@pytest.mark.parametrize("cpu", ["", "cpuid: 15 "])
@pytest.mark.parametrize("group", ["", "seam:"])
def test_the_tracepoints_of_seam(cpu: str, group: str) -> None:
    text = SEAM.format(cpu, "TDH_MEM_PAGE_AUG", "TDX_OPERAND_BUSY", "8000020000000092")
    trace = read_text(text.replace("seamcall_", f"{group}seamcall_"))
    assert trace.seamcalls.select("leaf", "status", "gpa", "level", "ext_err1").rows() == [
        (6, BUSY, 0x8000_0000, 1, 0x807)
    ]
    assert trace.seamcalls["probe"].to_list() == ["tracepoint"]


def test_calls_of_the_loader_are_no_calls_of_the_module() -> None:
    busy = SEAM.format("", "TDH_MEM_PAGE_AUG", "", "0")
    for number, name in enumerate(("SEAMLDR_INFO", "SEAMLDR_INSTALL", "P_SEAMLDR_SHUTDOWN")):
        trace = read_text(busy + SEAM.format("cpuid: 1 ", name, "", "0").replace(" 5.", " 6."))
        assert trace.seamcalls["leaf"].to_list() == [6]
        assert trace.losses.is_empty()
        trace.check()
        assert tdxtrace.analyze(trace).retry_chains.height == 1
        columns = ("loader_leaf", "start_ns", "end_ns", "cpu", "tid", "status", "n_lines")
        assert trace.loader_calls.select(columns).rows() == [
            (number, 6_000_001_000, 6_000_003_000, 15, 100, 0, 2)
        ]


def test_a_probe_may_have_the_name_of_a_tracepoint() -> None:
    text = """\
 qemu-100 [015] ..... 5.000001: seamcall_enter: (__seamcall_ret+0x0/0x70) fn=0x6 rcx=0x80000001
 qemu-100 [015] ..... 5.000003: seamcall_exit: (tdh_vp_rd+0x9b/0xa0 <- __seamcall_ret) ret=0x0
"""
    trace = read_text(text)
    assert trace.seamcalls.select("leaf", "probe", "status").rows() == [(6, "seamcall", 0)]
