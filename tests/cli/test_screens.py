"""Output of commands at any width, and the five answers of the first screen."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
from support.running import ESC, SAMPLE_FILES, SAMPLES, answered, tdxtrace
from support.shown import as_shown, left_out

from tdxtrace.cli.table_commands import COMMANDS

# Commands that print a table as it is; what others fold into sentences has tests of its own.
_TABLES = sorted({*COMMANDS, "busy-causes", "attempts"} - {"query", "measurement-log", "verdicts"})
# Rows that csv has, and text shows when it is asked for them.
_ALL_ROWS = {"retry-chains": ["--all"], "busy-causes": ["--candidates"]}


@pytest.mark.parametrize("name", _TABLES)
def test_every_value_of_the_csv_is_printed_or_its_column_is_named(
    name: str, chains: Path, steps: Path
) -> None:
    path = steps if name.startswith(("zero-step", "step")) else chains
    words: list[str | Path] = [name, path, "-n", "0", *_ALL_ROWS.get(name, [])]
    whole = answered(*words, "--format", "csv").text
    header, *rows = csv.reader(whole.splitlines())
    for columns in (60, None):
        text = answered(*words, columns=columns).text
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
    if cell in ("true", "false"):
        return cell.title()
    if re.fullmatch(r"-?\d+", cell):
        return int(cell)
    return 0.5 if re.fullmatch(r"-?\d*\.\d+(e-?\d+)?", cell) else cell


# The five questions: is it a problem, whose is it, which limit, what was lost, what next.

# Scenarios of which 2 ms show what they are for, and the first words of the screen.
_SCENARIOS = {
    **dict.fromkeys(("quiet", "crowd", "removal", "lifecycle"), "no problems found in "),
    **dict.fromkeys(("string_copy", "merge_given_up"), "no problems found in "),
    "broken_mmu_lock": "2 problems: 2 BUG",
    "racing_init": "1 problem: 1 BUG",
}


def answers(*words: str | Path) -> list[str]:
    """The first screen; asserts that it has each of the five answers once, in their order."""
    done = tdxtrace("analyze", *words, columns=100, height=24)
    assert (done.status, done.stderr) == (0, "")
    lines = done.lines
    assert re.match(r"\d+ problems?: |no problems found in [\d,]+ ", lines[0])
    problems = [
        line for line in lines if re.match(r"  (BUG \(host kernel\)|HOSTILE \(host\)) ", line)
    ]
    result = re.match(r"(\d+) problem", lines[0])
    assert len(problems) == min(int(result[1]) if result else 0, 3)
    assert sum(line.startswith("limit: ") for line in lines) == 1
    assert sum(line.startswith(("No lost events reported", "LOST")) for line in lines) == 1
    # What next: the command that looks closer at a problem, else one at the end.
    assert any("tdxtrace " in line for line in (lines[2:] if problems else lines[-1:])), lines
    return lines


@pytest.mark.parametrize("path", SAMPLE_FILES, ids=lambda path: path.name)
def test_the_first_screen_of_a_sample_answers_five_questions(path: Path) -> None:
    lines = answers(path.relative_to(SAMPLES.parent))
    assert 10 < len(lines) <= 24
    assert max(map(len, lines)) <= 100
    assert ESC not in "".join(lines)


@pytest.mark.parametrize("name", _SCENARIOS)
def test_the_first_screen_of_a_scenario_answers_five_questions(name: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace.txt"
    assert tdxtrace("simulate", name, "--duration", "2ms", "-o", trace).status == 0
    assert answers(trace)[0].startswith(_SCENARIOS[name])
