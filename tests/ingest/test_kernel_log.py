"""Kernel logs: all forms that tools and hosts print, and the fields read from them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.texts import ONE_CALL, accounts, is_accounted_for, lost, read_text

from tdxtrace.errors import FormatError, InputError
from tdxtrace.ingest.formats import detect_text
from tdxtrace.tables.trace import Trace

REAL = Path(__file__).parents[3] / "shared" / "domain" / "real-log-lines.txt"
FAILED = "kvm_intel: SEAMCALL TDH_MEM_PAGE_REMOVE failed: 0x8000020000000092, rcx 0x5, rdx 0x400"
S = 1_000_000_000


def log(*lines: str) -> str:
    return "".join(f"{line}\n" for line in lines)


def at(seconds: float, text: str) -> str:
    return f"[{seconds:12.6f}] {text}"


def only(trace: Trace) -> dict[str, Any]:
    trace.check()
    assert is_accounted_for(trace)
    return trace.kernel_messages.row(0, named=True)


def parsed_message(text: str) -> dict[str, Any]:
    return only(read_text(log(at(1.5, text))))


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        (FAILED, {"leaf": 29, "status": 0x8000_0200_0000_0092, "rcx": 5, "rdx": 0x400}),
        (
            "kvm_intel: SEAMCALL TDH_MEM_RANGE_BLOCK failed: 0x8000020000000001, entry 0x5, "
            "level_state 0x401",
            {"leaf": 7, "status": 0x8000_0200_0000_0001, "rcx": 5, "rdx": 0x401},
        ),
        ("SEAMCALL TDH_VP_INIT failed: 0x8000020000000080", {"leaf": 22, "rcx": None}),
        (
            "kvm_intel: SEAMCALL TDH_PHYMEM_PAGE_RECLAIM failed: 0xc000030000000001, rcx 0x7, "
            "rdx, 0x2, r8 0x1",
            {"leaf": 28, "rcx": 7, "rdx": 2},
        ),
        (
            "SEAMCALL (0x000000000001000f) failed: 0xc0000b0800000001 RCX 0x0000000000000003 RDX "
            "0x0000000000000400 R8 0x0000000000000000",
            {"leaf": 15, "status": 0xC000_0B08_0000_0001, "rcx": 3, "rdx": 0x400},
        ),
        ("virt/tdx: SEAMCALL (21) failed: 0xc000090000000000", {"leaf": 21}),
        ("virt/tdx: SEAMCALL (0x15) failed: 0xc000090000000000", {"leaf": 21}),
        (
            "tdx: SEAMCALL failed: CPU 94: leaf 33, error 0xc000092100000122.",
            {"leaf": 33, "status": 0xC000_0921_0000_0122, "cpu": 94},
        ),
        (
            "tdx: SEAMCALL[TDH.SYS.INIT] failed on cpu 3: TDX_SYS_BUSY (0x8000020200000000)",
            {"leaf": 33, "status": 0x8000_0202_0000_0000, "cpu": 3},
        ),
        ("virt/tdx: TDH.SYS.DISABLE failed: 0xc000010000000000", {"leaf": 69}),
        ("TDH.MNG.INIT failed with status: 0xc000010000000045", {"leaf": 21}),
        ("kvm_intel: TDH_VP_RD[MANAGEMENT.0x20] failed 0xc000010000000001", {"leaf": 26}),
        ("kvm_intel: TDH_VP_WR[VMCS.0x4] = 0x1f failed: 0xc000010000000001", {"leaf": 43}),
        ("kvm_intel: TDH_MNG_RD[EXEC.0x1] failed: 0xc000010000000001", {"leaf": 11}),
        (
            "tdx: SEAMCALL failed: leaf 254, error 0xc000050500000000.",
            {"leaf": 254, "status": 0xC000_0505_0000_0000, "cpu": None},
        ),
        (
            "SEAMCALL[TDH_MEM_RD(12)] failed: Unknown SEAMCALL status code(0xe000060400000000)",
            {"leaf": 12, "status": 0xE000_0604_0000_0000},
        ),
        (
            "SEAMCALL[TDH_OF_TOMORROW(12)] failed: 0xe000060400000000",
            {"leaf": 12, "status": 0xE000_0604_0000_0000},
        ),
        (
            "SEAMCALL[12] failed: 0x8000020000000092 RCX 0x1, RDX 0x2",
            {"leaf": 12, "status": 0x8000_0200_0000_0092, "rcx": 1, "rdx": 2},
        ),
        (
            "SEAMCALL[TDH_VP_ENTER] failed: TDX_OPERAND_BUSY (0x8000020000000092)",
            {"leaf": 0, "status": 0x8000_0200_0000_0092},
        ),
        # A call to the P-SEAMLDR has no leaf of the module.
        ("virt/tdx: SEAMCALL (0x8000000000000001) failed: 0x8000000000030000", {"leaf": None}),
        ("SEAMCALL TDH_OF_TOMORROW failed: 0x8000020000000080", {"leaf": None}),
        ("virt/tdx: SEAMCALL (0xffffffffff) failed: 0x1", {"leaf": None, "status": 1}),
    ],
)
def test_a_failed_seamcall_in_every_spelling(text: str, fields: dict[str, Any]) -> None:
    row = parsed_message(text)
    assert row["message"] == "seamcall_failed"
    assert {name: row[name] for name in fields} == fields
    assert (row["ts_ns"], row["text"], row["n_lines"]) == (1_500_000_000, text, 1)


@pytest.mark.parametrize(
    ("text", "message", "fields"),
    [
        (
            "kvm_intel: kvm [4242]: TD vp_enter_ret 0x9000020500000000",
            "vp_enter_ret",
            {"leaf": 0, "status": 0x9000_0205_0000_0000, "tid": 4242},
        ),
        ("kvm: Exceeded 32 retries for S-EPT operation", "exceeded_retries", {"n_events": 32}),
        ("kvm: Crashing due to lock contention in the TDX module", "crashing", {}),
        (
            "WARNING: CPU: 1 PID: 24908 at arch/x86/kvm/vmx/tdx.c:1494 tdx_mem_page_aug+0x102/"
            "0x1d0 [kvm_intel]",
            "warning",
            {"cpu": 1, "tid": 24908, "function": "tdx_mem_page_aug"},
        ),
        (
            "WARNING: arch/x86/kvm/vmx/tdx.c:1786 at tdx_track+0x1/0x2 [kvm_intel], CPU#3: qemu/7",
            "warning",
            {"function": "tdx_track", "cpu": 3, "tid": 7},
        ),
        ("kernel BUG at arch/x86/kvm/vmx/tdx.c:29!", "kernel_bug", {}),
        ("pr_tdx_error: 503 callbacks suppressed", "suppressed", {"n_events": 503}),
        ("kvm_intel: tdh_mng_vpflushdone() failed. HKID 33 is leaked.", "hkid_leaked", {}),
        (
            "kvm_intel: Guest access before accepting 0x7ff000 on vCPU 3",
            "guest_access",
            {"gpa": 0x7FF000, "vcpu_id": 3},
        ),
        ("virt/tdx: Module version: 1.5.24", "module_version", {"module_version": "1.5.24"}),
        ("virt/tdx: TDX-Module version: 1.5.06", "module_version", {"module_version": "1.5.06"}),
        (
            "virt/tdx: module version: 1.5.05.46.0698 (build_date 20240129).",
            "module_version",
            {"module_version": "1.5.05.46.0698"},
        ),
        (
            "virt/tdx: TDX module: attributes 0x0, vendor_id 0x8086, major_version 1, "
            "minor_version 0, build_date 20230206, build_num 457",
            "module_version",
            {"module_version": "1.0 build 457"},
        ),
        (
            "virt/tdx: TDX module: attributes 0x0, vendor_id 0x8086, major_version 1, "
            "minor_version 5, build_date 20240129, build_num 698",
            "module_version",
            {"module_version": "1.5.05"},
        ),
        (
            "virt/tdx: TDX module 1.5.06.00, build number 744, build date 0134d817",
            "module_version",
            {"module_version": "1.5.06.00"},
        ),
        (
            "virt/tdx: Module version: 1.5.00.00.0481, build_date: 20230323",
            "module_version",
            {"module_version": "1.5.00.00.0481"},
        ),
        ("virt/tdx: TDX module verson 1.5.16", "module_version", {"module_version": "1.5.16"}),
        (
            "tdx: TDX module: vendor_id 0x8086, major_version 1, minor_version 5",
            "module_version",
            {"module_version": "1.5"},
        ),
        (
            "kvm_intel: kvm [100]: TD exit 0xe000060400000000, 0 hkid 0x41 hkid pa 0x8200000000000",
            "vp_enter_ret",
            {"leaf": 0, "status": 0xE000_0604_0000_0000, "tid": 100},
        ),
        ("virt/tdx: TDX not supported by the host platform", "module_state", {}),
        (
            "virt/tdx: initialization failed: TDMR [0x0, 0x80000000): reserved areas exhausted.",
            "module_state",
            {},
        ),
        ("tdx: TDX module is not loaded.", "module_state", {}),
        # Of which nothing is known but that it is about TDX: kept, with its text.
        ("virt/tdx: CMR: [0x100000, 0x77800000)", "other", {"status": None}),
        ("SEAMCALL TDH_VP_INIT succeeded", "other", {"leaf": None}),
        ("kvm_intel: tdx: max servtds supported per user TD is 1", "other", {}),
        ("seamldr: module update took 44 ms", "other", {}),
        ("tdx_host tdx_host: update failed", "other", {}),
        ("kvm_intel: NO_RBP_MOD feature is not supported", "other", {}),
        ("kvm_intel: Insufficient number of HKIDs", "other", {}),
        ("TDX private memory error. Possible kernel bug.", "other", {}),
        (
            "TDX requires all packages to have an online CPU. Delete all TDs in order to offline "
            "all CPUs of a package.",
            "module_state",
            {},
        ),
        ("virt/tdx: module initialization failed (-5)", "module_state", {}),
        ("virt/tdx: TDX-Module initialized", "module_state", {}),
    ],
)
def test_every_other_message(text: str, message: str, fields: dict[str, Any]) -> None:
    row = parsed_message(text)
    assert row["message"] == message
    assert {name: row[name] for name in fields} == fields


@pytest.mark.parametrize(
    "text",
    [
        "kauditd_printk_skb: 109 callbacks suppressed",
        "WARNING: CPU: 1 PID: 2 at net/core/dev.c:5 dev_open+0x1/0x2",
        "kernel BUG at lib/list_debug.c:29!",
        "smpboot: CPU0: Intel(R) Xeon(R) Platinum 8480CTDX (family: 0x6, model: 0x8f)",
        "usb 1-1: new device",
        "",
    ],
)
def test_what_is_not_about_tdx_is_counted_and_no_row(text: str) -> None:
    trace = read_text(log(at(1, text), at(2, FAILED)))
    assert only(trace)["seq"] == 2
    assert trace.kernel_messages.height == 1
    assert lost(trace) == {"noise": 1}


HEADS = [
    ("[    1.500000] ", 3 * S // 2, "printk"),
    ("<4>[    1.500000] ", 3 * S // 2, "printk"),
    ("kern  :err   : [    1.500000] ", 3 * S // 2, "printk"),
    ("[    1.500000 <    0.000039>] ", 3 * S // 2, "printk"),
    ("[    1.500000][  T123] ", 3 * S // 2, "printk"),
    ("4,1234,1500000,-;", 3 * S // 2, "printk"),
    ("Jun 24 11:07:17 tee-fhaas kernel: [    1.500000] ", 3 * S // 2, "printk"),
    ("2024-06-24T11:07:17.5+02:00 host kernel: [    1.500000] ", 3 * S // 2, "printk"),
    ("[    1.500000] tee-fhaas kernel: ", 3 * S // 2, "monotonic"),
    ("[Mon Jun 24 11:07:17 2024] ", 1_719_227_237 * S, "wall, no zone"),
    ("jun 24 11:07:17 tee-fhaas kernel: ", 78_232_037 * S, "wall, no year"),
    ("Jun 24 11:07:17.250 tee-fhaas kernel: ", 78_232_037 * S + S // 4, "wall, no year"),
    ("Mon 2024-06-24 11:07:17 UTC host kernel: ", 1_719_227_237 * S, "wall"),
    ("Mo 2024-06-24 11:07:17 CEST host kernel: ", 1_719_227_237 * S, "wall, no zone"),
    ("Mon 2024-06-24 11:07:17.5 +0200 host kernel: ", 1_719_227_237 * S + S // 2, "wall, no zone"),
    ("1719227237.123456 host kernel: ", 1_719_227_237_123_456_000, "wall"),
    ("<3>1 2024-06-24T11:07:17.5Z host kernel - - - ", 1_719_227_237 * S + S // 2, "wall"),
    ('<3>1 2024-06-24T11:07:17Z host kernel 1 ID7 [a@1 b="c"] ', 1_719_227_237 * S, "wall"),
    ("<3>1 2024-06-24T11:07:17Z host kernel - - - [    1.500000] ", 3 * S // 2, "printk"),
    ("<3>Jun 24 11:07:17 host kernel: [    1.500000] ", 3 * S // 2, "printk"),
    ("2024-06-24T11:07:17.5+02:00 host kernel[0]: [    1.500000] ", 3 * S // 2, "printk"),
    ("kernel: [    1.500000] ", 3 * S // 2, "printk"),
    ("2024-06-24T11:07:17.5Z stdout F [    1.500000] ", 3 * S // 2, "printk"),
    ("4,1234,1500000,-,caller=T12;", 3 * S // 2, "printk"),
    ("[    1.500000] [   C12] ", 3 * S // 2, "printk"),
    ("> [    1.500000] ", 3 * S // 2, "printk"),
    (">> > [    1.500000] ", 3 * S // 2, "printk"),
    ("\t   [    1.500000] ", 3 * S // 2, "printk"),
    ("[    1.500000]\xa0 ", 3 * S // 2, "printk"),
    ("\x1b[32m[    1.500000] \x1b[0m\x1b[31m", 3 * S // 2, "printk"),
    ("\x1b[1mJun 24 11:07:17 host kernel: \x1b[0m", 78_232_037 * S, "wall, no year"),
    ("24. Juni 11:07:17 host kernel: ", None, "none"),
    ("6\u6708 24 11:07:17 host kernel: ", None, "none"),
    ("kernel: ", None, "none"),
    ("2024-06-24T11:07:17+0200 host kernel: ", 1_719_220_037 * S, "wall"),
    ("2024-06-24T11:07:17.123456+02:00 host kernel: ", 1_719_220_037_123_456_000, "wall"),
    ("2024-06-24T11:07:17,123456+00:00 ", 1_719_227_237_123_456_000, "wall"),
    ("2024-06-24T11:07:17Z host kernel: ", 1_719_227_237 * S, "wall"),
    ("[Jun24 11:07] ", None, "none"),
    ("[  +0.000003] ", None, "none"),
    ("[<    0.000039>] ", None, "none"),
    ("juin 24 11:07:17 host kernel: ", None, "none"),
    # dmesg -x with every kind of time, without time; journalctl --no-hostname, -o short-delta.
    ("kern  :err   : 2024-06-24T11:07:17,500000+00:00 ", 1_719_227_237 * S + S // 2, "wall"),
    ("kern  :warn  : [  +0.000003] ", None, "none"),
    ("kern  :err   : ", None, "none"),
    ("kern  :err   : \x1b[32m[    1.500000] \x1b[0m\x1b[33m", 3 * S // 2, "printk"),
    ("Jun 24 11:07:17 kernel: ", 78_232_037 * S, "wall, no year"),
    ("[    1.500000 <    0.000012 >] host kernel: ", 3 * S // 2, "monotonic"),
    ("Mon Jun 24 11:07:17 UTC 2024 host kernel: ", 1_719_227_237 * S, "wall, no zone"),
    ("Mon Jun 24 11:07:17 2024 kern.err kernel: [    1.500000] ", 3 * S // 2, "printk"),
    # What programs that print files put before a line, and what nobody knows.
    ("/var/log/kern.log:12:Jun 24 11:07:17 host kernel: ", 78_232_037 * S, "wall, no year"),
    ("dmesg.txt-12-[    1.500000] ", 3 * S // 2, "printk"),
    ("    12\t[    1.500000] ", 3 * S // 2, "printk"),
    ("- [    1.500000] ", 3 * S // 2, "printk"),
    ("dmesg.txt:12:4,1234,1500000,-;", 3 * S // 2, "printk"),
    ("kvm1 | [    1.500000] ", 3 * S // 2, "printk"),
    ("[2024-06-24 11:07:17.123] ttyS0 [    1.500000] ", 3 * S // 2, "printk"),
    ("I0624 11:07:17.123456    1234 log.go:12] host kernel: ", None, "none"),
    ("", None, "none"),
]


@pytest.mark.parametrize(("head", "ts_ns", "clock"), HEADS, ids=[h[0] or "bare" for h in HEADS])
def test_every_head_of_a_line(head: str, ts_ns: int | None, clock: str) -> None:
    trace = read_text(log(head + FAILED))
    row = only(trace)
    assert (row["ts_ns"], row["status"]) == (ts_ns, 0x8000_0200_0000_0092)
    (source,) = trace.provenance.sources
    assert (source.format, source.clock) == ("kernel-log", clock)
    assert (source.first_ns, source.last_ns) == (ts_ns, ts_ns)


def journal(text: object, **more: str) -> str:
    entry = {
        "_TRANSPORT": "kernel",
        "_SOURCE_MONOTONIC_TIMESTAMP": "1500000",
        "__REALTIME_TIMESTAMP": "1719227237123456",
        "__MONOTONIC_TIMESTAMP": "1600000",
        "MESSAGE": text,
    }
    return json.dumps({k: v for k, v in (entry | more).items() if v != ""})


@pytest.mark.parametrize(
    ("more", "ts_ns", "clock"),
    [
        ({}, 1_500_000_000, "printk"),
        ({"_SOURCE_MONOTONIC_TIMESTAMP": ""}, 1_719_227_237_123_456_000, "wall"),
        (
            {"_SOURCE_MONOTONIC_TIMESTAMP": "", "__REALTIME_TIMESTAMP": ""},
            1_600_000_000,
            "monotonic",
        ),
        (
            {"_SOURCE_MONOTONIC_TIMESTAMP": "x", "__REALTIME_TIMESTAMP": "-1"},
            1_600_000_000,
            "monotonic",
        ),
    ],
)
def test_the_journal_as_json(more: dict[str, str], ts_ns: int, clock: str) -> None:
    trace = read_text(log(journal(FAILED, **more)))
    assert (only(trace)["ts_ns"], trace.provenance.sources[0].clock) == (ts_ns, clock)
    assert trace.provenance.sources[0].format == "journal-json"


def test_the_journal_as_a_sequence_of_json() -> None:
    trace = read_text(log("\x1e" + journal(FAILED), "\x1e" + journal("usb 1-1: new device")))
    assert only(trace)["ts_ns"] == 1_500_000_000
    assert trace.provenance.sources[0].format == "journal-json"


def test_a_prompt_is_no_comment() -> None:
    trace = read_text(log(at(1, FAILED), "# [    1.500000] " + FAILED, "# dmesg", "#"))
    assert trace.kernel_messages["seq"].to_list() == [1, 2]
    assert trace.provenance.sources[0].n_headers == 2


def fields_of(text: str) -> dict[str, str]:
    return dict(json.loads(journal(text)))


def pretty(*texts: str) -> str:
    """What journalctl -o json-pretty prints."""
    return "".join(
        "{\n" + ",\n".join(f'\t"{k}" : {json.dumps(v)}' for k, v in fields_of(m).items()) + "\n}\n"
        for m in texts
    )


def exported(*texts: str) -> str:
    """What journalctl -o export prints."""
    return "".join(
        "".join(f"{k}={v}\n" for k, v in fields_of(m).items() if k != "MESSAGE")
        + f"MESSAGE={m}\n\n"
        for m in texts
    )


def verbose(*texts: str) -> str:
    """What journalctl -o verbose prints."""
    return "".join(
        "Mon 2024-06-24 11:07:17.123456 UTC [s=1;i=2;b=3;m=4;t=5;x=6]\n"
        + "".join(f"    {k}={v}\n" for k, v in fields_of(m).items())
        for m in texts
    )


def dmesg_json(*texts: str) -> str:
    """What dmesg -J prints (util-linux 2.38)."""
    entries = (
        f'{{\n         "pri": 3,\n         "time":     1.500000,\n'
        f'         "msg": {json.dumps(m)}\n      }}'
        for m in texts
    )
    return '{\n   "dmesg": [\n      ' + ",".join(entries) + "\n   ]\n}\n"


@pytest.mark.parametrize(
    ("written", "form", "first", "n_lines"),
    [
        (pretty, "journal-json", 8, 14),
        (exported, "journal-export", 7, 10),
        (verbose, "journal-export", 8, 10),
        (dmesg_json, "journal-json", 7, 9),
        (lambda *m: "".join(f"data: {journal(x)}\n\n" for x in m), "journal-json", 3, 2),
        (lambda *m: json.dumps([fields_of(x) for x in m], indent=2), "journal-json", 9, 14),
    ],
    ids=["json-pretty", "export", "verbose", "dmesg -J", "json-sse", "jq"],
)
def test_entries_of_several_lines(
    written: Callable[..., str], form: str, first: int, n_lines: int
) -> None:
    failed = "SEAMCALL TDH_VP_INIT failed: 0x8000020000000080"
    trace = read_text(written("usb 1-1: new device", failed, "virt/tdx: RCX 0x1 RDX 0x2 R08 0x3"))
    row = only(trace)
    assert (row["seq"], row["ts_ns"], row["n_lines"]) == (first, 3 * S // 2, n_lines)
    assert (row["status"], row["rcx"]) == (0x8000_0200_0000_0080, 1)
    assert trace.provenance.sources[0].format == form
    assert set(lost(trace)) == {"noise"}
    assert is_accounted_for(trace)


def test_a_field_of_an_export_may_have_any_bytes() -> None:
    text = f"{FAILED}\nmore\n"
    sized = (
        b"MESSAGE\n" + len(text).to_bytes(8, "little") + text.encode() + b"\n_TRANSPORT=kernel\n"
    )
    # A size whose bytes are line ends, in front of a message of others.
    other = b"X".ljust(10, b"\n")
    noise = b"_TRANSPORT=kernel\nMESSAGE\n" + len(other).to_bytes(8, "little") + other + b"\n\n"
    trace = read_text(noise + sized + b"\n" + exported(FAILED).encode())
    assert trace.kernel_messages["message"].to_list() == ["seamcall_failed"] * 2
    assert is_accounted_for(trace)


def test_entries_of_other_programs_are_no_evidence_in_any_form() -> None:
    forged = exported(FAILED).replace("_TRANSPORT=kernel", "_TRANSPORT=syslog")
    trace = read_text(forged + exported(FAILED))
    assert only(trace)["seq"] == 7
    forged = dmesg_json(FAILED).replace('"pri": 3,', '"fac": "daemon",\n "pri": "err",')
    assert read_text(forged + dmesg_json(FAILED)).kernel_messages.height == 1


def test_a_message_that_is_no_utf8_comes_as_bytes() -> None:
    assert only(read_text(log(journal(list(FAILED.encode())))))["text"] == FAILED


def test_only_messages_of_the_kernel_count() -> None:
    """Any user of the host can make a line of syslog, root one of /dev/kmsg."""
    forged = log(
        "Jun 24 11:07:17 host mallory: " + FAILED,
        "Jun 24 11:07:17 mallory[1]: [    1.500000] " + FAILED,
        "Jun 24 11:07:17 host mallory: Jun 24 11:07:17 host kernel: " + FAILED,
        "daemon:err   : [    1.500000] " + FAILED,
        "<27>[    1.500000] " + FAILED,
        "27,1234,1500000,-;" + FAILED,
        "Jun 24 11:07:18 host kernel: " + FAILED,
    )
    trace = read_text(forged)
    assert only(trace)["seq"] == 7
    assert lost(trace) == {"noise": 6}
    for head in (
        "2024-06-24T11:07:17.5+02:00 host mallory: ",
        "2024-06-24T11:07:17Z host mallory[12]: [    1.500000] ",
        "Mon 2024-06-24 11:07:17 CEST host mallory[12]: ",
        "1719227237.123456 host mallory[12]: ",
        "<3>1 2024-06-24T11:07:17Z host mallory 12 - - ",
        "[    1.500000] host mallory[12]: ",
        "> Jun 24 11:07:17 host mallory: kernel: ",
        "24. Juni 11:07:17 host mallory: ",
    ):
        trace = read_text(log(head + FAILED, "Jun 24 11:07:18 host kernel: " + FAILED))
        assert only(trace)["seq"] == 2, head
        assert lost(trace) == {"noise": 1}, head
    forged = log(journal(FAILED, _TRANSPORT="stdout"), journal(FAILED))
    assert only(read_text(forged))["seq"] == 2


def test_registers_on_lines_of_their_own_belong_to_the_failure() -> None:
    trace = read_text(
        log(
            at(1, "virt/tdx: SEAMCALL (0x0000000000000022) failed: 0xc000050500000000"),
            at(1, "virt/tdx: RCX 0x0000000000000007 RDX 0x9100000100000008 R08 0x0000000000000000"),
            at(1, "virt/tdx: R09 0x0000000000000000 R10 0x0000000000000000 R11 0x0"),
            at(1, "virt/tdx: module initialization failed (-5)"),
        )
    )
    row = only(trace)
    assert (row["rcx"], row["rdx"], row["n_lines"]) == (7, 0x9100_0001_0000_0008, 3)
    assert trace.kernel_messages["message"].to_list() == ["seamcall_failed", "module_state"]


def test_the_registers_of_a_warning_give_rax_once() -> None:
    lines = ["---[ end trace 0 ]---", "RAX: c000030000000001 RBX: 0000000000000001 RCX: 0"]
    warning = (
        "WARNING: CPU: 76 PID: 2842 at arch/x86/kvm/vmx/tdx.c:275 __tdx_reclaim_page+0xac/0xe0"
    )
    inside = read_text(log(at(1, warning), at(1, "RSP: 0018:ff"), at(1, lines[1]), at(1, lines[1])))
    assert (only(inside)["rax"], only(inside)["n_lines"]) == (0xC000_0300_0000_0001, 2)
    behind = read_text(log(at(1, warning), at(1, lines[0]), at(1, lines[1])))
    assert only(behind)["rax"] is None


@pytest.mark.parametrize(
    ("function", "rax", "leaf", "status"),
    [
        ("__tdx_reclaim_page", 0xC000_0300_0000_0001, 28, 0xC000_0300_0000_0001),
        ("tdx_mem_page_aug", 0x8000_0200_0000_0092, 6, 0x8000_0200_0000_0092),
        ("tdx_track", 0x8000_0201_0000_0000, 38, 0x8000_0201_0000_0000),
        # It calls REMOVE and WBINVD: whose status it is does not follow.
        ("tdx_sept_drop_private_spte", 0xC000_0300_0000_0001, None, None),
        # A pointer, a number, and no code of the module: RAX is used for other things as well.
        ("__tdx_reclaim_page", 0xFF11_0001_8A00_0000, None, None),
        ("__tdx_reclaim_page", 0x5, None, None),
        ("__tdx_reclaim_page", 0xC123_0000_0000_0000, None, None),
    ],
)
def test_rax_is_the_status_where_the_function_calls_one_leaf(
    function: str, rax: int, leaf: int | None, status: int | None
) -> None:
    warned = f"WARNING: CPU: 1 PID: 2 at arch/x86/kvm/vmx/tdx.c:5 {function}+0xac/0xe0 [kvm_intel]"
    row = only(read_text(log(at(1, warned), at(1, f"RAX: {rax:016x} RBX: {1:016x} RCX: 0"))))
    assert (row["rax"], row["leaf"], row["status"]) == (rax, leaf, status)


def test_text_that_speaks_of_tdx_is_no_log() -> None:
    with pytest.raises(FormatError, match="not a trace"):
        detect_text(b"TDX is a technology.\nSEAMCALL is an instruction.\n", "x")


def test_messages_suppressed_by_the_rate_limit_are_a_loss() -> None:
    trace = read_text(log(at(1, FAILED), at(6, "pr_tdx_error: 503 callbacks suppressed")))
    only(trace)
    (row,) = trace.losses.filter(pl.col("kind") == "suppressed").to_dicts()
    assert (row["n_events"], row["n_lines"], row["detail"]) == (503, 0, "pr_tdx_error")
    assert row["severity"] == "data_loss"
    assert "lower bounds" in row["advice"]


def test_lines_with_another_clock_than_most_have_no_time() -> None:
    trace = read_text(
        log(at(1, FAILED), at(2, FAILED), "[Mon Jun 24 11:07:17 2024] " + FAILED, FAILED)
    )
    assert trace.kernel_messages["ts_ns"].to_list() == [S, 2 * S, None, None]


@pytest.mark.parametrize(
    "lines",
    [
        [at(50, FAILED), "-- Boot 0123 --", at(51, FAILED)],
        [at(50, FAILED), "-- Reboot --", at(1, FAILED)],
        [at(50, FAILED), at(1, FAILED)],
        [journal(FAILED, _BOOT_ID="a"), journal(FAILED, _BOOT_ID="b")],
    ],
)
def test_times_of_several_boots_cannot_be_compared(lines: list[str]) -> None:
    trace = read_text(ONE_CALL, log(*lines))
    assert trace.provenance.sources[1].clock == "printk of several boots"
    assert any("NOT compared" in note for note in trace.provenance.notes)


@pytest.mark.parametrize(
    ("text", "form"),
    [
        (log(at(1, "usb 1-1: new device")), "kernel-log"),
        (log("Jun 24 11:07:17 host kernel: usb"), "kernel-log"),
        (log(FAILED), "kernel-log"),
        (log("", "-- Journal begins at Mon --", at(1, "x")), "kernel-log"),
        (log(journal("x")), "journal-json"),
        (log("Ubuntu login:", at(1, "x"), at(2, "x")), "kernel-log"),
        (ONE_CALL + log(at(1, FAILED)) * 9, "ftrace"),
        # ftrace_dump_on_oops prints a trace into the log.
        (log(at(1, "CPU 0/KVM-7 [001] ..... 1.000001: kvm_entry: vcpu 0")), "kernel-log"),
    ],
)
def test_a_log_is_detected_by_its_lines(text: str, form: str) -> None:
    assert detect_text(text.encode(), "x").name == form


@pytest.mark.parametrize(
    "text", ["Hello,\n", '{"a": 1}\n', "{" * 2000 + "\n", "Jun 24 11:07:17 h cron: x\n"]
)
def test_other_text_is_no_log(text: str) -> None:
    with pytest.raises(FormatError, match="not a trace"):
        detect_text(text.encode(), "x")


def test_a_log_without_tdx_is_no_trace_alone_but_may_accompany_one(tmp_path: Path) -> None:
    quiet = log(at(1, "usb 1-1: new device"))
    with pytest.raises(FormatError, match="without a message about TDX"):
        read_text(quiet)
    path = tmp_path / "dmesg.txt"
    path.write_text(quiet)
    trace = read_text(ONE_CALL, dmesg=[path])
    assert trace.kernel_messages.is_empty()
    assert is_accounted_for(trace)


def test_what_is_given_as_a_log_must_be_one(tmp_path: Path) -> None:
    path = tmp_path / "dmesg.txt"
    for text in (ONE_CALL, "\0\0\0\0"):
        path.write_text(text)
        with pytest.raises(FormatError, match="not a kernel log"):
            read_text(ONE_CALL, dmesg=[path])
    with pytest.raises(InputError, match="no such trace"):
        read_text(ONE_CALL, dmesg=[tmp_path / "gone"])


def test_merging_says_on_which_clock(tmp_path: Path) -> None:
    path = tmp_path / "dmesg.txt"
    path.write_text(log(at(1.000002, FAILED)))
    trace = read_text(ONE_CALL, dmesg=[path])
    assert trace.kernel_messages["source"].to_list() == [1]
    assert any("compared by time" in note and "default" in note for note in trace.provenance.notes)
    path.write_text(log("[Mon Jun 24 11:07:17 2024] " + FAILED))
    notes = read_text(ONE_CALL, dmesg=[path]).provenance.notes
    assert any("NOT compared" in note and "dmesg without -T" in note for note in notes)


@pytest.mark.parametrize("ending", ["\n", "\r\n", ""])
def test_line_ends_and_damage(ending: str) -> None:
    text = at(1, FAILED) + ending
    assert only(read_text(text))["rdx"] == 0x400
    row = only(read_text(b"\xef\xbb\xbf" + text.encode()))
    assert row["rdx"] == 0x400
    assert only(read_text(b"\xff\xfe\0\n" + text.encode()))["seq"] == 2


def test_hostile_text_is_kept_short_and_as_it_is() -> None:
    row = only(read_text(log(at(1, FAILED + " \x1b[31m" + "x" * 5000))))
    assert "\x1b[31m" in row["text"]
    assert len(row["text"]) == 400


def test_public_logs_of_real_hosts_are_read() -> None:
    if not REAL.exists():
        pytest.skip(f"{REAL} is not here: the collection of public log lines")
    trace = read_text(REAL.read_bytes())
    only(trace)
    counts = dict(trace.kernel_messages.group_by("message").len().rows())
    assert counts["seamcall_failed"] >= 17
    assert counts["warning"] == 2
    assert {0x8000_0200_0000_0080, 0xC000_0B08_0000_0001} <= set(trace.kernel_messages["status"])


PIECES = st.sampled_from(
    [
        FAILED,
        "virt/tdx: SEAMCALL (0x0000000000000022) failed: 0xc000050500000000",
        "virt/tdx: RCX 0x1 RDX 0x2 R08 0x3",
        "virt/tdx: R09 0x1 R10 0x2 R11 0x3",
        "WARNING: CPU: 1 PID: 2 at arch/x86/kvm/vmx/tdx.c:5 tdx_track+0x1/0x2",
        "RAX: c000030000000001 RBX: 0000000000000001 RCX: 0",
        "pr_tdx_error: 5 callbacks suppressed",
        "------------[ cut here ]------------",
        "usb 1-1: new device",
        "",
    ]
)
LINES = st.lists(
    st.one_of(
        st.tuples(st.sampled_from([head for head, _, _ in HEADS]), PIECES).map("".join),
        st.text(st.characters(codec="utf-8", exclude_characters="\n"), max_size=30),
        PIECES.map(journal),
        # Lines of entries of several lines, in any order.
        st.sampled_from(
            [
                "{",
                "}",
                "},{",
                "]",
                '"dmesg": [',
                "MESSAGE=" + FAILED,
                "MESSAGE",
                "    _PID=1",
                "A=b",
            ]
        ),
        PIECES.map(lambda text: pretty(text).rstrip("\n")),
    ),
    max_size=12,
)


# What may stand before what: each is there or not.
NESTED = st.tuples(
    st.sampled_from(["", "> ", ">> ", "   ", "\t", "> > "]),
    st.sampled_from(["", "\x1b[32m", "\x1b[0m\x1b[1;31m"]),
    st.sampled_from(["", "<3>", "kernel: ", "2024-06-24T11:07:17.5Z stdout F "]),
    st.sampled_from(
        [
            "",
            "Jun 24 11:07:17 h kernel: ",
            "1719227237.5 h kernel: ",
            "24. Juni 11:07:17 h kernel: ",
        ]
    ),
    st.sampled_from(["", "\x1b[0m"]),
    st.sampled_from(["", "[    1.500000] ", "[    1.500000][  T12] ", "4,1234,1500000,-;"]),
    st.sampled_from(["", "\xa0 ", "\x1b[33m"]),
).map("".join)


@given(NESTED)
def test_heads_may_be_nested(head: str) -> None:
    text = log(head + FAILED, head + "WARNING: CPU: 1 PID: 2 at arch/x86/kvm/vmx/tdx.c:5")
    trace = read_text(text)
    assert trace.kernel_messages["message"].to_list() == ["seamcall_failed", "warning"]
    if "1.5000" in head or "1500000" in head:
        assert trace.kernel_messages["ts_ns"].to_list() == [3 * S // 2] * 2


REGISTERS = "virt/tdx: RCX 0x1 RDX 0x2 R08 0x3"
WARNED = "WARNING: CPU: 76 PID: 2842 at arch/x86/kvm/vmx/tdx.c:275 __tdx_reclaim_page+0xac/0xe0"


@pytest.mark.parametrize("head", [head for head, _, _ in HEADS], ids=lambda head: head or "bare")
def test_messages_that_begin_a_line_are_found_behind_every_head(head: str) -> None:
    """Warnings and registers are told by how they begin, so a head that stays on hides them."""
    lines = ("SEAMCALL TDH_VP_INIT failed: 0x8000020000000080", REGISTERS, WARNED)
    trace = read_text(log(*(head + line for line in lines)))
    rows = trace.kernel_messages.select("message", "rcx", "function", "n_lines").rows()
    assert rows == [
        ("seamcall_failed", 1, None, 2),
        ("warning", None, "__tdx_reclaim_page", 1),
    ]


@given(LINES, st.booleans(), st.sampled_from(["kernel-log", "journal-json", "journal-export"]))
def test_no_line_of_a_log_vanishes(lines: list[str], ended: bool, form: str) -> None:
    first = exported(FAILED) if form == "journal-export" else ""
    text = first + log(at(1, FAILED), journal(FAILED), *lines)
    trace = read_text(text if ended else text[:-1], input_format=form)
    trace.check()
    assert is_accounted_for(trace), accounts(trace)


@pytest.mark.parametrize(
    "stamp", ["[Mon Jan  1 00:00:00 9999]", "[Mon Jan  1 00:00:00 0001]", "9999-12-31T23:59:59Z"]
)
def test_a_time_that_no_column_holds_is_not_known(stamp: str) -> None:
    row = only(read_text(log(f"{stamp} virt/tdx: module initialized")))
    assert (row["message"], row["ts_ns"]) == ("module_state", None)
