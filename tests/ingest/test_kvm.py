"""KVM's own tracepoints, in every layout that a kernel or a plugin prints."""

from __future__ import annotations

from typing import Any

import pytest
from support.texts import ONE_CALL, is_accounted_for, line, lost, read_text

from tdxtrace.ingest.events.fields import KVM_DECODERS
from tdxtrace.tables.trace import Trace

NOT_ENTERED = 0xFFFF_FFFF


def read(*events: str, **place: Any) -> Trace:  # noqa: ANN401
    text = "".join(line(f"1.{n:06}", event, **place) for n, event in enumerate(events, 1))
    trace = read_text(text)
    trace.check()
    assert is_accounted_for(trace)
    return trace


def exit_of(args: str) -> dict[str, Any]:
    row = read(f"kvm_exit: {args}").vm_entries.row(0, named=True)
    names = ("vcpu_id", "exit_reason", "info1", "info2", "intr_info", "error_code", "rip")
    return {name: row[name] for name in (*names, "requests") if row[name] is not None}


NO_INFO = "info1 0x0000000000000000 info2 0x0000000000000000 intr_info 0x00000000"


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        pytest.param(
            "reason apic_access rip 0xc011518c",
            {"exit_reason": 44, "rip": 0xC011_518C},
            id="2.6.3x",
        ),
        pytest.param(
            "reason EXCEPTION_NMI rip 0x1000 info 1000 80000b0e",
            {"exit_reason": 0, "rip": 0x1000, "info1": 0x1000, "intr_info": 0x8000_0B0E},
            id="3.x bare hex",
        ),
        pytest.param(
            "reason EPT_VIOLATION rip 0x40359f info 582 0",
            {"exit_reason": 48, "rip": 0x40359F, "info1": 0x582, "intr_info": 0},
            id="4.x",
        ),
        pytest.param(
            "reason PREEMPTION_TIMER rip 0x40274d info 0 0 intr 0",
            {"exit_reason": 52, "rip": 0x40274D, "info1": 0, "intr_info": 0},
            id="with intr",
        ),
        pytest.param(
            "vcpu 1 reason EPT_VIOLATION rip 0xfd11d info 181 80000301",
            {
                "vcpu_id": 1,
                "exit_reason": 48,
                "rip": 0xFD11D,
                "info1": 0x181,
                "intr_info": 0x8000_0301,
            },
            id="5.8",
        ),
        pytest.param(
            "vcpu 0 reason EPT_VIOLATION rip 0x1 info1 0x0000000000000181 "
            "info2 0x0000000080000301 intr_info 0x80000306 error_code 0x00000005",
            {
                "vcpu_id": 0,
                "exit_reason": 48,
                "rip": 1,
                "info1": 0x181,
                "info2": 0x8000_0301,
                "intr_info": 0x8000_0306,
                "error_code": 5,
            },
            id="5.10",
        ),
        pytest.param(
            f"vcpu 3 reason EPT_VIOLATION rip 0x0 {NO_INFO} error_code 0x00000000 "
            "requests 0x0000000000000004",
            {
                "vcpu_id": 3,
                "exit_reason": 48,
                "rip": 0,
                "info1": 0,
                "info2": 0,
                "intr_info": 0,
                "error_code": 0,
                "requests": 4,
            },
            id="6.14",
        ),
        pytest.param(
            f"vcpu 3 reason 0xffff FAILED_VMENTRY 0x7fff0000 rip 0x0 {NO_INFO}",
            {
                "vcpu_id": 3,
                "exit_reason": NOT_ENTERED,
                "rip": 0,
                "info1": 0,
                "info2": 0,
                "intr_info": 0,
            },
            id="refused",
        ),
        pytest.param(
            "vcpu 3 reason INVALID_STATE FAILED_VMENTRY rip 0x0",
            {"vcpu_id": 3, "exit_reason": 0x8000_0021, "rip": 0},
            id="failed otherwise",
        ),
        pytest.param(
            "vcpu 3 reason TDCALL rip 0x0", {"vcpu_id": 3, "exit_reason": 77, "rip": 0}, id="TDCALL"
        ),
        pytest.param(
            "reason UNKNOWN (4294967295) rip 0x0 info 0 0",
            {"exit_reason": NOT_ENTERED, "rip": 0, "info1": 0, "intr_info": 0},
            id="plugin, refused",
        ),
        pytest.param(
            "reason UNKNOWN (77) rip 0x0 info 1 2",
            {"exit_reason": 77, "rip": 0, "info1": 1, "intr_info": 2},
            id="plugin, TDCALL",
        ),
        pytest.param(
            "reason UNKNOWN (2147483681) rip 0x0 info 0 0",
            {"exit_reason": 0x8000_0021, "rip": 0, "info1": 0, "intr_info": 0},
            id="plugin, failed otherwise",
        ),
        pytest.param(
            "exit_reason=4294967295 guest_rip=0x0 isa=1 info1=0x0000000000000000 "
            "info2=0x0000000000000000 intr_info=0x00000000 error_code=0x00000000 vcpu_id=3 "
            "requests=0x0000000000000001",
            {
                "vcpu_id": 3,
                "exit_reason": NOT_ENTERED,
                "rip": 0,
                "info1": 0,
                "info2": 0,
                "intr_info": 0,
                "error_code": 0,
                "requests": 1,
            },
            id="trace-cmd -R",
        ),
        pytest.param(
            "exit_reason=48 guest_rip=0x isa=1 info1=0x2 info2=0x intr_info=0x error_code=0x "
            "vcpu_id=2 requests=0x",
            {
                "vcpu_id": 2,
                "exit_reason": 48,
                "info1": 2,
                "info2": 0,
                "intr_info": 0,
                "error_code": 0,
                "requests": 0,
            },
            id="trace-cmd -R, zero as nothing",
        ),
        pytest.param(
            "vcpu 0 reason EXTERNAL_INTERRUPT intr_info 0x800000ec",
            {"vcpu_id": 0, "exit_reason": 1, "intr_info": 0x8000_00EC},
            id="fields left out by hand",
        ),
        pytest.param(
            "vcpu 23 reason VMREAD", {"vcpu_id": 23, "exit_reason": 23}, id="all left out by hand"
        ),
    ],
)
def test_kvm_exit(args: str, expected: dict[str, int]) -> None:
    assert exit_of(args) == expected


def test_a_reason_of_amd_has_no_number_that_would_be_right() -> None:
    amd = line("1.000001", "kvm_exit: vcpu 1 reason npf rip 0xfd11d info 100000014 fd000")
    # Without a SEAMCALL the trace would be refused.
    rows = read_text(amd + ONE_CALL).vm_entries
    names = ("vcpu_id", "exit_reason", "rip", "info1", "intr_info")
    assert rows.select(names).rows() == [(1, None, 0xFD11D, 0x1_0000_0014, 0xFD000)]


@pytest.mark.parametrize(
    ("args", "vcpu", "immediate"),
    [
        ("vcpu 0", 0, False),
        ("vcpu 0, rip 0x22da", 0, False),
        (" vcpu 1 rip 0xffffffff81036706", 1, False),
        ("vcpu 3, rip 0x0 intr_info 0x00000000 error_code 0x00000000", 3, False),
        ("vcpu 3, rip 0x0 intr_info 0x00000000 error_code 0x00000000[immediate exit]", 3, True),
        ("vcpu 3, rip 0x0[immediate exit]", 3, True),
        ("vcpu 3, rip 0x0 [immediate exit]", 3, True),
        ("vcpu 112, rip 0x0", 112, False),
        ("vcpu_id=3 rip=0x0 immediate_exit=0 intr_info=0x0 error_code=0x0", 3, False),
        ("vcpu_id=3 rip=0x immediate_exit=1 intr_info=0x error_code=0x", 3, True),
        ("vcpu_id=3 rip=0x0 immediate_exit=0x0 intr_info=0x0", 3, False),
    ],
)
def test_kvm_entry(args: str, vcpu: int, immediate: bool) -> None:
    row = read(f"kvm_entry: {args}").vm_entries.row(0, named=True)
    assert (row["vcpu_id"], row["immediate_exit"]) == (vcpu, immediate)
    assert (row["start_ns"], row["end_ns"], row["exit_reason"]) == (1_000_001_000, None, None)


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ("address fee000b0 error_code 181", (None, 0xFEE0_00B0, 0x181, None)),
        ("address 3fef42812000 error_code 181", (None, 0x3FEF_4281_2000, 0x181, None)),
        # Before 6.1 everything is hexadecimal, also what has decimal digits only.
        ("address 80000000 error_code 10", (None, 0x8000_0000, 0x10, None)),
        (
            "vcpu 3 rip 0x7f80ed32638b address 0x00000003f7369712 error_code 0x181",
            (3, 0x3_F736_9712, 0x181, 0x7F80_ED32_638B),
        ),
        ("vcpu 3 rip 0x0 address 0x0000000080000000 error_code 0x2", (3, 0x8000_0000, 2, 0)),
        (
            "vcpu 219 rip 0x0 address 0x00000018cbc00000 error_code 0x500000004",
            (219, 0x18_CBC0_0000, 0x5_0000_0004, 0),
        ),
        # The shared bit is still set in the address.
        (
            "vcpu 0 rip 0x0 address 0x0008000080000000 error_code 0x181",
            (0, 0x8_0000_8000_0000, 0x181, 0),
        ),
        (
            "vcpu_id=3 guest_rip=0x0 fault_address=0x80000000 error_code=0x2",
            (3, 0x8000_0000, 2, 0),
        ),
        ("rip 0xffffffff8134c508 address 0xd0000000 error_code 0x181",
         (None, 0xD000_0000, 0x181, 0xFFFF_FFFF_8134_C508)),
    ],
)  # fmt: skip
def test_kvm_page_fault(args: str, expected: tuple[int | None, int, int, int | None]) -> None:
    row = read(f"kvm_page_fault: {args}").page_faults.row(0, named=True)
    assert (row["vcpu_id"], row["gpa"], row["error_code"], row["rip"]) == expected
    assert row["ts_ns"] == 1_000_001_000


@pytest.mark.parametrize(
    ("args", "reason", "errno"),
    [
        ("reason KVM_EXIT_IO (2)", 2, None),
        ("reason KVM_EXIT_INTERNAL_ERROR (17)", 17, None),
        ("reason 0x1d (29)", 29, None),
        ("reason 0x27 (39)", 39, None),
        ("reason error (14)", None, 14),
        ("reason restart (4)", None, 4),
        ("reason=2 errno=0", 2, None),
        ("reason=39 errno=-14", None, 14),
        ("reason=0 errno=0xfffffffc", None, 4),
    ],
)
def test_kvm_userspace_exit(args: str, reason: int | None, errno: int | None) -> None:
    row = read(f"kvm_userspace_exit: {args}").host_events.row(0, named=True)
    assert (row["event"], row["reason"], row["errno"]) == ("kvm_userspace_exit", reason, errno)


OF_RANGES = ("gpa", "n_bytes", "port", "is_write", "value")


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ("pio_write at 0x3f8 size 1 count 1 val 0x34 ", (1, 0x3F8, True, 0x34)),
        ("pio_read at 0xc13e size 2 count 1", (2, 0xC13E, False, None)),
        ("pio_read at 0x1f0 size 2 count 8 val 0xab (...)", (16, 0x1F0, False, 0xAB)),
        ("rw=0x1 port=0xf4 size=0x4 count=0x1 val=0x31", (4, 0xF4, True, 0x31)),
    ],
)
def test_kvm_pio(args: str, expected: tuple[int | bool | None, ...]) -> None:
    row = read(f"kvm_pio: {args}").host_events.select("event", *OF_RANGES).row(0)
    assert row == ("kvm_pio", None, *expected)


@pytest.mark.parametrize(
    ("args", "value"),
    [
        ("0x00000000100000 -- 0x00000000100200 [0x8]", 8),
        ("0000000000100000 -- 0x0000000000100200 [0x0]", 0),
        ("start=0x100000 end=0x100200 attr=0x8", 8),
    ],
)
def test_memory_becomes_private_or_shared(args: str, value: int) -> None:
    row = read(f"kvm_vm_set_mem_attributes: {args}").host_events.select(OF_RANGES).row(0)
    assert row == (0x1_0000_0000, 2 << 20, None, None, value)


def test_ranges_that_end_before_they_begin_have_no_size() -> None:
    args = "0x00000000000002 -- 0x00000000000001 [0x8]"
    row = read(f"kvm_vm_set_mem_attributes: {args}").host_events.select(OF_RANGES).row(0)
    assert row == (0x2000, None, None, None, 8)


@pytest.mark.parametrize("name", ["kvm_entry", "kvm:kvm_entry", "kvm_entry "])
def test_padding_and_group_of_a_name_change_nothing(name: str) -> None:
    text = f"  CPU 0/KVM-7     [001] d..1.  1.000001: {name.strip()}:     vcpu 5, rip 0x0\n"
    assert read_text(text).vm_entries["vcpu_id"].to_list() == [5]


def test_perf_prints_the_same_behind_group_and_name() -> None:
    text = (
        "       CPU 0/KVM 40/47 [001]  1.000001:       kvm:kvm_entry: vcpu 5, rip 0x0\n"
        "       CPU 0/KVM 40/47 [001]  1.000009:        kvm:kvm_exit: vcpu 5 reason HLT rip 0x0\n"
    )
    row = read_text(text).vm_entries.row(0, named=True)
    assert (row["tid"], row["tgid"], row["vcpu_id"], row["exit_reason"]) == (47, 40, 5, 12)


@pytest.mark.parametrize(
    "event",
    [
        "kvm_exit: TRAP: HSR_EC: 0x0020 (IABT_LOW), PC: 0x0000000000401ec4",
        "kvm_exit: IRQ: HSR_EC: 0x0000 (UNKNOWN), PC: 0x0000000000401ec4",
        "kvm_entry: PC: 0x0000000000401ec4",
        "kvm_page_fault: ipa 0x1000, hsr 0x2, hxfar 0x0, pc 0x0",
        "kvm_userspace_exit: nothing",
        "kvm_exit: ",
        "kvm_entry: ",
        "kvm_exit: [FAILED TO PARSE] exit_reason=x",
        "kvm_exit: vcpu 0 reason   rip 0x0",
        "kvm_page_fault: address zz error_code 1",
        "kvm_pio: pio_flip at 0x3f8",
        "kvm_vm_set_mem_attributes: gfn 0x1, cnt 0x2, attributes 0x8",
    ],
)
def test_layouts_of_other_machines_are_counted_and_make_no_row(event: str) -> None:
    trace = read("kvm_entry: vcpu 0", event)
    rows = trace.vm_entries.height + trace.page_faults.height + trace.host_events.height
    assert (rows, lost(trace)) == (1, {"undecoded": 1})


@pytest.mark.parametrize("reason", ["0x", "0xzz", "0x1ffffffff", "0x" + "f" * 5000])
def test_a_reason_that_is_no_number_is_not_invented(reason: str) -> None:
    row = read(f"kvm_exit: vcpu 0 reason {reason} rip 0x1").vm_entries.row(0, named=True)
    assert (row["vcpu_id"], row["exit_reason"], row["rip"]) == (0, None, 1)


@pytest.mark.parametrize("number", ["4294967296", "99999999999999999999", "9" * 5000])
def test_a_number_too_large_for_its_column_is_not_observed(number: str) -> None:
    row = read(f"kvm_exit: vcpu {number} reason HLT rip 0x1").vm_entries.row(0, named=True)
    assert (row["vcpu_id"], row["exit_reason"], row["rip"]) == (None, 12, 1)


@pytest.mark.parametrize("event", sorted(KVM_DECODERS))
def test_the_noise_of_other_kvm_events_is_counted(event: str) -> None:
    trace = read(
        "kvm_entry: vcpu 0",
        f"{event}_x: vcpu 0 reason HLT rip 0x0",
        'kvm_nested_vmexit: CAN\'T FIND FIELD "rip"<CANT FIND FIELD exit_code>vcpu 0 reason npf',
    )
    assert lost(trace) == {"noise": 2}


# Entries and exits of a vCPU belong together.


def entries(*events: str, **place: Any) -> list[tuple[Any, ...]]:  # noqa: ANN401
    frame = read(*events, **place).vm_entries.sort("seq")
    micros = [(frame[name] - 1_000_000_000) // 1000 for name in ("start_ns", "end_ns")]
    return list(zip(*micros, frame["exit_reason"], frame["n_lines"], strict=True))


IN, OUT = "kvm_entry: vcpu 5, rip 0x0", "kvm_exit: vcpu 5 reason HLT rip 0x0"


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([IN, OUT], [(1, 2, 12, 2)]),
        ([IN, OUT, IN, OUT], [(1, 2, 12, 2), (3, 4, 12, 2)]),
        ([OUT, IN, OUT], [(None, 1, 12, 1), (2, 3, 12, 2)]),
        ([IN, OUT, IN], [(1, 2, 12, 2), (3, None, None, 1)]),
        # A thread enters again only after it came out: the exit was lost.
        ([IN, IN, OUT], [(1, None, None, 1), (2, 3, 12, 2)]),
        ([IN, IN, OUT, OUT], [(1, None, None, 1), (2, 3, 12, 2), (None, 4, 12, 1)]),
        ([IN, IN, OUT, IN, OUT, OUT], [
            (1, None, None, 1), (2, 3, 12, 2), (4, 5, 12, 2), (None, 6, 12, 1),
        ]),
    ],
)  # fmt: skip
def test_an_entry_pairs_with_the_exit_that_follows_it(
    events: list[str], expected: list[tuple[Any, ...]]
) -> None:
    assert entries(*events) == expected


def test_the_plugin_prints_no_vcpu_at_the_exit_and_the_entry_gives_it() -> None:
    row = read("kvm_entry: vcpu 5 rip 0x0", "kvm_exit: reason HLT rip 0x0 info 0 0").vm_entries
    assert row["vcpu_id"].to_list() == [5]


def test_vcpus_pair_by_thread_wherever_they_run() -> None:
    text = "".join(
        [
            line("1.000001", IN, task="CPU 0/KVM-7", cpu=1),
            line("1.000002", IN.replace("5", "6"), task="CPU 1/KVM-8", cpu=1),
            line("1.000003", OUT, task="CPU 0/KVM-7", cpu=4),
            line("1.000004", OUT.replace("5", "6"), task="CPU 1/KVM-8", cpu=1),
        ]
    )
    rows = read_text(text).vm_entries.select("tid", "vcpu_id", "cpu").rows()
    assert rows == [(7, 5, 4), (8, 6, 1)]


def test_without_threads_entries_pair_by_cpu() -> None:
    text = (
        "    [001]   770.850287:       kvm:kvm_entry: vcpu 5, rip 0x100146\n"
        "    [002]   770.850288:       kvm:kvm_entry: vcpu 6, rip 0x100146\n"
        "    [001]   770.850307:        kvm:kvm_exit: vcpu 5 reason HLT rip 0x100146\n"
        "    [002]   770.850309:        kvm:kvm_exit: vcpu 6 reason HLT rip 0x100146\n"
    )
    rows = read_text(text).vm_entries.select("tid", "cpu", "vcpu_id", "n_lines").rows()
    assert rows == [(None, 1, 5, 2), (None, 2, 6, 2)]


def test_without_threads_and_cpus_what_there_is_becomes_rows() -> None:
    text = (
        "preempt_test 20530.456691:     kvm:kvm_entry: vcpu 0, rip 0x4131a3\n"
        "preempt_test 20530.456699:      kvm:kvm_exit: reason HLT rip 0x4131a3 info 0 0\n"
    )
    trace = read_text(text)
    trace.check()
    assert trace.vm_entries["n_lines"].sum() == 2
    assert trace.threads.is_empty()
