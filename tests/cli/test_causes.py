"""Commands about causes: busy-causes and explain, as a shell runs them."""

from __future__ import annotations

import io
from pathlib import Path

import polars as pl
import pytest
from support.contracts import breaches
from support.running import ESC, SAMPLES, answered, refused, tdxtrace

from tdxtrace.ingest.read import read_trace
from tdxtrace.pipeline import analyze
from tdxtrace.tables.causes import CAUSE_TABLES

SAMPLE = SAMPLES / "contended.txt"
ABOUT = dict(zip(("attempts", "shares", "rules", "locks", "entries"), CAUSE_TABLES, strict=True))


@pytest.mark.parametrize("about", ABOUT)
def test_each_table_is_printed_as_it_is(about: str, chains: Path) -> None:
    table = ABOUT[about]
    csv = answered("busy-causes", chains, "--about", about, "--format", "parquet").stdout
    rows = pl.read_parquet(io.BytesIO(csv))
    assert rows.equals(analyze(read_trace(chains)).tables()[table.name])
    assert breaches(table, rows.to_dicts()) == []
    table.check(rows)


def test_the_screen_shows_answers_and_on_demand_what_else_fits(chains: Path) -> None:
    shown = answered("busy-causes", chains, "--limit", "0").lines
    more = answered("busy-causes", chains, "--limit", "0", "--candidates").lines
    assert "cause" in shown[0]
    assert len(more) > len(shown)


def test_one_cause_can_be_asked_for(chains: Path) -> None:
    words = ("busy-causes", chains, "--cause", "unexplained", "--format", "csv")
    rows = pl.read_csv(answered(*words).stdout)
    assert set(rows.filter(pl.col("rank") == 1)["cause"]) == {"unexplained"}


def test_the_module_may_be_given(chains: Path) -> None:
    for words in (("--generation", "b"), ("--module", "1.5.16")):
        rows = pl.read_csv(answered("busy-causes", chains, "--format", "csv", *words).stdout)
        assert set(rows["generations"].drop_nulls()) <= {"B"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--module", "1.9.3"), "the locks of module '1.9.3' are not known"),
        (("--generation", "D"), "no lock generation 'D'"),
        (("--generation", "C", "--module", "1.5.16"), "module '1.5.16' is of generation B"),
    ],
)
def test_a_module_that_does_not_exist_is_refused_before_anything_is_read(
    words: tuple[str, ...], said: str
) -> None:
    for command in (("busy-causes", "nothing-here"), ("explain", "nothing-here", "--seq", "1")):
        assert said in refused(2, *command, *words)


def test_explain_says_who_when_and_which_lock() -> None:
    lines = answered("explain", SAMPLE, "--seq", "21").lines
    text = "\n".join(lines)
    assert lines[0] == "seq 21: TDH.MEM.SEPT.ADD by fake_tdx 12448 at 4203.181777000 s"
    assert "one of 8 attempts, seq 19 to 113: succeeded (7 busy)" in text
    assert "cause: host_conflict, confidence strong, module generation A" in text
    assert "held by TDH.MEM.SEPT.ADD of fake_tdx 12447, seq 52: SEPT_TREE EX, wanted EX" in text
    assert any(line.startswith("fake_tdx 12448") and "X" in line for line in lines)
    assert any(line.startswith("fake_tdx 12447") and "#" in line for line in lines)
    assert max(map(len, lines)) <= 80
    assert any(line.endswith("MEM.SEPT.ADD 0x100000000 OPERAND_BUSY SEPT tree") for line in lines)


def test_explain_shows_a_whole_chain_and_a_call_that_was_not_busy() -> None:
    chain = answered("explain", SAMPLE, "--seq", "21", "--chain").lines
    assert max(map(len, chain)) <= 80
    assert sum(line.startswith(" B") for line in chain) > 3
    assert "not busy: nothing to explain" in answered("explain", SAMPLE, "--seq", "52").text


def test_explain_names_the_nearest_call() -> None:
    assert "no SEAMCALL at seq 22; nearest: 21" in refused(2, "explain", SAMPLE, "--seq", "22")
    assert answered("explain", SAMPLE, "--seq", "3,022").lines[0].startswith("seq 3022: ")
    done = tdxtrace("explain", SAMPLE, "--seq", "x")
    assert done.status == 2
    assert "not a number: 'x'" in done.stderr
    said = refused(2, "explain", SAMPLE, "--seq", "21", "--source", "4")
    assert "input 4 has none" in said


def test_hostile_names_reach_no_terminal(tmp_path: Path) -> None:
    text = SAMPLE.read_text()
    path = tmp_path / "t.txt"
    path.write_text("\n".join(text.splitlines()[:500]).replace("fake_tdx-", f"a{ESC}[31m\u202e-"))
    done = answered("explain", path, "--seq", "21")
    assert ESC not in done.text
    assert "\u202e" not in done.text
    assert "\\x1b[31m" in done.text
    assert max(map(len, done.lines)) <= 80
