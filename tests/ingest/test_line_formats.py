"""One line of each format that tools print, and its prefix.

The numbers are those of the collection the shapes were taken from.
"""

from __future__ import annotations

import pytest

from tdxtrace.ingest.batch import UNKNOWN
from tdxtrace.ingest.text import line_formats
from tdxtrace.ingest.text.line_formats import LINE_FORMATS, LinePrefix, formats_of, read_prefix


def head_of(line: str, form: str = "ftrace") -> LinePrefix | None:
    return read_prefix(line, formats_of(form))


def read(line: str, form: str = "ftrace") -> LinePrefix:
    head = head_of(line, form)
    assert head is not None, f"no {form} line: {line!r}"
    assert line.endswith(head.args)
    return head


Place = tuple[str, int, int, int, str, tuple[int, str]]
NO = UNKNOWN


def place(head: LinePrefix) -> Place:
    return head.comm, head.tid, head.tgid, head.cpu, head.flags, head.ts


@pytest.mark.parametrize(
    ("line", "expected", "event", "args"),
    [
        pytest.param(
            "    kvm-5664  [000] 11906.220181: kvm_exit: reason apic_access rip 0xc011518c",
            ("kvm", 5664, NO, 0, "", (11906, "220181")),
            "kvm_exit",
            "reason apic_access rip 0xc011518c",
            id="1 no flags",
        ),
        pytest.param(
            "           a.out-20024 [001] .... 2323301.154940: kvm_exit: reason EXCEPTION_NMI",
            ("a.out", 20024, NO, 1, "....", (2323301, "154940")),
            "kvm_exit",
            "reason EXCEPTION_NMI",
            id="2 four flags",
        ),
        pytest.param(
            "<...>-35787 [038] ....  2825.959082: kvm_exit: vcpu 1 reason npf rip 0xfd11d",
            ("<...>", 35787, NO, 38, "....", (2825, "959082")),
            "kvm_exit",
            "vcpu 1 reason npf rip 0xfd11d",
            id="3 unknown name",
        ),
        pytest.param(
            "           repro-1289    [019] d....   140.314704: kvm_exit: vcpu 0 reason HLT rip 0",
            ("repro", 1289, NO, 19, "d....", (140, "314704")),
            "kvm_exit",
            "vcpu 0 reason HLT rip 0",
            id="4 five flags",
        ),
        pytest.param(
            "CPU-1365880 [038] 5559771.610942: kvm_exit:             reason EPT_VIOLATION rip 0x1",
            ("CPU", 1365880, NO, 38, "", (5559771, "610942")),
            "kvm_exit",
            "reason EPT_VIOLATION rip 0x1",
            id="5 padded event",
        ),
        pytest.param(
            "           <...>-315119 [010]  3733.092646: kvm_nested_vmexit:    CAN'T FIND FIELD "
            '"rip"<CANT FIND FIELD exit_code>vcpu 0 reason npf rip 0x400433',
            ("<...>", 315119, NO, 10, "", (3733, "092646")),
            "kvm_nested_vmexit",
            'CAN\'T FIND FIELD "rip"<CANT FIND FIELD exit_code>vcpu 0 reason npf rip 0x400433',
            id="8 plugin error",
        ),
        pytest.param(
            "<...>-1946910 [226] ...1. 324797.313982: kvm_page_fault: vcpu 219 rip 0x0 address 0x0",
            ("<...>", 1946910, NO, 226, "...1.", (324797, "313982")),
            "kvm_page_fault",
            "vcpu 219 rip 0x0 address 0x0",
            id="9 CPU above 99, seven digits",
        ),
        pytest.param(
            "       CPU 5/KVM-4145    [002] .....    86.581928: kvm_page_fault: vcpu 5",
            ("CPU 5/KVM", 4145, NO, 2, ".....", (86, "581928")),
            "kvm_page_fault",
            "vcpu 5",
            id="10 blank and slash",
        ),
        pytest.param(
            " apic_bus_clock_-11419   [056] d..2.   146.771179: kvm_hypercall: nr 0x2c8a a3 0x7  ",
            ("apic_bus_clock_", 11419, NO, 56, "d..2.", (146, "771179")),
            "kvm_hypercall",
            "nr 0x2c8a a3 0x7  ",
            id="10 name that ends in _, blanks at the end",
        ),
        pytest.param(
            " IntentService[E-1234  [000] d..3  10.000001: sched_wakeup: comm=x",
            ("IntentService[E", 1234, NO, 0, "d..3", (10, "000001")),
            "sched_wakeup",
            "comm=x",
            id="10 bracket in the name",
        ),
        pytest.param(
            "    jbd2/xvda1-8-123     [003] ....  10.000001: ext4_sync: x",
            ("jbd2/xvda1-8", 123, NO, 3, "....", (10, "000001")),
            "ext4_sync",
            "x",
            id="10 name that ends in a number",
        ),
        pytest.param(
            "       kvm-vcpu-0-88776   [001] ...1.  6076.581774: kvm_exit: TRAP",
            ("kvm-vcpu-0", 88776, NO, 1, "...1.", (6076, "581774")),
            "kvm_exit",
            "TRAP",
            id="10 name that ends in a digit after a dash",
        ),
        pytest.param(
            "          <7952>-7952  [000] ....  10.000001: sys_enter: NR 1",
            ("<7952>", 7952, NO, 0, "....", (10, "000001")),
            "sys_enter",
            "NR 1",
            id="10 tid for a name",
        ),
        pytest.param(
            "  a-1 [000] 1.0:-77      [001] .....  10.000001: sys_enter: NR 1",
            ("a-1 [000] 1.0:", 77, NO, 1, ".....", (10, "000001")),
            "sys_enter",
            "NR 1",
            id="10 name that looks like the rest of a line",
        ),
        pytest.param(
            "    a-1 [0] 1: b-77      [001] .....  10.000001: sys_enter: NR 1",
            ("a-1 [0] 1: b", 77, NO, 1, ".....", (10, "000001")),
            "sys_enter",
            "NR 1",
            id="10 name that looks like a whole line",
        ),
        pytest.param(
            "com.android.systemui-611   (  611) [001] d..5 514769.086090: sched_wakeup: comm=a",
            ("com.android.systemui", 611, 611, 1, "d..5", (514769, "086090")),
            "sched_wakeup",
            "comm=a",
            id="11 tgid, long name",
        ),
        pytest.param(
            "          <idle>-0     (-----) [000] d..3 514769.086090: cpu_idle: state=1",
            ("<idle>", 0, NO, 0, "d..3", (514769, "086090")),
            "cpu_idle",
            "state=1",
            id="11 unknown tgid",
        ),
        pytest.param(
            "            fake-23523   (  23520) [001] DBZff  1166.017536: aug_in: (0x1) gpa=0x1",
            ("fake", 23523, 23520, 1, "DBZff", (1166, "017536")),
            "aug_in",
            "(0x1) gpa=0x1",
            id="11 tgid, flags all set",
        ),
        pytest.param(
            "rig:         fake_tdx-17916 [000]  4242.006741: tdh_vp_enter_enter:   (55d8f3965f40)",
            ("fake_tdx", 17916, NO, 0, "", (4242, "006741")),
            "tdh_vp_enter_enter",
            "(55d8f3965f40)",
            id="13 instance before the name",
        ),
        pytest.param(
            "        fake_tdx-15053 [000] d..1.  4217.194507978: tdh_vp_enter_enter: (1)",
            ("fake_tdx", 15053, NO, 0, "d..1.", (4217, "194507978")),
            "tdh_vp_enter_enter",
            "(1)",
            id="13 nine decimals, newer trace-cmd with flags",
        ),
        pytest.param(
            "   kworker/0:1-15    [000]   10.000001: thermal_power_cpu_get_power: "
            "[FAILED TO PARSE] cpumask=ARRAY[0f, 00] freq=0x82208",
            ("kworker/0:1", 15, NO, 0, "", (10, "000001")),
            "thermal_power_cpu_get_power",
            "[FAILED TO PARSE] cpumask=ARRAY[0f, 00] freq=0x82208",
            id="14 failed to parse",
        ),
        pytest.param(
            "           xfwm4-3252  [005] ....   395.705675: sys_recvmsg -> 0x24",
            ("xfwm4", 3252, NO, 5, "....", (395, "705675")),
            "",
            "sys_recvmsg -> 0x24",
            id="16 no event name",
        ),
        pytest.param(
            "             cat-2212    [000] d.h..   369.060000: arch_local_irq_restore <-generic",
            ("cat", 2212, NO, 0, "d.h..", (369, "060000")),
            "",
            "arch_local_irq_restore <-generic",
            id="16 function tracer",
        ),
        pytest.param(
            " qemu-system-x86-18971   [015] ..... 95922.997052: p_track_0: "
            "(track_root+0x0/0x70 [kvm]) si=0x18b082000",
            ("qemu-system-x86", 18971, NO, 15, ".....", (95922, "997052")),
            "p_track_0",
            "(track_root+0x0/0x70 [kvm]) si=0x18b082000",
            id="17 kprobe",
        ),
        pytest.param(
            "           CPU 0/KVM-7289    [023] d....  2925.640963: <hack>: Set DRs, DR6 = 0x1",
            ("CPU 0/KVM", 7289, NO, 23, "d....", (2925, "640963")),
            "<hack>",
            "Set DRs, DR6 = 0x1",
            id="17 event in angle brackets",
        ),
        pytest.param(
            "   hwc_eventmon-336   [000] 50260.929925: 0: C|124|VSYNC|1\\n\\",
            ("hwc_eventmon", 336, NO, 0, "", (50260, "929925")),
            "0",
            "C|124|VSYNC|1\\n\\",
            id="20 systrace",
        ),
        pytest.param(
            "        fake_tdx-15053 [000]4217194507978: tdh_vp_enter_enter:   (559401456f40)",
            ("fake_tdx", 15053, NO, 0, "", (4217194507978, "")),
            "tdh_vp_enter_enter",
            "(559401456f40)",
            id="22 integer clock, no blank",
        ),
        pytest.param(
            "        fake_tdx-15053   [000] DBZff 9914215: aug_in: (0x1)",
            ("fake_tdx", 15053, NO, 0, "DBZff", (9914215, "")),
            "aug_in",
            "(0x1)",
            id="22 jiffies or a counter",
        ),
    ],
)
def test_lines_of_tracefs_and_trace_cmd(line: str, expected: Place, event: str, args: str) -> None:
    head = read(line)
    assert place(head) == expected
    assert (head.event, head.args) == (event, args)
    # Whatever the file looks like otherwise, such a line is understood.
    for form in ("ftrace-latency", "ftrace-verbose"):
        other = read(line, form)
        assert (other.tid, other.ts, other.event) == (head.tid, head.ts, head.event)


@pytest.mark.parametrize(
    ("line", "expected", "event"),
    [
        pytest.param(
            "  ps-6143    2d..1  259us+: sched_switch: prev",
            ("ps", 6143, NO, 2, "d..1", (0, "000259")),
            "sched_switch",
            id="18 four flags and a mark",
        ),
        pytest.param(
            "    fake-23548     1DBZff 29678us+: aug_in: (0x1)",
            ("fake", 23548, NO, 1, "DBZff", (0, "029678")),
            "aug_in",
            id="18 five flags",
        ),
        pytest.param(
            " kvmmini-23549     0..... 3189123us : kvm_fpu: unload",
            ("kvmmini", 23549, NO, 0, ".....", (3, "189123")),
            "kvm_fpu",
            id="18 no mark, more than a second",
        ),
        pytest.param(
            "CPU 3/K-23549     12d..1. 31891us!: kvm_fpu: unload",
            ("CPU 3/K", 23549, NO, 12, "d..1.", (0, "031891")),
            "kvm_fpu",
            id="18 two digits of CPU",
        ),
        pytest.param(
            "fake_tdx-15053   0dNHff  4217.194508: tdh_vp_enter_enter:   (559401456f40)",
            ("fake_tdx", 15053, NO, 0, "dNHff", (4217, "194508")),
            "tdh_vp_enter_enter",
            id="18 trace-cmd report -l",
        ),
        pytest.param(
            "     kvmlong-12327   0.N...   818.436519: kvm_emulate_insn:     0:100c: ba",
            ("kvmlong", 12327, NO, 0, ".N...", (818, "436519")),
            "kvm_emulate_insn",
            id="18 trace-cmd report -l, padded",
        ),
    ],
)
def test_lines_in_latency_format(line: str, expected: Place, event: str) -> None:
    for form in ("ftrace-latency", "ftrace"):
        head = read(line, form)
        assert place(head) == expected
        assert head.event == event


def test_lines_in_verbose_latency_format() -> None:
    head = read(
        "            fake   23687   1 255 0000000f 00000000 [458dddec] 20.855ms (+0.029ms): "
        "aug_in: (0x1) gpa=0x1",
        "ftrace-verbose",
    )
    assert place(head) == ("fake", 23687, NO, 1, "", (0, "020855"))
    assert (head.event, head.args) == ("aug_in", "(0x1) gpa=0x1")


def test_a_verbose_stamp_of_more_than_a_second_is_carried() -> None:
    head = read(
        "       CPU 0/KVM   23687   1 255 0000000f 00000000 [458dddec] 4020.855ms (+0.029ms): "
        "aug_in: (0x1)",
        "ftrace-verbose",
    )
    assert (head.comm, head.ts) == ("CPU 0/KVM", (4, "020855"))


@pytest.mark.parametrize(
    ("line", "expected", "event", "args"),
    [
        pytest.param(
            "            fake 24368 [000]  1200.525555:         tdxdemo:aug_in: (55a5) gpa=0x1",
            ("fake", 24368, NO, 0, "", (1200, "525555")),
            "tdxdemo:aug_in",
            "(55a5) gpa=0x1",
            id="23 default",
        ),
        pytest.param(
            "       CPU 0/KVM 14401 [000]  4212.604083:  tdx:tdh_vp_enter_enter: (5619af003f40)",
            ("CPU 0/KVM", 14401, NO, 0, "", (4212, "604083")),
            "tdx:tdh_vp_enter_enter",
            "(5619af003f40)",
            id="23 name with a blank",
        ),
        pytest.param(
            "       fc_vcpu 1  599500 [039] 1377662.550600: kvm:kvm_entry:  vcpu 1 rip 0x1",
            ("fc_vcpu 1", 599500, NO, 39, "", (1377662, "550600")),
            "kvm:kvm_entry",
            "vcpu 1 rip 0x1",
            id="23 name with a blank and a number",
        ),
        pytest.param(
            "            iperf 27409/28744 [000] 441995.133575: kvm:kvm_entry: vcpu 0",
            ("iperf", 28744, 27409, 0, "", (441995, "133575")),
            "kvm:kvm_entry",
            "vcpu 0",
            id="23 pid and tid",
        ),
        pytest.param(
            "        fake_tdx 16344 [000]  4226.573803602:   tdx:tdh_vp_enter_enter: (5646)",
            ("fake_tdx", 16344, NO, 0, "", (4226, "573803602")),
            "tdx:tdh_vp_enter_enter",
            "(5646)",
            id="23 --ns",
        ),
        pytest.param(
            "    [001]   770.850287:                      kvm:kvm_entry: vcpu 0, rip 0x100146",
            ("", NO, NO, 1, "", (770, "850287")),
            "kvm:kvm_entry",
            "vcpu 0, rip 0x100146",
            id="23 no comm, no tid",
        ),
        pytest.param(
            "preempt_test 20530.456691:     kvm:kvm_entry: vcpu 0, rip 0x4131a3",
            ("preempt_test", NO, NO, NO, "", (20530, "456691")),
            "kvm:kvm_entry",
            "vcpu 0, rip 0x4131a3",
            id="23 no tid, no CPU",
        ),
        pytest.param(
            ":17006 17006 [002] 10.000001: kvm:kvm_entry: vcpu 0",
            (":17006", 17006, NO, 2, "", (10, "000001")),
            "kvm:kvm_entry",
            "vcpu 0",
            id="10 number for a name",
        ),
        pytest.param(
            "swapper     0 [001]  10.000001:       1 kvm:kvm_entry: vcpu 0",
            ("swapper", 0, NO, 1, "", (10, "000001")),
            "kvm:kvm_entry",
            "vcpu 0",
            id="23 with a period",
        ),
        pytest.param(
            "CPU 0/KVM\t14401\t[000]\t4212.604083:\tkvm:kvm_entry:\tvcpu 0",
            ("CPU 0/KVM", 14401, NO, 0, "", (4212, "604083")),
            "kvm:kvm_entry",
            "vcpu 0",
            id="25 tabs",
        ),
        pytest.param(
            "2021-12-12 16:11:10.214139            <...> 206966 .N.. [017] 15504452.408994: "
            "kvm:kvm_exit: reason EXTERNAL_INTERRUPT rip 0x1",
            ("<...>", 206966, NO, 17, ".N..", (15504452, "408994")),
            "kvm:kvm_exit",
            "reason EXTERNAL_INTERRUPT rip 0x1",
            id="21 wall clock first, flags before the CPU",
        ),
    ],
)
def test_lines_of_perf_script(line: str, expected: Place, event: str, args: str) -> None:
    for form in ("perf-script", "ftrace"):
        head = read(line, form)
        assert place(head) == expected
        assert (head.event, head.args) == (event, args)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("CPU:0 [LOST EVENTS]", (0, None)),
        ("CPU:3 [LOST 1885 EVENTS]", (3, 1885)),
        ("CPU:7 [204600 EVENTS DROPPED]", (7, 204600)),
        ("CPU:7 [EVENTS DROPPED]", (7, None)),
        ("rig: CPU:0 [219 EVENTS DROPPED]", (0, 219)),
        ("  CPU:0 [LOST 5 EVENTS]  ", (0, 5)),
        ("CPU:226 [LOST 5 EVENTS]", (226, 5)),
    ],
)
def test_markers_of_lost_events(line: str, expected: tuple[int, int | None]) -> None:
    lost = line_formats.lost_of(line)
    assert lost is not None
    assert (lost.cpu, lost.n_events) == expected


@pytest.mark.parametrize(
    "line", ["", "LOST EVENTS", "CPU 3 is empty", "CPU:x [LOST EVENTS]", "CPU:0 [LOST EVENTS] and"]
)
def test_what_is_no_marker(line: str) -> None:
    assert line_formats.lost_of(line) is None


@pytest.mark.parametrize(
    ("line", "n"),
    [
        ("            fake 24454 [000]  1203.336878: PERF_RECORD_LOST lost 489", 489),
        ("            fake 24454 [000]  1203.336878: PERF_RECORD_LOST_SAMPLES lost 7", 7),
    ],
)
def test_perfs_marker_looks_like_an_event(line: str, n: int) -> None:
    lost = line_formats.perf_lost_of(read(line, "perf-script"))
    assert lost is not None
    assert (lost.cpu, lost.n_events) == (0, n)


def test_an_event_that_speaks_of_losses_is_no_marker() -> None:
    head = read("fake 24454 [000]  1203.336878: app:note: PERF_RECORD_LOST lost 489", "perf-script")
    assert line_formats.perf_lost_of(head) is None


@pytest.mark.parametrize(
    "line",
    [
        "",
        "   ",
        "# tracer: nop",
        "#",
        "##### CPU 2 buffer started ####",
        "cpus=6",
        "version = 6",
        "CPU 3 is empty",
        "trace-cmd version 3.2.0",
        "# ========",
        "# captured on    : Sun Nov 22 09:21:03 2026",
    ],
)
def test_lines_that_describe_the_recording(line: str) -> None:
    assert line_formats.HEADER.match(line)
    assert head_of(line) is None


@pytest.mark.parametrize(
    "line",
    [
        "\tffffffff8106 tdh_mem_page_aug+0x4 ([kernel.kallsyms])",
        "            7f3b1c2d3e4f main+0x1f (/usr/bin/prog)",
        " => entry_SYSCALL_64_after_hwframe",
        "    5646b46b4f40 tdh_vp_enter",
        "              sh-1-5d..2  11us : <stack trace>",
    ],
)
def test_lines_of_a_callchain(line: str) -> None:
    assert line_formats.CALLCHAIN.match(line)


@pytest.mark.parametrize(
    "line",
    [
        " gid=4",
        "[    7.592823] tdx: SEAMCALL failed: CPU 94: leaf 33, error 0xc000092100000122.",
        "SEAMCALL (0x000000000000001c) failed: 0xc000030000000001 RCX 0x0",
        "challenge-24797 [003] .... 83184.290416 kvm_exit",
        "func_ab 15294 cpu-clock:",
        "15268@1647341556.924605:kvm_run_exit cpu_index 0, reason 2",
        "-",
        "-1 [0] 1",
    ],
)
def test_lines_that_are_no_events(line: str) -> None:
    for row in LINE_FORMATS:
        assert head_of(line, row.name) is None


@pytest.mark.parametrize("digits", [6, 9])
def test_decimals_are_kept_as_digits(digits: int) -> None:
    frac = "7" * digits
    assert read(f"     a-1 [000]  10.{frac}: x: y").ts == (10, frac)


@pytest.mark.parametrize(
    ("line", "event"),
    [
        ("a-1 [000] 1.000001: kvm:kvm_entry: vcpu 0", "kvm:kvm_entry"),
        ("a-1 [000] 1.000001: x:", "x"),
        ("a-1 [000] 1.000001: kvm_entry:vcpu 0", ""),
        ("a-1 [000] 1.000001: tdx.core-x: y", "tdx.core-x"),
    ],
)
def test_an_events_name_may_hold_its_group(line: str, event: str) -> None:
    assert read(line).event == event


def test_quotation_marks_of_mail_are_known() -> None:
    assert line_formats.QUOTE.sub("", "> > a-1 [000] 1.000001: x: y") == "a-1 [000] 1.000001: x: y"
