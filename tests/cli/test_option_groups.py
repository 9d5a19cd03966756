"""Groups of options: one parameter of a command, many of the command line."""

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from tdxtrace.cli.option_groups import expand_option_groups


@dataclass(frozen=True, kw_only=True)
class Colours:
    names: Annotated[list[str], typer.Option("--name")] = field(default_factory=list)
    count: Annotated[int, typer.Option("--count", min=1)] = 3


@dataclass(frozen=True, kw_only=True)
class Shades(Colours):
    what: Annotated[str, typer.Argument()]


def run(*words: str) -> tuple[int, dict[str, Any]]:
    got: dict[str, Any] = {}
    app = typer.Typer()

    @app.command()
    @expand_option_groups
    def paint(shades: Shades, deep: Annotated[bool, typer.Option("--deep")] = False) -> None:
        got.update(dataclasses.asdict(shades), deep=deep, type=type(shades))

    return CliRunner().invoke(app, list(words)).exit_code, got


def test_a_group_gets_what_was_said_and_its_defaults() -> None:
    status, got = run("sky", "--name", "a", "--name", "b", "--deep")
    assert status == 0
    assert got == {"names": ["a", "b"], "count": 3, "what": "sky", "deep": True, "type": Shades}
    assert run("sea")[1]["names"] == []


def test_options_of_a_group_are_checked() -> None:
    assert run("sky", "--count", "0") == (2, {})
    assert run() == (2, {})


def test_an_option_may_not_come_twice() -> None:
    def paint(colours: Colours, names: Annotated[str, typer.Option()] = "") -> None: ...

    with pytest.raises(TypeError, match="paint has an option twice"):
        expand_option_groups(paint)
