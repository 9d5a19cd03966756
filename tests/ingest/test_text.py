"""The loop over lines gives the events and losses of the line reader."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.ways import blocks_of, by_block, by_line, same

from tdxtrace.compiler import compiled, interpreted
from tdxtrace.ingest.events.registry import EventRegistry
from tdxtrace.ingest.stats import SourceStats
from tdxtrace.ingest.text import line_formats
from tdxtrace.ingest.text.line_formats import LineFormat
from tdxtrace.ingest.text.reader import LineReader, TextReader

# Lines of one kind: `{n}` becomes another number on each line, `{h}` another in hex, `{w}` a
# word of 16 hex digits, `{d}` digits of any length, `{t}` the stamp's fraction.
HEADS = {
    "tracefs": "       CPU {n}/KVM-7{n}{n}     [00{n}] ..... 1234.{t}: ",
    "no flags": "       CPU {n}/KVM-7{n}{n}     [00{n}]  1234.{t}: ",
    "four flags": "           a.out-2002{n} [001] d.h. 2323301.{t}: ",
    "tgid": "       CPU 0/KVM-7{n}{n}     (   7100) [00{n}] DBZff  1234.{t}: ",
    "unknown tgid": "          <idle>-0       (-------) [00{n}] d.h..  1234.{t}: ",
    "tgid of 5 columns": "       CPU 0/KVM-7{n}{n}     (  710) [00{n}] d.h..  1234.{t}: ",
    "trace-cmd": "        fake_tdx-1505{n} [000]  4217.{t}: ",
    "nine decimals": "        fake_tdx-1505{n} [000]  4217.{t}{n}{n}{n}: ",
    "integer clock": "        fake_tdx-1505{n} [000]421719{t}: ",
    "instance": "rig:         fake_tdx-1791{n} [000]  4242.{t}: ",
    "latency": "    fake-2354{n}     {n}DBZff {n}9678us+: ",
    "perf": "        fake_tdx 1634{n} [00{n}]  4226.{t}:           tdx:",
    "perf pid": "        fake_tdx 16341/1634{n} [00{n}]  4226.{t}:           tdx:",
    "perf ns": "       CPU 0/KVM 1440{n} [00{n}]  4212.{t}{n}{n}{n}:    tdx:",
    "quoted": "> >        CPU {n}/KVM-7{n}{n}     [00{n}] ..... 1234.{t}: ",
    "long name": "com.android.systemui-611   (  611) [001] d..5 514769.{t}: ",
    "bytes": "      CPU \u00e9\u00e8/K-7{n}{n}     [00{n}] ..... 1234.{t}: ",
}
EVENTS = {
    "entry": "aug_in: (0x5646b46b3a5{h}) td=0x{w} gpa=0x8{h}{h}000 level={n}",
    "return": "aug_out: (0x56{h}6b46b5e9e <- 0x5646b46b3a5{h}) ret=0x8000020000000{h}9{h}",
    "success": "aug_out: (0x56{h}6b46b5e9e <- 0x5646b46b3a5{h}) ret=0x0",
    "decimal": "aug_in: (0x5646b46b3a5{h}) td={d} gpa={d} level={n}",
    "signed": "aug_out: (0x5646 <- 0x5647) ret=-92233698378315{n}{n}110",
    "bare hex": "aug_in: (0x5646) td={w} gpa=8{h}{h}000 level={n}",
    "bare status": "aug_out: (0x5646 <- 0x5647) ret=8000020{n}0000{n}0{n}{n}",
    "by symbol": "x_{n}: (tdh_mem_track+0x{h}/0xb0) td=0xff{h}",
    "fault": "aug_in: (0x5646) td=(fault) gpa=0x{h}000",
    "zero as nothing": "aug_out: __probe_func=5646{h} __probe_ret_ip=564{h} ret=0x",
    "lower layer": "sc: (tdh_x+0x{h}b/0xb0 <- __seamcall) ret=0x{h} fn=0x{h} rcx=0x{w} rdx=0x{h}",
    "fields": "aug_in: __probe_ip=0x5{h} (94{n}) td=0x5{h} (9{n}) gpa=0x1{h} (4{n}) level=0x0 (0)",
    "kvm_entry": "kvm_entry: vcpu {n}, rip 0x{h}",
    "kvm_entry 6.14": "kvm_entry: vcpu {n}, rip 0x0 intr_info 0x0000000{h} error_code 0x00000000",
    "immediate": "kvm_entry: vcpu {n}, rip 0x0[immediate exit]",
    "kvm_exit": "kvm_exit: vcpu {n} reason EPT_VIOLATION rip 0x{h} info1 0x{w} info2 0x{w} "
    "intr_info 0x0000000{h} error_code 0x00000000 requests 0x000000000000000{h}",
    "refused": "kvm_exit: vcpu {n} reason 0xffff FAILED_VMENTRY 0x7fff0000 rip 0x0 info1 0x{w}",
    "kvm_exit 4.x": "kvm_exit: reason EPT_VIOLATION rip 0x{h}0 info {n}8{n} 0",
    "kvm_exit 4.x hex": "kvm_exit: reason HLT rip 0x{h}0 info {h}0 8000{n}b0e",
    "plugin": "kvm_exit:             reason UNKNOWN ({n}7) rip 0x0 info {n}1 {n}",
    "raw": "kvm_exit: exit_reason={n}{n} guest_rip=0x{h} isa=1 info1=0x{w} vcpu_id={n} requests=0x",
    "kvm_page_fault": "kvm_page_fault: vcpu {n} rip 0x0 address 0x{w} error_code 0x{h}",
    "kvm_page_fault 4.x": "kvm_page_fault: address {n}0000000 error_code {n}81",
    "kvm_page_fault 4.x hex": "kvm_page_fault: address fee0{h}000 error_code {n}",
    "userspace": "kvm_userspace_exit: reason KVM_EXIT_IO ({n})",
    "errno": "kvm_userspace_exit: reason error (1{n})",
    "sched": "sched_switch: prev_comm=swapper/{n} prev_pid={n} ==> next_pid={n}{n}",
    "proposed": "tdx_seamcall: op: TDH_MEM_PAGE_AUG(6) {h}0000000 12{n}00 13{n}00 0 0",
    "proposed return": "tdx_seamret: op: TDH_MEM_PAGE_AUG(6) err: BUSY(800002000000009{n}) 0 0 0",
    "undecoded": "kvm_exit: TRAP: HSR_EC: 0x002{n} (IABT_LOW)",
    "unmapped": "p_0x4240: (0x556e6d3ab24{n})",
    "no event": "sys_recvmsg -> 0x{n}4",
}
OTHERS = {
    "header": "# a comment {n}",
    "lost": "CPU:{n} [LOST {n}{n} EVENTS]",
    "dropped": "CPU:{n} [EVENTS DROPPED]",
    "perf lost": "            fake 2445{n} [00{n}]  1203.{t}: PERF_RECORD_LOST lost 48{n}",
    "chain": "\tffffffff8106{h} tdh_mem_page_aug+0x4 ([kernel.kallsyms])",
    "empty": "",
    "text": "nothing that a tool printed {n}",
    "cut": "       CPU 0/KVM-7      [00{n}] ..... 12",
}
IN_PERF = [name for name in HEADS if name.startswith("perf")]
IN_FTRACE = [name for name in HEADS if name not in IN_PERF]


def draw(what: str, k: int, luck: random.Random) -> str:
    """What stands for ``{what}`` on line ``k``."""
    if what == "t":
        return f"{10 * k:06}"
    if what == "d":
        return str(luck.randrange(10 ** luck.choice((1, 5, 16, 19))))
    if what == "w":
        return f"{luck.randrange(1 << 64):016x}"
    return str(luck.randrange(10)) if what == "n" else f"{luck.randrange(16):x}"


def lines_of(patterns: Sequence[str], n: int, seed: int) -> list[bytes]:
    """``n`` lines of these patterns, with other numbers on each."""
    luck = random.Random(seed)
    made = []
    for k in range(n):
        parts = re.split(r"\{(\w)\}", luck.choice(patterns))
        parts[1::2] = [draw(what, k, luck) for what in parts[1::2]]
        made.append("".join(parts).encode())
    return made


# Quoted lines and names longer than their columns are read one at a time.
@pytest.mark.parametrize("head", [name for name in HEADS if name not in ("quoted", "long name")])
def test_most_lines_of_a_long_trace_are_read_in_the_loop(head: str) -> None:
    """Else the tests below would compare the line-at-a-time reader with itself."""
    patterns = [HEADS[head] + EVENTS[name] for name in ("entry", "return", "success", "sched")]
    n_events, n_slow = counted(
        lines_of(patterns, 4000, 1), "perf-script" if head in IN_PERF else "ftrace"
    )
    assert n_events > 2000
    assert n_slow < 400


def counted(lines: Sequence[bytes], form: str) -> tuple[int, int]:
    """Read lines as one block; return how many events there are, and lines read one at a time."""
    reader = LineReader(form, EventRegistry(), SourceStats())
    slow: list[int] = []
    by_hand = LineReader.line

    def one(self: LineReader, number: int, line: bytes) -> Any:  # noqa: ANN401
        slow.append(number)
        return by_hand(self, number, line)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LineReader, "line", one)
        read = TextReader(reader).batches(blocks_of(lines, (len(lines),)), compiled)
        n_events = sum(map(len, read))
    assert n_events == sum(reader.stats.events.values())
    return n_events, len(slow)


STRANGE = re.compile(
    r"^<(?P<cpu>\d{1,3})> +(?P<us>\d{1,15})us (?P<comm>\S.*?) +tgid= *(?P<tgid>\d{1,7}) "
    r"+tid= *(?P<tid>\d{1,7}) +(?P<rest>.*)"
)


def test_a_new_prefix_is_one_row_and_one_pattern(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is then read one line at a time and, at once, also in the loop."""
    row = LineFormat("strange", (STRANGE,), line_formats.LINE_FORMATS[0].event)
    monkeypatch.setattr(line_formats, "LINE_FORMATS", (*line_formats.LINE_FORMATS, row))
    head = "<{n}>      1{t}us CPU {n}/KVM        tgid=   71{n} tid=   71{n} "
    lines = lines_of([head + EVENTS[name] for name in ("entry", "return", "sched")], 1000, 3)
    nameless = [re.sub(rb"CPU ./KVM", b"         ", line) for line in lines[:3]]
    same([*lines, *nameless], "strange", (300,))
    n_events, n_slow = counted(lines, "strange")
    assert n_events > 500
    assert 0 < n_slow < 400


@pytest.mark.parametrize("event", EVENTS)
def test_events(event: str) -> None:
    pattern = HEADS["tracefs"] + EVENTS[event]
    same(lines_of([pattern], 400, 1), "ftrace")


@pytest.mark.parametrize("head", HEADS)
def test_prefixes_of_all_formats(head: str) -> None:
    patterns = [HEADS[head] + EVENTS[name] for name in ("entry", "return", "sched")]
    same(lines_of(patterns, 400, 2), "perf-script" if head in IN_PERF else "ftrace")


@pytest.mark.parametrize("other", OTHERS)
def test_lines_in_between(other: str) -> None:
    patterns = [*3 * [HEADS["tracefs"] + EVENTS["entry"]], OTHERS[other]]
    same(lines_of(patterns, 400, 3), "ftrace")


def test_a_gap_ends_in_a_block_in_which_all_lines_look_alike() -> None:
    lines = lines_of([HEADS["tracefs"] + EVENTS["entry"]], 600, 11)
    lines[299] = b"CPU:3 [LOST 7 EVENTS]"
    assert by_block(lines, "ftrace", (100,)).account["gaps"][0][3] is not None
    same(lines, "ftrace", (100,))


def test_one_rare_line_among_many_common_ones() -> None:
    common = lines_of([HEADS["tracefs"] + EVENTS["sched"]], 1000, 4)
    for number, event in enumerate(EVENTS.values()):
        common.insert(7 * number * number % 997, *lines_of([HEADS["tracefs"] + event], 1, number))
    same(common, "ftrace", (1000,))


def test_a_name_may_mean_something_else_in_a_later_shape() -> None:
    """aug_in at first, then a line of it that holds nothing, then again whole ones."""
    whole = lines_of([HEADS["tracefs"] + EVENTS["entry"]], 300, 5)
    whole[150] = (HEADS["tracefs"] + "aug_in: (0x1)").format(n=1, t="001500").encode()
    same(whole, "ftrace")


@pytest.mark.parametrize(
    "wrong",
    [
        "aug_in: (0x5646b46b3a50) td=0xffx gpa=0x80000000 level=0",
        "aug_in: (0x5646b46b3a50) td=0xFF00000000000000 gpa=0x80000000 level=0",
        "aug_in: (0x5646b46b3a50) td=0xff:0000000000000 gpa=0x80000000 level=0",
        "aug_in: (0x5646b46b3a50) td=0xff`0000000000000 gpa=0x80000000 level=0",
        "aug_in: (0x5646b46b3a50) td=0xffg0000000000000 gpa=0x80000000 level=0",
        "aug_in: (0x5646b46b3a50) td=0xff00000000000000 gpa=0x80000000 level=:",
        "aug_in: (0x5646b46b3a50) td=0xff00000000000000 gpa=0x80000000 level=/",
        "aug_in: (0x5646b46b3a50) td=0xff00000000000000 gpa=0x80000000 level=0 ",
        "aug_in: (0x5646b46b3a50) td=0xff00000000000000 gpa=0x80000000 level=0\r",
        "aug_in: (0x5646b46b3a50) td=0xff00000000000000 gpa=0x80000000 level=0\0",
        "aug_in:  (0x5646b46b3a50) td=0xff00000000000000 gpa=0x80000000 level=0",
        "aug_in:(0x5646b46b3a50) td=0xff00000000000000 gpa=0x80000000 level=0",
        "aug_in : (0x5646b46b3a50) td=0xff00000000000000 gpa=0x80000000 level=0",
        "aug_in: (0x5646b46b3a50)\ttd=0xff00000000000000 gpa=0x80000000 level=0",
        "aug_in:",
        "aug_i",
        "",
    ],
)
def test_a_line_that_nearly_fits_what_was_learned(wrong: str) -> None:
    lines = lines_of([HEADS["tracefs"] + EVENTS["entry"]], 400, 6)
    odd = HEADS["tracefs"].format(n=3, t="004250") + wrong
    lines[100] = lines[250] = lines[399] = odd.encode()
    same(lines, "ftrace")


WHOLE = "       CPU 0/KVM-77      [001] ..... {stamp}: aug_in: (0x5646) td={td} gpa=0x8000 level=0"


@pytest.mark.parametrize(
    ("stamp", "td"),
    [
        ("1234.001500", "0xff00a900000000b1"),
        ("1234.001500", "123456789012345"),
        ("1234567890123456", "0xff"),
        ("1234567.001500999", "0xff"),
    ],
)
def test_one_wrong_byte_at_any_place_of_a_number(stamp: str, td: str) -> None:
    """Each line has another; of numbers of any length, as words of eight bytes are read."""
    numbers = stamp if len(td) < 10 else td
    odd = []
    for at in range(len(numbers)):
        for wrong in "/:@G`g .x\x00\xb0":
            changed = numbers[:at] + wrong + numbers[at + 1 :]
            now = {"stamp": stamp, "td": td} | {"stamp" if numbers is stamp else "td": changed}
            odd.append(WHOLE.format(**now).encode("latin-1"))
    same([*200 * [WHOLE.format(stamp=stamp, td=td).encode()], *odd], "ftrace", (200,))


@pytest.mark.parametrize("seconds", ["8999999999", "9000000000", "9223372036", "9999999999"])
def test_stamps_that_hardly_fit_and_that_do_not(seconds: str) -> None:
    usual = [WHOLE.format(stamp=f"1234567890.{k:06}", td="0xff").encode() for k in range(300)]
    odd = [WHOLE.format(stamp=f"{seconds}.{k}", td="0xff").encode() for k in (854775, 854776)]
    same([*usual, *odd, *usual, *odd], "ftrace", (300,))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"-7", b"-x"),
        (b"-7", b"- "),
        (b"-7", b"_7"),
        (b"[00", b"(00"),
        (b"[00", b"[0x"),
        (b"] .", b"]  "),
        (b"] .", b"]  ."),
        (b".....", b"....."),
        (b".....", b"d.Z2."),
        (b".....", b"d.h"),
        (b".....", b"12345"),
        (b"] .", b"]_."),
        (b" 1234.", b"_1234."),
        (b" 1234.", b"51234."),
        (b" 1234.", b" 12345."),
        (b" 1234.", b" 123."),
        (b" 1234.", b" 12:4."),
        (b" 1234.", b" 1234:"),
        (b" 1234.", b" 1234"),
        (b"CPU", b"\xff\xfe\x80"),
        (b"CPU", b"\xc3\xa9P"),
        (b"CPU", b"C\0U"),
        (b"CPU", b"\x1b[m"),
        (b": aug", b":aug"),
        (b": aug", b":  aug"),
    ],
)
def test_a_head_that_nearly_fits_what_was_learned(old: bytes, new: bytes) -> None:
    lines = lines_of([HEADS["tracefs"] + EVENTS["entry"]], 400, 7)
    for at in (90, 91, 300, 399):
        assert old in lines[at]
        lines[at] = lines[at].replace(old, new, 1)
    same(lines, "ftrace")


@pytest.mark.parametrize(
    "process", ["(   71x0)", "(    7 0)", "(   7100(", "(------7)", "(    7100", "(   71-0)"]
)
def test_a_process_that_is_no_number(process: str) -> None:
    """The head fits in every other byte."""
    lines = lines_of([HEADS["tgid"] + EVENTS["entry"]], 400, 10)
    for at in (100, 250):
        assert b"(   7100)" in lines[at]
        lines[at] = lines[at].replace(b"(   7100)", process.encode())
    same(lines, "ftrace")


@pytest.mark.parametrize("known_from", [1, 150, 299])
def test_a_process_that_is_known_only_later(known_from: int) -> None:
    """The kernel saves it when the thread is scheduled; until then it prints dashes."""
    later = lines_of(
        ["       CPU 0/KVM-77      (   7100) [001] d.h.. 1234.{t}: " + EVENTS["entry"]], 300, 1
    )
    lines = [
        line.replace(b"(   7100)", b"(-------)") if k < known_from else line
        for k, line in enumerate(later)
    ]
    reader = LineReader("ftrace", EventRegistry(), SourceStats())
    list(TextReader(reader).batches(blocks_of(lines, (100,)), compiled))
    assert reader.stats.threads == {(77, "CPU 0/KVM"): 7100}


def test_processes_of_any_length() -> None:
    event = EVENTS["entry"].format(h="0", n="0", w="0" * 16)
    lines = [
        f"       CPU 0/KVM-{tid:<7} ({tid * 37:7}) [001] ..... 1234.{10 * k:06}: {event}".encode()
        for k, tid in enumerate(range(1, 200_000, 400))
    ]
    same(lines, "ftrace")


def test_more_layouts_names_and_shapes_than_are_kept() -> None:
    luck = random.Random(8)
    patterns = [
        head
        + f"{luck.choice(['aug_in', 'sched_x'])}_{k % 50}: (0x5646) td=0x{'{h}' * (k % 16 + 1)}"
        for k, head in enumerate(list(HEADS.values()) * 20)
    ]
    same(lines_of(patterns, 1500, 8), "ftrace", (700, 100))


@pytest.mark.parametrize("head", ["tracefs", "instance"])
def test_no_blank_between_thread_and_cpu(head: str) -> None:
    """No tool prints that: whether it is met first or later, it says no thread."""
    whole = lines_of([HEADS[head] + EVENTS["entry"]], 240, 10)
    cut = [line.replace(b" [", b"[", 1) for line in whole]
    grown = [line.replace(b" [", b"6[", 1) for line in whole]
    for odd in (cut, grown):
        assert odd[0] != whole[0]
        same([*odd[:3], *whole[:150], *odd], "ftrace", (200,))


def test_windows_line_ends() -> None:
    lines = lines_of([HEADS["tracefs"] + EVENTS["entry"], OTHERS["lost"]], 300, 9)
    for run in (interpreted, compiled):
        result = by_block([line + b"\r" for line in lines], "ftrace", (150,), run)
        assert result == by_line(lines, "ftrace")


def mixtures(heads: list[str]) -> st.SearchStrategy[list[str]]:
    """Up to six kinds of lines, with these heads."""
    found = [st.sampled_from([HEADS[name] for name in heads]), st.sampled_from([*EVENTS.values()])]
    events = st.builds("{}{}".format, *found)
    return st.lists(st.one_of(events, events, st.sampled_from([*OTHERS.values()])), max_size=6)


seeds = st.integers(0, 10**6)
sizes = st.lists(st.sampled_from([1, 70, 130, 300]), min_size=1, max_size=3)


@settings(max_examples=17)
@given(mixtures(IN_FTRACE).filter(bool), seeds, sizes)
def test_any_mixture(patterns: list[str], seed: int, blocks: list[int]) -> None:
    same(lines_of(patterns, 240, seed), "ftrace", blocks)


@settings(max_examples=20)
@given(mixtures(IN_PERF).filter(bool), seeds, sizes)
def test_any_mixture_of_perf(patterns: list[str], seed: int, blocks: list[int]) -> None:
    same(lines_of(patterns, 240, seed), "perf-script", blocks)


places = st.tuples(st.integers(0, 239), st.integers(0, 120))


@settings(max_examples=25)
@given(mixtures(IN_FTRACE).filter(bool), seeds, st.lists(st.tuples(places, st.binary(max_size=2))))
def test_any_mixture_with_damaged_bytes(
    patterns: list[str], seed: int, damage: list[tuple[tuple[int, int], bytes]]
) -> None:
    lines = lines_of(patterns, 240, seed)
    for (at, column), instead in damage:
        kept = instead.replace(b"\n", b"").replace(b"\r", b"")
        lines[at] = lines[at][:column] + kept + lines[at][column + 1 :]
    same(lines, "ftrace")


@settings(max_examples=20)
@given(mixtures(IN_FTRACE).filter(bool), seeds, st.lists(places))
def test_any_mixture_with_cut_lines(
    patterns: list[str], seed: int, cuts: list[tuple[int, int]]
) -> None:
    lines = lines_of(patterns, 240, seed)
    for at, column in cuts:
        lines[at] = lines[at][:column]
    same(lines, "ftrace")
