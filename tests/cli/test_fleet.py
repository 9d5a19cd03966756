"""The commands about a fleet."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support.running import ESC, SAMPLES, answered, tdxtrace


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Facts of two hosts, and of a file that is none."""
    folder = tmp_path_factory.mktemp("fleet")
    traces = folder / "traces"
    traces.mkdir()
    shutil.copy(SAMPLES / "tracecmd-v7.dat", traces / "one.dat")
    shutil.copy(SAMPLES / "qemu.perf.txt.xz", traces / "two.txt.xz")
    (traces / f"{ESC}[31m.txt").write_text("no trace\n")
    done = tdxtrace("fleet", "map", traces, "--to", folder / "facts", "--workers", "2")
    assert done.status == 1
    assert "2 traces counted" in done.text
    assert ", 0 were counted before, 1 failed" in done.text
    assert ESC not in done.text + done.stderr
    return folder / "facts"


def test_limits_name_what_they_rest_on(facts: Path) -> None:
    text = answered("fleet", "limits", facts, "--target", "0.1").text
    assert text.startswith("limits that at most 10 % of requests exceed (0.95 confidence)")
    assert "2 traces of 2 hosts" in text
    assert "left out: 1 trace that could not be counted" in text
    (row,) = [line for line in text.splitlines() if line.startswith("MEM.PAGE.AUG       attempts")]
    assert row.split()[2:5] == ["2", "232", "139"]


def test_limits_are_rows_for_programs(facts: Path) -> None:
    rows = json.loads(answered("fleet", "limits", facts, "--by", "host", "--format", "json").text)
    assert {row["group"] for row in rows} == {"one", "two"}
    hosts = json.loads(answered("fleet", "limits", facts, "--hosts", "--format", "json").text)
    assert {row["host"] for row in hosts} == {"one", "two"}


@pytest.mark.parametrize("form", ["md", "html", "json"])
def test_a_report_has_what_was_counted_and_what_was_not(facts: Path, form: str) -> None:
    text = answered("fleet", "report", facts, "--format", form).text
    assert ESC not in text
    if form != "json":
        assert "Traces that are left out" in text
        assert "Hosts" in text


def test_sets_of_traces_are_compared(facts: Path) -> None:
    two = ("--before", "host = 'one'", "--after", "host = 'two'")
    rows = json.loads(answered("fleet", "compare", facts, *two, "--format", "json").text)
    assert {row["change"] for row in rows} <= {"more", "fewer", "not_told", "only_before"}


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("limits", "nowhere"), "no facts of format 1 at nowhere"),
        (("map", "nowhere", "--to", "facts"), "no trace at nowhere"),
        (("limits", "FACTS", "--target", "2"), "--target 2 is not a ratio that a limit can keep"),
        (("limits", "FACTS", "--where", "host ="), "SQL not understood"),
        (("map", "FACTS", "--to", "x", "--memory", "much"), "not a size: 'much'"),
        (("map", "FACTS", "--to", "x", "--hash-hosts", "none"), "cannot read none"),
    ],
)
def test_mistakes_are_one_line(facts: Path, words: tuple[str, ...], line: str) -> None:
    done = tdxtrace("fleet", *(str(facts) if word == "FACTS" else word for word in words))
    assert done.status in (1, 2)
    assert line in done.stderr
    assert len(done.stderr.splitlines()) == 1
