"""Text changed by a mailer, a terminal or quoting gives the same rows, or a loss."""

from __future__ import annotations

import lzma
import quopri
import random
import re
import textwrap
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
from support.effort import times
from support.recordings import SAMPLES
from support.texts import ONE_CALL, is_accounted_for, lost, read_text

import tdxtrace
from tdxtrace.errors import FormatError
from tdxtrace.tables.trace import Trace

LINES = Path(__file__).parent.parent / "lines"
N_LINES = 120
KVM = """\
       CPU 5/KVM-4145    [002] .....    86.581926: kvm_entry: vcpu 5, rip 0x0
       CPU 5/KVM-4145    [002] .....    86.581928: kvm_exit: vcpu 5 reason EPT_VIOLATION rip 0x0 \
info1 0x0000000000000582 info2 0x0000000000000000 intr_info 0x00000000 error_code 0x00000000
       CPU 5/KVM-4145    [002] .....    86.581930: kvm_page_fault: vcpu 5 rip 0x0 address \
0x0000000080000000 error_code 0x582
"""


def _head(name: str) -> str:
    data = (SAMPLES / name).read_bytes()
    text = lzma.decompress(data) if name.endswith(".xz") else data
    lines = [line for line in text.decode().split("\n") if not line.startswith("#")]
    return "\n".join(lines[:N_LINES]) + "\n"


TEXTS = {
    "tracefs": _head("contended.txt"),
    "perf script": _head("qemu.perf.txt.xz"),
    "trace-cmd": _head("tracecmd-v7.txt.xz"),
    "kvm": KVM * 3,
}


def _lines(text: str, change: Callable[[str], str]) -> str:
    return "".join(change(line) + "\n" for line in text.splitlines())


def wrapped(width: int, flow: str = "") -> Callable[[str], str]:
    """Wrap at blanks, as mailers do; format=flowed leaves the blank at the end."""

    def change(text: str) -> str:
        def parts(line: str) -> str:
            kept = textwrap.wrap(
                line,
                width,
                break_long_words=False,
                break_on_hyphens=False,
                drop_whitespace=True,
                initial_indent="",
            )
            return f"{flow}\n".join(kept)

        return _lines(text, parts)

    return change


def chopped(width: int) -> Callable[[str], str]:
    """Cut at a column, whatever is there, as terminals do."""
    return lambda text: _lines(
        text, lambda line: "\n".join(line[at : at + width] for at in range(0, len(line), width))
    )


def quoted(mark: str) -> Callable[[str], str]:
    return lambda text: _lines(text, lambda line: mark + line)


def printable(text: str) -> str:
    return quopri.encodestring(text.encode()).decode()


def both(*changes: Callable[[str], str]) -> Callable[[str], str]:
    def change(text: str) -> str:
        for each in changes:
            text = each(text)
        return text

    return change


CERTAIN = {
    "wrapped at 72": wrapped(72),
    "wrapped at 100": wrapped(100),
    "flowed": wrapped(72, " "),
    "quoted": quoted("> "),
    "quoted without blank": quoted(">"),
    "quoted twice": quoted("> > "),
    "quoted and indented": quoted("  > "),
    "indented": quoted("    "),
    "tab": quoted("\t"),
    "wrapped, then quoted": both(wrapped(72), quoted("> ")),
    "wrapped, then quoted and indented": both(wrapped(72), quoted("  >> ")),
    "quoted-printable": printable,
    "quoted, then quoted-printable": both(quoted("> "), printable),
    "chopped at 80": chopped(80),
    "chopped at 100": chopped(100),
    "carriage returns": lambda text: text.replace("\n", "\r\n"),
    "wrapped, with carriage returns": both(wrapped(72), lambda t: t.replace("\n", "\r\n")),
}


def rows(trace: Trace) -> list[list[tuple[object, ...]]]:
    gone = ("seq", "n_lines")
    tables = (trace.seamcalls, trace.vm_entries, trace.page_faults)
    return [table.drop(gone).rows() for table in tables]


@pytest.mark.parametrize("change", CERTAIN)
@pytest.mark.parametrize("name", TEXTS)
def test_text_is_read_as_it_was_before(name: str, change: str) -> None:
    whole = read_text(TEXTS[name])
    trace = read_text(CERTAIN[change](TEXTS[name]))
    assert rows(trace) == rows(whole)
    assert is_accounted_for(trace)
    assert not {"wrapped", "unparsed", "undecoded"} & lost(trace).keys()


def values(trace: Trace) -> set[tuple[object, ...]]:
    """What each event says: its time, its thread and one of its fields."""
    calls = trace.seamcalls
    names = ("gpa", "level", "td_id", "status", "page", "vp_id")
    made: set[tuple[object, ...]] = set()
    for side in ("start_ns", "end_ns"):
        made |= {(side, *row) for row in calls.drop_nulls(side).select(side, "tid", "leaf").rows()}
        for name in set(names) & set(calls.columns):
            at = "end_ns" if name == "status" else "start_ns"
            result = calls.drop_nulls([at, name]).select(at, "tid", name)
            made |= {(name, *row) for row in result.rows()}
    for table in (trace.vm_entries, trace.page_faults):
        for name in set(table.columns) - {"seq", "n_lines", "source", "tid", "tgid", "cpu"}:
            made |= {(name, *row) for row in table.drop_nulls(name).select("tid", name).rows()}
    return made


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("seed", range(times(16)))
def test_no_value_that_was_cut_is_read_as_whole(name: str, seed: int) -> None:
    """Lines are cut at any place: in the middle of numbers, of names, before and behind them."""
    luck = random.Random(seed)
    known = values(read_text(TEXTS[name]))

    def cut(line: str) -> str:
        at = luck.randrange(1, len(line))
        return line[:at] + luck.choice(["\n", "\n", "\n ", " \n"]) + line[at:]

    text = _lines(TEXTS[name], lambda line: cut(line) if luck.random() < 0.5 else line)
    try:
        trace = read_text(text)
    except FormatError:
        return
    assert is_accounted_for(trace)
    assert not values(trace) - known


def test_what_a_pager_cut_is_no_number() -> None:
    text = _lines(TEXTS["perf script"], lambda line: line[:125] + ">" if len(line) > 126 else line)
    whole, trace = read_text(TEXTS["perf script"]), read_text(text)
    assert not values(trace) - values(whole)
    assert lost(trace)["wrapped"] == text.count(">\n")


def test_a_line_that_ends_behind_a_sign_has_no_number() -> None:
    """The last line of a file that was cut; only trace-cmd report -R prints zero as nothing."""
    for end in ("", "0x"):
        trace = read_text(ONE_CALL.replace("ret=0x0", f"ret={end}"))
        assert trace.seamcalls["status"].to_list() == [None]
        assert lost(trace) == {"undecoded": 1}


def test_two_events_in_one_line_are_not_one() -> None:
    """A crash or a serial console lost the end of the first."""
    first, second = ONE_CALL.splitlines()
    trace = read_text(f"{ONE_CALL}{first[:90]}{second}\n{first[:90]}{first}\n")
    assert trace.seamcalls.height == 1
    assert lost(trace) == {"undecoded": 2}


def test_the_file_of_a_mailer() -> None:
    trace = tdxtrace.read_trace(LINES / "wrapped-by-mailer.txt")
    entry = trace.vm_entries.select("exit_reason", "rip", "info1", "intr_info")
    assert entry.rows() == [(48, 0xFFFF_FFFF_B0E9_BED0, 0x83, 0)]
    assert lost(trace) == {"joined": 1, "noise": 1}


CALL = "  CPU 0/KVM 14401 [001]  1.000100:  probe:tdh_mem_page_aug: (ffffffffc0a01000) td=0x10"
RETURN = (
    "  CPU 0/KVM 14401 [001]  1.000102:  probe:tdh_mem_page_aug__return: "
    "(ffffffffc0a01000 <- ffffffffc0a02000) ret=0x"
)


@pytest.mark.parametrize(
    "comment", ["here it hangs:", "dead end", "= see above =", "Hi,", "see gpa=0x5000 above"]
)
def test_what_somebody_wrote_between_lines_is_not_joined(comment: str) -> None:
    trace = read_text(f"{CALL} gpa=0x1000 level=0\n{comment}\n{RETURN}92 \n{comment}\n")
    assert trace.seamcalls.select("gpa", "status").rows() == [(0x1000, 0x92)]
    assert lost(trace) == {"unparsed": 2}


def test_where_a_number_may_be_cut_both_lines_are_lost() -> None:
    trace = read_text(f"{CALL} gpa=0x1000 level=0\n{RETURN}800002000000\n0092\n")
    assert trace.seamcalls.select("gpa", "end_ns").rows() == [(0x1000, None)]
    assert lost(trace) == {"wrapped": 2}
    (advice,) = trace.losses.filter(pl.col("kind") == "wrapped")["advice"]
    assert "attachment" in advice


def test_text_of_which_nothing_is_left_says_that_lines_are_wrapped() -> None:
    with pytest.raises(FormatError, match=r"has wrapped lines .* attachment"):
        read_text(f"{RETURN}800002000000\n0092\n")


def test_lines_that_a_mailer_wrapped_may_have_one_length() -> None:
    text = "".join(f"{CALL.replace('100:', f'10{n}:')}\ngpa=0x1000 level=0\n" for n in (1, 2, 3))
    trace = read_text(text)
    assert trace.seamcalls.select("td_id", "gpa").rows() == [(0x10, 0x1000)] * 3
    assert lost(trace) == {"joined": 3}


def test_a_wrap_in_a_later_block_of_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line is held until its end is known, across blocks."""
    from tdxtrace.ingest import source

    text = wrapped(72)(TEXTS["perf script"])
    whole = rows(read_text(text))
    monkeypatch.setattr(source, "CHUNK_BYTES", 4096)
    monkeypatch.setattr(source, "_READ_BYTES", 1024)
    assert rows(read_text(text)) == whole


def test_ordinary_text_is_not_mended() -> None:
    from tdxtrace.ingest.events.registry import EventRegistry
    from tdxtrace.ingest.stats import SourceStats
    from tdxtrace.ingest.text.reader import LineReader
    from tdxtrace.ingest.text.wrapping import mender_for

    for name, text in TEXTS.items():
        form = "perf-script" if name == "perf script" else "ftrace"
        reader = LineReader(form, EventRegistry(), SourceStats())
        odd = re.sub(r"^(.{40}).*$", r"\1", text, count=1, flags=re.MULTILINE)
        for lines in (text, f"{odd}CPU:1 [LOST 5 EVENTS]\n"):
            assert mender_for(lines.encode().splitlines(), reader) is None


@pytest.mark.parametrize("column", ["", "      5619af003f40", "  ilen: 0"])
def test_aligned_events_without_fields_are_not_called_wrapped(column: str, tmp_path: Path) -> None:
    """perf script -F -trace, alone and with +ip or +insnlen."""
    names = [
        f"tdx:tdh_{name}"
        for name in ("vp_enter_enter", "vp_enter_exit", "mem_sept_add_enter", "mem_sept_add_exit")
    ]
    lines = [
        f" qemu-system-x86 14402 [001]  4212.{603129 + n}: {names[n % 4]:>26}: {column}".rstrip()
        for n in range(40)
    ]
    path = tmp_path / "printed.txt"
    path.write_text("".join(f"{line}\n" for line in lines))
    with pytest.raises(FormatError, match="without the fields that are needed"):
        tdxtrace.read_trace(path)
