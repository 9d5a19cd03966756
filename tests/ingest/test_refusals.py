"""Refusals of other texts: the tool that wrote them, and what to run instead."""

from __future__ import annotations

import gzip
import re
import tarfile
from pathlib import Path
from typing import Literal

import pytest
from support.texts import ONE_CALL, aug, aug_ret, read_text

from tdxtrace.errors import FormatError

LINES = Path(__file__).parent.parent / "lines"

PERF_KVM_STAT = """\

Analyze events for all VMs, all VCPUs:

             VM-EXIT    Samples  Samples%     Time%    Min Time    Max Time         Avg time

       EPT_VIOLATION       1203    62.11%    11.35%      1.50us    412.17us     12.21us

Total Samples:1937, Total events handled time:129405.11us.
"""
PERF_REPORT = """\
# To display the perf.data header info, please use --header/--header-only options.
#
# Samples: 1K of event 'kvm:kvm_exit'
#
# Overhead  Command  Shared Object      Symbol
# ........  .......  .................  ..............
    62.11%  CPU 0/KVM  [kernel.kallsyms]  [k] tdx_vcpu_run
"""
PERF_STAT = """\

 Performance counter stats for 'system wide':

             1,203      kvm:kvm_exit

       1.001204341 seconds time elapsed
"""
PERF_DUMP = """\

0x928@perf.data [0x390]: event: 69
.
. ... raw event: size 912 bytes
"""
BCC = """\
Tracing... Hit Ctrl-C to end.
     usecs               : count     distribution
         0 -> 1          : 12       |****                                    |
         2 -> 3          : 120      |****************************************|
"""
BPFTRACE_MAPS = """\
Attaching 2 probes...
^C

@[kvm_exit]: 1203
@hist:
[2K, 4K)             120 |@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@|
"""
STRACE = """\
[pid  1201] ioctl(21, KVM_RUN, 0) = 0 <0.000012>
[pid  1201] ioctl(21, KVM_RUN, 0) = 0 <0.000012>
"""
GUEST = """\
  swapper/0-1 [000] d.... 1.000001: tdx_hypercall: fn=0x10001
"""
GUEST_LOG = """\
[    0.000000] tdx: Guest detected
[    0.000000] tdx: Attributes: SEPT_VE_DISABLE
[    0.500000] Memory Encryption Features active: Intel TDX
"""
OTHERS = "Nov 12 11:22:33 host mallory[7]: SEAMCALL TDH_VP_INIT failed: 0x8000020000000080\n"
VMGEXIT = " CPU 0/KVM-7 [001] d..2. 12.000001: kvm_vmgexit_enter: vcpu 0, exit_reason 0x80000010\n"
STACKS = """\
Tracing 1 functions for "tdh_mem_page_aug"... Hit Ctrl-C to end.
  tdh_mem_page_aug
  tdx_sept_set_private_spte
    12
"""
XXD = """\
00000000: 2020 2020 2020 2043 5055 2030 2f4b 564d         CPU 0/KVM
00000010: 2d37 2020 2020 2020 205b 3030 315d 202e  -7       [001] .
"""
OF_MAIL = "From a@b Wed Nov 12 11:22:33 2025\nContent-Transfer-Encoding: base64\n\nQ1BVIDAv\n"
NO_TIME = " CPU 0/KVM 14402 [001]    kvm:kvm_exit: vcpu 0 reason EPT_VIOLATION rip 0x0\n"
STAT = "cpus=2\n\nKernel buffer statistics:\n  Note: entries\nCPU: 0\nentries: 0\n"


TWO = "tdh_mem_page_aug, tdh_mem_page_remove"
FUNCTIONS = """\
# tracer: function
#
       CPU 0/KVM-1234    [001] .....    12.000001: tdh_mem_page_aug <-tdx_sept_set_private_spte
       CPU 0/KVM-1234    [001] .....    12.000009: tdh_mem_page_remove <-tdx_sept_zap
"""


@pytest.mark.parametrize(
    ("text", "tool", "instead", "ours"),
    [
        (
            (LINES / "perf-trace-not-script.txt").read_text(),
            "perf trace",
            "perf script",
            "kvm_exit",
        ),
        (PERF_KVM_STAT, "perf kvm stat", "perf record", ""),
        (PERF_REPORT, "perf report", "perf script", "kvm_exit, tdx_vcpu_run"),
        (PERF_STAT, "perf stat", "perf record", "kvm_exit"),
        (PERF_DUMP, "perf script -D", "without -D", ""),
        (BCC, "bcc", "tdxtrace capture record", ""),
        (BPFTRACE_MAPS, "bpftrace", "tdxtrace capture record", "kvm_exit"),
        (STRACE, "strace", "tdxtrace capture record", ""),
        ("# tracer: nop\n#\n1234 1 12000001000 type: 1540\n", "options/raw", "echo 0", ""),
        ("000004d2 00000001 00000002cb417a28 type: 1540\n", "options/hex", "echo 0", ""),
        ("\x04\xd2\0\0\1\0\0\0\2\xcb\x41type: 1540\n", "options/bin", "echo 0", ""),
        (FUNCTIONS, "functions", "nop > current_tracer", TWO),
        (FUNCTIONS.partition("\n")[2], "functions", "nop > current_tracer", TWO),
        (NO_TIME, "perf script", "-F +time", "kvm_exit"),
        (STAT, "trace-cmd report --stat", "without --stat", ""),
        (GUEST, "of a guest", "trace the host", ""),
        (OTHERS, "of other programs", "journalctl -k", ""),
        (GUEST_LOG, "of a guest", "trace the host", ""),
        (VMGEXIT, "AMD host", "Intel", ""),
        (STACKS, "bcc", "tdxtrace capture record", "tdh_mem_page_aug"),
        (XXD, "hex dump", "xxd -r", ""),
        ("QUJD" * 19 + "\n", "base64", "base64 -d", ""),
        (OF_MAIL, "base64", "base64 -d", ""),
        (re.sub(" +", ";", ONE_CALL), "table of cells", "tr ',;' ' '", "tdh_mem_page_aug"),
        (re.sub(r"(\d)\.(\d{6})", r"\1,\2", ONE_CALL), "commas", "LC_ALL=C", "tdh_mem_page_aug"),
        (repr(ONE_CALL.splitlines()), "many lines in one", "jq -r", "tdh_mem_page_aug"),
        ("FUNC    COUNT\nb'tdh_vp_enter'  12\n", "bcc", "tdxtrace capture record", "tdh_vp_enter"),
        ("PID  TID  KVM_EXIT_REASON  COUNT\n1 2 EXIT_REASON_HLT 6\n", "bcc", "record", ""),
        ("[12:00:01]\n\tCOUNT      EVENT\n\t12  $retval = 0\n", "bcc", "record", ""),
        (STRACE.replace("[pid  1201]", "1201  12:00:01.000001"), "strace", "record", ""),
        ("1701000000.123460 ioctl(21, KVM_RUN <unfinished ...>\n", "strace", "record", ""),
        ("% time     seconds  usecs/call     calls\n", "strace", "record", ""),
        ("     0.050135547,102.11,msec,cpu-clock\n", "perf stat", "perf record", ""),
        ("    32.56%  CPU 0/KVM\n", "perf report", "perf script", ""),
        ('{\n\t"linux-perf-json-version": 1,\n', "perf data convert", "perf script", ""),
        ("\n Tracing meta data in file t.dat:\n", "trace-cmd dump", "trace-cmd report", ""),
    ],
)
def test_the_line_names_the_tool_and_what_to_run(
    text: str, tool: str, instead: str, ours: str
) -> None:
    for form in (text, text.replace("\n", "\r\n")):
        with pytest.raises(FormatError) as raised:
            read_text(form)
        said = str(raised.value)
        assert "\n" not in said
        assert tool in said
        assert instead in said
        assert not ours or f"{ours} would be read" in said


@pytest.mark.parametrize("text", [PERF_KVM_STAT, PERF_STAT, BCC, BPFTRACE_MAPS, STRACE, STAT])
def test_calls_beside_such_text_are_read(text: str) -> None:
    """People put several things into one file."""
    for both in (text + ONE_CALL, ONE_CALL + text):
        assert read_text(both).seamcalls.height == 1


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"\x04\x22\x4d\x18" + ONE_CALL.encode(), "is lz4; recompress it"),
        (gzip.compress(gzip.compress(ONE_CALL.encode())), "is packed twice; unpack it once"),
        (b"7z\xbc\xaf'\x1c" + ONE_CALL.encode(), "is a 7z archive; unpack it first"),
        (rb"{\rtf1\ansi " + ONE_CALL.encode(), "save it as plain text"),
    ],
)
def test_what_packs_a_text_is_named(data: bytes, said: str) -> None:
    with pytest.raises(FormatError, match=said):
        read_text(data)


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_an_archive_is_not_read_as_its_first_file(
    tmp_path: Path, mode: Literal["w", "w:gz"]
) -> None:
    (tmp_path / "trace.txt").write_text(ONE_CALL)
    with tarfile.open(tmp_path / "a.tar", mode) as archive:
        archive.add(tmp_path / "trace.txt", "trace.txt")
    with pytest.raises(FormatError, match="is a tar archive; unpack it first"):
        read_text((tmp_path / "a.tar").read_bytes())


def test_a_text_with_its_newest_line_first_is_refused() -> None:
    """As journalctl -r and viewers of logs print it; calls would lose their returns."""
    lines = [aug(f"1.{n:06}") + aug_ret(f"1.{n + 2:06}") for n in range(0, 50, 5)]
    assert read_text("".join(lines)).seamcalls.height == 10
    turned = reversed("".join(lines).splitlines(keepends=True))
    with pytest.raises(FormatError, match="newest line first; turn it round: tac FILE"):
        read_text("".join(turned))


def test_what_is_not_known_shows_its_first_line() -> None:
    with pytest.raises(FormatError, match="is not a trace: its first line is 'hello'"):
        read_text("hello\nworld\n")
