"""Kernel messages are found behind any prefix of a log, a terminal or a mail."""

from __future__ import annotations

import random
import shutil
import textwrap
from pathlib import Path

import pytest
from support.dmesg import printed_by_dmesg
from support.texts import is_accounted_for, lost, read_text

from tdxtrace.errors import InputError

CASES = 200
MIN_FOUND = 0.95
"""Of the lines that were not wrapped; each of the others is a loss or a refusal."""

# One message of each kind that kernels, out of tree patches and module loaders print.
MESSAGES = (
    "SEAMCALL TDH_VP_INIT failed: 0x8000020000000080",
    "kvm_intel: SEAMCALL TDH_MEM_PAGE_REMOVE failed: 0x8000020000000092, rcx 0x5, rdx 0x400",
    "kvm_intel: SEAMCALL TDH_PHYMEM_PAGE_RECLAIM failed: 0xc000030000000001, rcx 0x7, rdx 0x2",
    "virt/tdx: SEAMCALL (21) failed: 0xc000090000000000",
    "tdx: SEAMCALL failed: CPU 94: leaf 33, error 0xc000092100000122.",
    "tdx: SEAMCALL[TDH.SYS.INIT] failed on cpu 3: TDX_SYS_BUSY (0x8000020200000000)",
    "virt/tdx: TDH.SYS.DISABLE failed: 0xc000010000000000",
    "TDH.MNG.INIT failed with status: 0xc000010000000045",
    "kvm_intel: TDH_VP_RD[MANAGEMENT.0x20] failed 0xc000010000000001",
    "kvm_intel: TDH_VP_WR[VMCS.0x4] = 0x1f failed: 0xc000010000000001",
    "virt/tdx: module initialized",
    "virt/tdx: BIOS enabled: private KeyID range [64, 128)",
    "virt/tdx: 1050644 KB allocated for PAMT",
    "virt/tdx: Module version: 1.5.06.00, build_num 744",
)

# What stands before a message, by the tool that writes it.
PREFIXES = (
    "[  896.162769] ",  # dmesg
    "[  896.162769] [T12345] ",  # dmesg, with the thread
    "[  896.162769] [   C12] ",
    "[  896.162769][T12345] ",  # console
    "[  896.162769 <    0.000012>] ",  # dmesg -d
    "[  +0.000012] ",  # dmesg -e
    "[Nov12 11:22] ",  # dmesg -H
    "[Wed Nov 12 11:22:33 2025] ",  # dmesg -T
    "kern  :err   : [  896.162769] ",  # dmesg -x
    "kern  :err   : [Wed Nov 12 11:22:33 2025] ",  # dmesg -xT
    "<3>[  896.162769] ",  # dmesg -r
    "4,1234,896162769,-;",  # /dev/kmsg
    "2025-11-12T11:22:33,123456+01:00 ",  # dmesg --time-format iso
    "Nov 12 11:22:33 host kernel: ",  # journalctl, syslog
    "Nov 12 11:22:33 host kernel: [  896.162769] ",
    "Nov 12 11:22:33.123456 host kernel: ",  # -o short-precise
    "Wed 2025-11-12 11:22:33 CET host kernel: ",  # -o short-full
    "1762942953.123456 host kernel: ",  # -o short-unix
    "1762942953.123456 ",  # ts %.s
    "[  896.162769] host kernel: ",  # -o short-monotonic
    "2025-11-12T11:22:33.123456+01:00 host kernel[0]: [  896.162769] ",  # rsyslog
    "2025-11-12T11:22:33.123456+01:00 host kernel: ",
    "<3>1 2025-11-12T11:22:33.123456+01:00 host kernel - - - [  896.162769] ",  # RFC 5424
    "kernel: [  896.162769] ",  # kubelet, IPMI, virsh console
    "2026-01-01T00:00:00.000000000Z stdout F ",  # containers
    *("trace-1  | ", "[pod/x/main] ", "[2025-11-12 11:22:33] ", "11:22:33.123 ", "+", "(early) "),
)
# What a collector of logs, a mail or a terminal adds in front of a line that is whole.
AROUND = ("", "", "", "> ", ">> ", "    ", "\t", "12:", "  42\t", "host-3 | ", "stdout F ")
COLOURS = (("", ""), ("", ""), ("\x1b[31m", "\x1b[0m"), ("\x1b[1;33m", "\x1b[m"))
WIDTHS = (None, None, 64, 76)

# A line by which a log of one line more is recognised.
CONTEXT = "[  896.000000] virt/tdx: module initialized\n"

Found = list[tuple[object, ...]]


def found(text: str) -> Found | None:
    """Kind, leaf and status of the messages that are read; None for a refusal or a counted loss."""
    try:
        trace = read_text(CONTEXT + text)
    except InputError as error:
        assert "\n" not in str(error)  # noqa: PT017
        return None
    assert is_accounted_for(trace)
    if lost(trace):
        return None
    return trace.kernel_messages.select("message", "leaf", "status").rows()[1:]


def decorated(message: str, chance: random.Random) -> tuple[str, bool]:
    """A line of a log with the message, and whether it is whole or wrapped."""
    before = "".join(chance.choice(PREFIXES) for _ in range(chance.choice((1, 1, 1, 2))))
    on, off = chance.choice(COLOURS)
    line, width = before + on + message + off, chance.choice(WIDTHS)
    lines = textwrap.wrap(line, width, break_long_words=False) if width else [line]
    around = chance.choice(AROUND)
    return "".join(f"{around}{part}\n" for part in lines), len(lines) == 1


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_is_found_behind_every_prefix(message: str) -> None:
    plain = found(f"[  896.162769] {message}\n")
    assert plain
    for prefix in PREFIXES:
        assert found(f"{prefix}{message}\n") == plain, prefix


def test_no_message_is_lost_in_silence_however_it_is_decorated() -> None:
    chance = random.Random(17)
    plain = {message: set(found(f"[  896.162769] {message}\n") or ()) for message in MESSAGES}
    n_whole = n_found = 0
    for _ in range(CASES):
        message = chance.choice(MESSAGES)
        text, is_whole = decorated(message, chance)
        read = found(text)
        assert read is None or set(read) >= plain[message], text
        n_whole += is_whole
        n_found += is_whole and read is not None
    assert n_found >= n_whole * MIN_FOUND


@pytest.mark.skipif(shutil.which("dmesg") is None, reason="dmesg of util-linux is not installed")
def test_all_that_dmesg_prints_is_the_same_log(tmp_path: Path) -> None:
    plain = [found(f"[  896.162769] {message}\n") for message in MESSAGES]
    forms = 0
    for options, text in printed_by_dmesg(tmp_path, MESSAGES):
        trace = read_text(text)
        rows = trace.kernel_messages.select("message", "leaf", "status").rows()
        assert [[row] for row in rows] == plain, options
        assert lost(trace) == {}, options
        assert is_accounted_for(trace), options
        forms += 1
    assert forms > 20
