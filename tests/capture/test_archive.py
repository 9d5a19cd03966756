"""The recorder as one file: the commands of ``tdxtrace capture``, with no package installed."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main
from support.running import answered, tdxtrace

from tdxtrace.capture import program
from tdxtrace.capture.archive import main, write_archive
from tdxtrace.cli.capture import app
from tdxtrace.errors import InputError

_MOST_BYTES = 5_000_000


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("archive") / "tdxtrace-record.pyz"
    assert write_archive(target) < _MOST_BYTES
    return target


def run(archive: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run it by a Python without any installed package."""
    command = [sys.executable, "-I", "-S", str(archive), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_it_prints_the_same_recipe_without_any_package(archive: Path) -> None:
    for words in (("--kernel", "6.18"), ("--kernel", "7.2", "--dialect", "perf", "--seamcalls")):
        done = run(archive, "plan", *words)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == answered("capture", "plan", *words).text


def test_it_reads_programs_and_refuses_as_the_command_does(archive: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("x")
    for words, status in (
        (("plan", "--program", sys.executable), 1),
        (("plan", "--program", tmp_path / "text"), 1),
        (("plan", "--kernel", "x"), 2),
        (("record", "--duration", "soon", "-o", tmp_path / "out.dat"), 2),
    ):
        done, own = run(archive, *words), tdxtrace("capture", *words)
        assert (done.returncode, own.status) == (status, status)
        assert done.stderr == own.stderr


def test_a_full_disk_is_one_line(archive: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, str(archive), "plan", "--kernel", "6.18"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr == "tdxtrace: cannot write standard output: No space left on device\n"


def test_the_file_runs_by_itself_and_is_replaced_with_force_only(archive: Path) -> None:
    assert os.access(archive, os.X_OK)
    with pytest.raises(InputError, match="exists"):
        write_archive(archive)
    assert main([str(archive)]) == 1
    assert main(["--help"]) == 2


def test_it_has_the_commands_and_options_of_capture() -> None:
    for name, own in _recorder_commands().items():
        command = typer.main.get_group(app).commands[name]
        given = {
            option: parameter
            for parameter in command.params
            for option in parameter.opts
            if option.startswith("-")
        }
        # The recorder shows no colours.
        for colour in ("--color", "--no-color"):
            given.pop(colour, None)
        assert {*given} == {
            option
            for action in own._actions
            for option in action.option_strings
            if option not in ("-h", "--help")
        }, name
        for action in own._actions:
            for option in action.option_strings:
                if option in given:
                    assert getattr(given[option], "help", None) == action.help, option


def _recorder_commands() -> dict[str, argparse.ArgumentParser]:
    (commands,) = (
        action
        for action in program.parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    return dict(commands.choices)
