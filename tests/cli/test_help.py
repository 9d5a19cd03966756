"""The help of every command: within a screen, with an example; and completion."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import typer.main
from support.running import answered

from tdxtrace.cli import completion
from tdxtrace.cli.help import HIDDEN_OPTIONS, READING_HELP
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


# A window that was never resized has 80 columns; one made a little higher has these lines.
SCREEN = {"columns": 80, "lines": 36}
GROUPS = sorted({words[:n] for words in ALL for n in range(len(words))})


@pytest.mark.parametrize("words", GROUPS, ids=" ".join)
def test_help_of_a_group_names_its_commands(words: tuple[str, ...]) -> None:
    lines = answered(*words, "--help", columns=SCREEN["columns"]).lines
    own = {name[len(words)] for name in ALL if name[: len(words)] == words}
    assert own <= {line.split()[0] for line in lines if line.startswith("  ")}
    assert max(map(len, lines)) <= SCREEN["columns"]


@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_help_fits_a_screen_and_has_an_example(words: tuple[str, ...]) -> None:
    lines = answered(*words, "--help", columns=SCREEN["columns"]).lines
    assert len(lines) <= SCREEN["lines"]
    assert max(map(len, lines)) <= SCREEN["columns"]
    (example,) = [line.strip() for line in lines if line.strip().startswith("Example: ")]
    assert f"tdxtrace {words[0]}" in example
    (status,) = [line for line in lines if line.strip().startswith("Exit status: ")]
    rules = {"--fail-on", "--min-exact"} & {word for line in lines for word in line.split()}
    assert (", 3 " in status) == bool(rules)
    # As manuals write them: no type of Python, no braces around what is wanted.
    assert not re.search(r"<[a-z|]|[{}]|\[\[", "\n".join(lines)), lines


@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_every_option_is_explained(words: tuple[str, ...]) -> None:
    for parameter in ALL[words].params:
        if parameter.param_type_name == "option":
            assert parameter.help, f"{words}: {parameter.name}"


@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_every_option_is_in_the_help_or_where_it_points(words: tuple[str, ...]) -> None:
    text = answered(*words, "--help").text
    own = _named(text)
    elsewhere = _named(answered(READING_HELP).text) if f"tdxtrace {READING_HELP}" in text else set()
    for parameter in ALL[words].params:
        if parameter.param_type_name == "option" and not parameter.hidden:
            option = parameter.opts[0]
            assert (option in own) != (option in elsewhere), f"{words}: {option}"


def _named(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--?\w[\w-]*", text))


def test_what_help_leaves_out_stands_in_one_place() -> None:
    lines = answered(READING_HELP, columns=SCREEN["columns"]).lines
    assert len(lines) <= SCREEN["lines"]
    assert [line for line in lines if line.startswith("Example: tdxtrace analyze")]
    named = {line.split()[0] for line in lines if line.startswith("  --")}
    assert named == {option for name in HIDDEN_OPTIONS for option in _options_named(name)}


def _options_named(name: str) -> list[str]:
    (found,) = [p for p in ALL["events",].params if p.name == name]
    return list(found.opts)


def test_a_shell_completes_what_help_leaves_out() -> None:
    environment = os.environ | {
        "_TDXTRACE_COMPLETE": "complete_bash",
        "COMP_WORDS": "tdxtrace analyze --",
        "COMP_CWORD": "2",
    }
    done = subprocess.run(
        [sys.executable, "-m", "tdxtrace"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    options = {option for name in HIDDEN_OPTIONS for option in _options_named(name)}
    assert options <= set(done.stdout.split()), done.stderr


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


def test_names_that_are_known_without_a_trace_are_completed() -> None:
    assert completion.leaves("mem.page.a") == ["MEM.PAGE.ADD", "MEM.PAGE.AUG"]
    assert "TDH.VP.ENTER" in completion.leaves("tdh.vp")
    assert completion.policies("main") == ["mainline"]
    assert completion.scenarios("zero") == ["zero_step_attack"]
    assert "ftrace" in completion.formats("")
    options = {option.name: option for option in ALL["events",].params}
    assert "MEM.TRACK" in {item.value for item in options["leaf"].shell_complete(None, "MEM.TR")}
