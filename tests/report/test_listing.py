"""Tables as text: no cell is truncated at any width, and omitted columns are named."""

from __future__ import annotations

import re

import polars as pl
import pytest
from rich.console import Console, RenderableType
from support.shown import as_shown, left_out
from support.story import story

from tdxtrace.pipeline import analyze
from tdxtrace.report.columns import Sentence, TextTable
from tdxtrace.report.findings_text import findings_text
from tdxtrace.report.limits_text import policies_text
from tdxtrace.report.listing import listing
from tdxtrace.report.verdict_text import verdict_text
from tdxtrace.tables.trace import Findings

PIPE = 1 << 20
WIDTHS = (60, 80, 100, 140, PIPE)
# A request that is retried, one that is left busy, an interrupted one, an entry that is refused.
STORY = "B1 B1 2/S7 S1 2/blockB3 2/blockB3 enterB enterB enterS ?4 >X B4 lost@1 S5"


def drawn(shown: RenderableType, width: int) -> list[str]:
    console = Console(width=width, color_system=None, highlight=False)
    with console.capture() as text:
        console.print(shown, crop=False)
    return text.get().splitlines()


@pytest.fixture(scope="module")
def findings() -> Findings:
    return analyze(story(STORY).trace)


def tables(findings: Findings) -> dict[str, pl.DataFrame]:
    return {name: rows for name, rows in findings.tables().items() if rows.height}


@pytest.mark.parametrize("width", WIDTHS)
def test_every_value_is_shown_or_its_column_is_named_as_left_out(
    width: int, findings: Findings
) -> None:
    assert len(tables(findings)) > 15
    for table, rows in tables(findings).items():
        lines = drawn(listing(rows), width)
        text = " ".join(" ".join(lines).split())
        missing = left_out(text)
        assert width != PIPE or not missing
        for name in set(rows.columns) - {"source"}:
            title = name.removesuffix("_ns")
            if rows[name].null_count() == rows.height or title in missing:
                continue
            assert title in lines[0], (table, name)
            for value in rows[name]:
                wanted = as_shown(name, value)
                assert wanted is None or re.search(wanted, text), (table, name, value)


@pytest.mark.parametrize("width", WIDTHS)
def test_lines_are_no_wider_than_the_terminal_but_for_commands(
    width: int, findings: Findings
) -> None:
    sources = findings.provenance.sources
    shown = [
        findings_text(findings, lines=None if width == PIPE else 24),
        findings_text(findings, limit=0),
        verdict_text(findings.verdicts, 0, sources),
        policies_text(findings.policies),
        *map(listing, tables(findings).values()),
    ]
    for one in shown:
        for line in drawn(one, width):
            assert len(line) <= width or "tdxtrace " in line


def test_a_pipe_gets_each_row_in_one_line(findings: Findings) -> None:
    for rows in tables(findings).values():
        assert len(drawn(listing(rows), PIPE)) == 1 + rows.height


def test_columns_go_by_importance_and_numbers_stay_whole() -> None:
    table = TextTable(("page", "line", "why"), right=(1,), ranks=(2, 0, 1))
    table.add_row("0x100b73000", "2,849", "abandoned")
    table.add_row("0x1", "7", "cut")
    assert drawn(table, 30) == [
        "page         line why",
        "0x100b73000 2,849 abandoned",
        "0x1             7 cut",
    ]
    assert drawn(table, 20) == [
        " line why",
        "2,849 abandoned",
        "    7 cut",
        "not shown: page (a ",
        "wider terminal, or a",
        "pipe)",
    ]
    assert drawn(table, 3)[:3] == [" line", "2,849", "    7"]


def test_a_sentence_is_folded_behind_the_columns_before_it() -> None:
    table = TextTable(("n", "why"), texts=(1,))
    table.add_row("12", "a caller that gave up, which is told in full")
    assert drawn(table, 34) == [
        "n  why",
        "12 a caller that gave up, which is",
        "   told in full",
    ]


def test_a_command_is_never_folded() -> None:
    line = Sentence("look closer:", indent=2, then="tdxtrace explain trace.txt --seq 5")
    assert drawn(line, 60) == ["  look closer: tdxtrace explain trace.txt --seq 5"]
    assert drawn(line, 30) == ["  look closer:", "    tdxtrace explain trace.txt --seq 5"]


def test_times_of_the_clock_are_not_durations() -> None:
    rows = pl.DataFrame({"fault_ns": [4_209_000_000_001], "left_ns": [5], "took_ns": [1_500_000]})
    assert drawn(listing(rows), 80) == [
        "      fault, s     left, s  took",
        "4209.000000001 0.000000005 1.5ms",
    ]


@pytest.mark.parametrize(
    ("clock", "title", "shown"),
    [
        ("printk", "        ts, s text", "897.162769000 SEAMCALL TDH_VP_INIT failed:"),
        ("wall", "                  ts text", "1970-01-01 00:14:57.162769Z SEAMCALL TDH_VP_INIT"),
    ],
)
def test_the_message_column_of_a_log_comes_first(clock: str, title: str, shown: str) -> None:
    text = "SEAMCALL TDH_VP_INIT failed: 0x8000020000000080, rcx 0x5, rdx 0x400"
    at = {"source": 0, "seq": 2, "ts_ns": 897_162_769_000}
    rows = pl.DataFrame(at | {"message": "seamcall_failed", "text": text})
    lines = drawn(listing(rows, clocks={0: clock}), 80)
    assert lines[0].endswith(title)
    assert lines[1].startswith(shown)


def test_a_truncated_table_gives_the_number_of_omitted_rows(findings: Findings) -> None:
    rows = findings.policies
    assert rows.height > 3
    assert f"{rows.height - 2} more rows (-n 0: all)" in drawn(policies_text(rows, 2), 80)
    assert not any("more row" in line for line in drawn(policies_text(rows), 80))
    assert f"{rows.height - 2} more rows (-n 0: all)" in drawn(listing(rows, 2), 80)
