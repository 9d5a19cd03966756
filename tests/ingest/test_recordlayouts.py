"""Mapping of record fields to slots: KVM's and out-of-tree SEAMCALL tracepoints."""

from pathlib import Path

import pytest
from support.recorder import Machine, Recording, format_file

import tdxtrace
from tdxtrace.errors import FormatError

START = 10**9
M = Machine()
# The layouts of Linux 6.18, arch/x86/kvm/trace.h and include/trace/events/kvm.h.
KVM = [
    format_file("kvm_entry", 401, "unsigned int vcpu_id@8+4", "bool immediate_exit@24+1"),
    format_file(
        "kvm_exit",
        402,
        "unsigned int exit_reason@8+4",
        "unsigned long guest_rip@16+8",
        "u32 isa@24+4",
        "u64 info1@32+8",
        "u64 info2@40+8",
        "u32 intr_info@48+4",
        "u32 error_code@52+4",
        "unsigned int vcpu_id@56+4",
        "u64 requests@64+8",
    ),
    format_file(
        "kvm_page_fault",
        403,
        "unsigned int vcpu_id@8+4",
        "unsigned long guest_rip@16+8",
        "u64 fault_address@24+8",
        "u64 error_code@32+8",
    ),
    format_file("kvm_userspace_exit", 404, "__u32 reason@8+4", "int errno@12+4s"),
]


PIO = ("rw", "port", "size", "count", "val")
CHANGE = ("gfn_t start", "gfn_t end", "unsigned long attr")


def _head(number: int, flags: int = 0, preempt: int = 0) -> bytes:
    return M.pack("HBBi", number, flags, preempt, 7)


def _exit(reason: int, isa: int) -> bytes:
    words = M.pack("IIQII", reason, 0, 0xABC, isa, 0)
    return _head(402) + words + M.pack("QQIIIIQ", 1 << 63, 2, 3, 4, 5, 0, 6)


def _read(tmp_path: Path, formats: dict[str, list[bytes]], *payloads: bytes) -> tdxtrace.Trace:
    records = b"".join(M.event(10, payload) for payload in payloads)
    path = tmp_path / "trace.dat"
    path.write_bytes(Recording(M, (M.page(START, records),), formats=formats).v7())
    trace = tdxtrace.read_trace(path)
    trace.check()
    return trace


def test_entries_and_exits_of_vcpus(tmp_path: Path) -> None:
    entry = _head(401) + M.pack("IIQI", 5, 0, 0, 1)
    trace = _read(tmp_path, {"kvm": KVM}, entry, _exit(0xFFFFFFFF, 1), entry, _exit(0x400, 2))
    columns = ("vcpu_id", "exit_reason", "info1", "info2", "intr_info", "error_code", "rip")
    assert trace.vm_entries.select(*columns, "requests", "immediate_exit").rows() == [
        (5, 0xFFFFFFFF, 1 << 63, 2, 3, 4, 0xABC, 6, True),
        # Exit codes of SVM are others: 0x400 would be no reason of VMX.
        (5, None, 1 << 63, 2, 3, 4, 0xABC, 6, True),
    ]
    result = trace.losses.select("kind", "severity", "line_no", "n_events", "n_lines", "detail")
    assert result.rows() == [
        ("undecoded", "error", 4, 1, 0, "exit reason 0x400 (AMD, not Intel)"),
    ]


def test_a_recording_of_an_amd_host_is_refused(tmp_path: Path) -> None:
    entry = _head(401) + M.pack("IIQI", 5, 0, 0, 1)
    with pytest.raises(FormatError, match=r"AMD host; .* kvm_entry, kvm_exit would be read there"):
        _read(tmp_path, {"kvm": KVM}, entry, _exit(0x400, 2))


def test_page_faults(tmp_path: Path) -> None:
    fault = _head(403) + M.pack("IIQQQ", 5, 0, 0xABC, 0xFFFF_F000, 1 << 34)
    trace = _read(tmp_path, {"kvm": KVM}, fault)
    columns = ("ts_ns", "vcpu_id", "gpa", "error_code", "rip")
    assert trace.page_faults.select(columns).rows() == [
        (START + 10, 5, 0xFFFF_F000, 1 << 34, 0xABC)
    ]


def test_exits_to_user_space_have_a_reason_or_an_error(tmp_path: Path) -> None:
    exits = [_head(404) + M.pack("Ii", 6, 0), _head(404) + M.pack("Ii", 6, -4)]
    trace = _read(tmp_path, {"kvm": KVM}, *exits)
    assert trace.host_events.select("event", "reason", "errno").rows() == [
        ("kvm_userspace_exit", 6, None),
        ("kvm_userspace_exit", None, 4),
    ]


def test_transfers_by_ports_and_conversions_of_memory(tmp_path: Path) -> None:
    pio = [f"unsigned int {name}@{8 + 4 * n}+4" for n, name in enumerate(PIO)]
    change = [f"{kind}@{8 + 8 * n}+8" for n, kind in enumerate(CHANGE)]
    formats = [
        format_file("kvm_pio", 405, *pio),
        format_file("kvm_vm_set_mem_attributes", 406, *change),
    ]
    payloads = [
        _head(405) + M.pack("IIIII", 1, 0x3F8, 1, 2, 0x41),
        _head(406) + M.pack("QQQ", 0x100, 0x300, 8),
        _head(405) + M.pack("IIIII", 0, 0xF4, 4, 1, 7),
    ]
    trace = _read(tmp_path, {"kvm": formats}, *payloads)
    columns = ("event", "gpa", "n_bytes", "port", "is_write", "value")
    assert trace.host_events.select(columns).rows() == [
        ("kvm_pio", None, 2, 0x3F8, True, 0x41),
        ("kvm_vm_set_mem_attributes", 0x10_0000, 2 << 20, None, None, 8),
        ("kvm_pio", None, 4, 0xF4, False, 7),
    ]


def test_other_architectures_have_other_fields(tmp_path: Path) -> None:
    other = format_file("kvm_exit", 402, "unsigned int ret@8+4", "unsigned long vcpu_pc@16+8")
    fault = _head(403) + M.pack("IIQQQ", 5, 0, 0, 0x1000, 0)
    trace = _read(tmp_path, {"kvm": [other, KVM[2]]}, _exit(1, 1), fault)
    assert trace.vm_entries.is_empty()
    assert trace.losses.select("kind", "detail").rows() == [("undecoded", "kvm_exit")]


def test_seamcall_tracepoints_out_of_tree(tmp_path: Path) -> None:
    formats = [
        format_file("kvm_tdx_seamcall_enter", 411, "u64 op@8+8", "u64 rcx@16+8", "u64 rdx@24+8"),
        format_file("kvm_tdx_seamcall_exit", 412, "u64 op@8+8", "u64 err@16+8", "u64 rcx@24+8"),
    ]
    enter = _head(411) + M.pack("QQQ", 6, 0x1234_5000, 0xFF11)
    leave = _head(412) + M.pack("QQQ", 6, 0x8000020000000092, 77)
    trace = _read(tmp_path, {"kvm": formats}, enter, leave)
    columns = ("leaf", "gpa", "td_id", "status", "ext_err1")
    assert trace.seamcalls.select(columns).rows() == [
        (6, 0x1234_5000, 0xFF11, 0x8000020000000092, 77)
    ]


@pytest.mark.parametrize(
    ("flags", "preempt", "expected"),
    [(0x08, 1, True), (0x40, 0, True), (0x10, 0, False), (0, 0, False), (0xFF, 0xFF, None)],
)
def test_context_of_a_call(flags: int, preempt: int, expected: bool | None, tmp_path: Path) -> None:
    made = format_file("tdh_mem_track_x", 421, "unsigned long __probe_ret_ip@8+8", "u64 ret@16+8")
    leave = _head(421, flags, preempt) + M.pack("QQ", 1, 0)
    trace = _read(tmp_path, {"tdx": [made]}, leave)
    assert trace.seamcalls["in_irq"].to_list() == [expected]
