"""The help of every command: within a screen, with an example; and completion."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import typer.main
from running import answered

from tdxtrace.cli.main import app


def commands(
    group: Any,  # noqa: ANN401 - click's or typer's own
    *before: str,
) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, *before, name)
        else:
            yield (*before, name), command


ALL = dict(commands(typer.main.get_command(app)))


@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_help_fits_a_screen_and_has_an_example(words: tuple[str, ...]) -> None:
    lines = answered(*words, "--help", columns=100).lines
    assert len(lines) <= 60
    (example,) = [line.strip() for line in lines if line.strip().startswith("Example: ")]
    assert f"tdxtrace {words[0]}" in example


@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_every_option_is_explained(words: tuple[str, ...]) -> None:
    for parameter in ALL[words].params:
        if parameter.param_type_name == "option":
            assert parameter.help, f"{words}: {parameter.name}"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_can_complete(shell: str) -> None:
    # typer asks which shell it runs in; whatever runs the tests, each is asked for by name.
    environment = os.environ | {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tdxtrace", "--show-completion", shell],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "_TDXTRACE_COMPLETE" in done.stdout
