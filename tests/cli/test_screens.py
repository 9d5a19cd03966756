"""What commands print at any width, and the five answers of the first screen."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
from support.running import SAMPLE_FILES, SAMPLES, answered, tdxtrace
from support.shown import as_shown, left_out

from tdxtrace.cli.table_commands import COMMANDS

# Of causes and others, the tables of one command that print no table of names by themselves.
_TABLES = sorted({*COMMANDS, "busy-causes", "attempts"} - {"query", "measurement-log"})


@pytest.mark.parametrize("name", _TABLES)
def test_every_value_of_the_csv_is_printed_or_its_column_is_named(
    name: str, chains: Path, steps: Path
) -> None:
    path = steps if name.startswith(("zero-step", "step")) else chains
    whole = answered(name, path, "-n", "0", "--format", "csv").text
    header, *rows = csv.reader(whole.splitlines())
    for columns in (60, 140, None):
        text = answered(name, path, "-n", "0", columns=columns).text
        missing = left_out(text)
        assert columns or not missing
        for column, title in enumerate(header):
            if title.removesuffix("_ns") in missing:
                continue
            for row in rows[:20]:
                wanted = as_shown(title, _value(row[column]))
                assert wanted is None or re.search(wanted, " ".join(text.split())), (title, row)


def _value(cell: str) -> int | str | float | None:
    if not cell:
        return None
    if re.fullmatch(r"-?\d+", cell):
        return int(cell)
    return 0.5 if re.fullmatch(r"-?\d*\.\d+(e-?\d+)?", cell) else cell


# The five questions: is it a problem, whose is it, which limit, what was lost, what next.

_HONEST = ("quiet", "balloon", "crowd", "fresh_memory", "removal")
_BUGS = ("broken_mmu_lock", "racing_init")
_ATTACK = "zero_step_attack"


def answers(*words: str | Path) -> list[str]:
    """The first screen; asserts that it has each of the five answers once, in their order."""
    done = tdxtrace("analyze", *words, columns=100, height=24)
    assert (done.status, done.stderr) == (0, "")
    lines = done.lines
    assert re.match(r"\d+ problems?: |no problems found in [\d,]+ ", lines[0])
    problems = [
        line for line in lines if re.match(r"  (BUG \(host kernel\)|HOSTILE \(host\)) ", line)
    ]
    told = re.match(r"(\d+) problem", lines[0])
    assert len(problems) == min(int(told[1]) if told else 0, 3)
    assert sum("tdxtrace explain" in line or "tdxtrace zero" in line for line in lines) or not told
    assert sum(line.startswith("limit: ") for line in lines) == 1
    assert sum(line.startswith(("No lost events reported", "LOST")) for line in lines) == 1
    assert [line for line in lines if line.startswith("next: ")], lines
    order = [
        next(n for n, line in enumerate(lines) if line.startswith(start))
        for start in ("limit: ", ("No lost", "LOST"), "next: ")
    ]
    assert order == sorted(order)
    return lines


@pytest.mark.parametrize("path", SAMPLE_FILES, ids=lambda path: path.name)
def test_the_first_screen_of_a_sample_answers_five_questions(path: Path) -> None:
    answers(path.relative_to(SAMPLES.parent))


@pytest.mark.parametrize("name", [*_HONEST, *_BUGS, _ATTACK])
def test_the_first_screen_of_a_scenario_answers_five_questions(name: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace.txt"
    seconds = "40ms" if name == _ATTACK else "8ms"
    assert tdxtrace("simulate", name, "--duration", seconds, "-o", trace).status == 0
    lines = answers(trace)
    assert lines[0].startswith("no problems") == (name in _HONEST)
    assert ("BUG" in lines[0]) == (name in _BUGS)
    assert ("HOSTILE" in lines[0]) == (name == _ATTACK)
