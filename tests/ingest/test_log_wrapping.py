"""Wrapped log lines are joined or counted as lost, and never partly read."""

from __future__ import annotations

import textwrap
from collections.abc import Callable

import pytest
from support.texts import is_accounted_for, lost, read_text

from tdxtrace.ingest.kernel_log.messages import parse_message
from tdxtrace.ingest.kernel_log.wrapping import join

FAILED = "kvm_intel: SEAMCALL TDH_MEM_PAGE_REMOVE failed: 0x8000020000000092, rcx 0x5, rdx 0x400"
WARNED = (
    "WARNING: CPU: 76 PID: 2842 at arch/x86/kvm/vmx/tdx.c:275 __tdx_reclaim_page+0xac/0xe0 [kvm]"
)
BUILD = (
    "virt/tdx: TDX module: attributes 0x0, vendor_id 0x8086, major_version 1, minor_version 5, "
    "build_date 20240129, build_num 698"
)
MESSAGES = (
    FAILED,
    WARNED,
    BUILD,
    "SEAMCALL TDH_VP_INIT failed: 0x8000020000000080",
    "virt/tdx: SEAMCALL failed: CPU 94: leaf 33, error 0x8000020000000092",
    "virt/tdx: SEAMCALL (0x0000000000000022) failed: 0xc000050500000000",
    "kvm [4242]: TD vp_enter_ret 0x8000020000000092",
    "RAX: c000030000000001 RBX: 0000000000000001 RCX: 0000000000000000",
    "kvm_intel: Guest access before accepting 0x12345000 on vCPU 3",
)


@pytest.mark.parametrize("message", MESSAGES)
def test_what_a_mailer_wrapped_is_joined_at_any_width(message: str) -> None:
    for width in range(40, len(message)):
        parts = textwrap.wrap(message, width, break_long_words=False, break_on_hyphens=False)
        _, text = join(parts)
        assert text == message[: len(text)]
        assert parse_message(text) == parse_message(message)


@pytest.mark.parametrize("message", MESSAGES)
def test_what_a_terminal_cut_is_joined_or_lost_and_never_half_read(message: str) -> None:
    for width in range(40, len(message)):
        parts = [message[at : at + width] for at in range(0, len(message), width)]
        _, text = join(parts)
        assert not text or parse_message(text) == parse_message(message)


@pytest.mark.parametrize(
    ("lines", "n", "text"),
    [
        (("SEAMCALL TDH_VP_INIT failed: 0x80000200", "00000080"), 2, "".join),
        # 0x5 or 0x512: nobody knows.
        ((FAILED.partition(", rdx")[0], "12, rdx 0x400"), 2, lambda _: ""),
        (("SEAMCALL TDH_VP_INIT failed: 0x8000020000000080", "12 of these"), 1, lambda x: x[0]),
        (("SEAMCALL TDH_VP_INIT failed: 0x8000020000000080", "Any idea?"), 1, lambda x: x[0]),
        (("usb 1-1: new device", "number 7"), 1, lambda x: x[0]),
        (("virt/tdx: some new", "words of it"), 1, lambda x: x[0]),
        (("SEAMC", "ALL in new words"), 2, "".join),
    ],
)
def test_lines_are_joined_only_where_they_say_more(
    lines: tuple[str, ...], n: int, text: Callable[[tuple[str, ...]], str]
) -> None:
    assert join(lines) == (n, text(lines))


@pytest.mark.parametrize(
    "prefix", ["", "+", "trace-1  | ", "[2025-11-12 11:22:33] ", "host login: "]
)
@pytest.mark.parametrize("first", ["virt/tdx: module initialized", MESSAGES[3], FAILED])
def test_a_message_without_a_prefix_does_not_go_on_with_another(prefix: str, first: str) -> None:
    """A log that was pasted together: the failure must not become a part of the line before."""
    trace = read_text(f"[  896.162769] {first}\n{prefix}{FAILED}\n[  896.162770] {first}\n")
    rows = trace.kernel_messages.select("message", "status", "rcx")
    assert rows.height == 3
    assert rows.row(1) == ("seamcall_failed", 0x8000_0200_0000_0092, 5)
    assert is_accounted_for(trace)
    assert lost(trace) == {}


def test_a_prefix_may_be_cut_too() -> None:
    head = "<3>1 2025-11-12T11:22:33.123456+01:00 host kernel - - - [  896.1627"
    trace = read_text(f"{head}\n69] {WARNED[:40]}\n{WARNED[40:]}\n[  896.162770] {FAILED}\n")
    rows = trace.kernel_messages.select("seq", "message", "function").rows()
    assert rows == [(1, "warning", "__tdx_reclaim_page"), (4, "seamcall_failed", None)]
    assert lost(trace) == {"joined": 2}
    assert is_accounted_for(trace)


def test_a_wrapped_log_in_a_mail() -> None:
    text = f"""\
> [  896.162769] {FAILED[:60].rstrip()}
> {FAILED[60:].strip()}
> [  896.162770] usb 1-1: new device
> number 7
> [  896.162771] SEAMCALL TDH_MEM_PAGE_AUG failed: 0x8000020000000092, rcx 0x5
> 12, rdx 0x400
What is that?
"""
    trace = read_text(text)
    rows = trace.kernel_messages.select("seq", "ts_ns", "leaf", "rcx", "rdx", "text").rows()
    assert rows == [(1, 896_162_769_000, 29, 5, 0x400, FAILED)]
    assert lost(trace) == {"joined": 1, "noise": 3, "wrapped": 2}
    assert is_accounted_for(trace)
    assert trace.losses.filter(kind="wrapped")["severity"].to_list() == ["error"]
