"""``--python``: what it prints does what the command does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest
import typer.main
from running import SAMPLES, answered

from tdxtrace.cli.main import app

TABLE_COMMANDS = {
    "events": ["--table", "vm_entries", "--since", "+0.01"],
    "retry-chains": ["--outcome", "succeeded", "--leaf", "TDH.MEM.TRACK"],
    "zero-steps": [],
    "zero-step-causes": [],
    "step-thresholds": [],
    "abandoned-requests": [],
    "progress-loops": [],
    "td-conflicts": [],
    "time-shares": [],
    "verdicts": ["--module", "1.5.16"],
    "busy-causes": ["--about", "shares"],
    "attempts": ["--unit", "ns"],
    "query": ["select leaf, count(*) as n from retry_chains group by leaf order by leaf"],
}
# Of these --python is a beginning: what they add to a table, or print instead, is theirs.
OTHERS = {"analyze", "report", "export", "policies", "explain", "recommend"}


def ran(code: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile(code, "printed", "exec"), names)
    return names


@pytest.mark.parametrize("command", TABLE_COMMANDS)
def test_the_calls_give_the_rows_of_the_command(command: str) -> None:
    words = [command, str(SAMPLES / "zerostep.txt"), *TABLE_COMMANDS[command]]
    code = answered(*words, "--python").text
    rows = ran(code)["rows"]
    printed = pl.read_parquet(answered(*words, "--format", "parquet").stdout)
    assert rows.equals(printed)


@pytest.mark.parametrize("command", sorted(OTHERS - {"export", "explain"}))
def test_other_commands_begin_so(command: str, tmp_path: Path) -> None:
    code = answered(command, SAMPLES / "contended.txt", "--python").text
    names = ran(code)
    assert names["findings"].retry_chains.height == 503


def test_a_report_is_written_by_its_calls(tmp_path: Path) -> None:
    path = tmp_path / "it's.md"
    code = answered("report", SAMPLES / "contended.txt", "-o", path, "--python").text
    assert not path.exists()
    ran(code)
    assert path.read_text().startswith("# TDX SEAMCALL retries: contended.txt")


def test_every_command_that_has_the_option_is_tested() -> None:
    commands: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    have = {
        name
        for name, command in commands.items()
        if any("--python" in option.opts for option in command.params)
    }
    assert have == TABLE_COMMANDS.keys() | OTHERS
