"""Help of commands, on one screen each; rarely used options are listed separately."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

import typer
from typer.core import TyperCommand

# Input options that are the same for every command and rarely needed.
HIDDEN_OPTIONS: Final = (
    "input_format",
    "mappings",
    "level_base",
    "formats",
    "memory",
    "max_unpacked",
    "cache",
    "color",
)
_EXIT: Final = "Exit status: 0 done, 1 bad input, 2 bad usage"
# Options that end a command with status 3.
_RULES: Final = {"fail_on": "a rule of --fail-on matches", "min_exact": "below a threshold"}
READING_HELP: Final = "--help-reading"
_BRACED: Final = re.compile(r"^\{([^|]+?)(?:\.\.\.)?\}(\.\.\.)?$")
# Ranges of numbers, which click adds to the help and this module removes.
_RANGE: Final = re.compile(r"(?<! ) *+\[[\d<=]*+x[\d<>=]++\]|; [\d<=]*+x[\d<>=]++(?=\])")
_VALUES: Final = {
    **dict.fromkeys(("int", "int range", "list[int]"), "N"),
    **dict.fromkeys(("float", "float range"), "X"),
    "str": "NAME",
}


class Command(TyperCommand):
    """Command whose help omits HIDDEN_OPTIONS and refers to READING_HELP."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:  # noqa: ANN401
        """Return usage as man pages write it: ``TRACE...``, not ``{TRACE...}...``."""
        return [_piece(piece) for piece in super().collect_usage_pieces(ctx)]

    def format_options(self, ctx: Any, formatter: Any) -> None:  # noqa: ANN401 - typer's click
        """Write arguments and options, and a line that refers to the omitted ones."""
        every = self.get_params(ctx)
        reads = any(param.name == "mappings" for param in every)
        shown = [param for param in every if not (reads and param.name in HIDDEN_OPTIONS)]
        for kind, title in (("argument", "Arguments"), ("option", "Options")):
            _write(ctx, formatter, title, [p for p in shown if p.param_type_name == kind])
        formatter.write_paragraph()
        if reads:
            formatter.write_text(f"Input options: tdxtrace {READING_HELP}")
        formatter.write_text(exit_statuses(every))


def exit_statuses(params: Sequence[Any], of_all: bool = False) -> str:
    """Return a sentence that explains the exit statuses of a command.

    Args:
        params: Parameters of the command.
        of_all: Whether to explain the statuses of all commands.
    """
    named = {param.name for param in params}
    third = [meaning for name, meaning in _RULES.items() if of_all or name in named]
    return f"{_EXIT}{f', 3 {third[0]}' if third else ''}."


def parameter_records(command: Any, ctx: Any) -> dict[str, list[tuple[str, str]]]:  # noqa: ANN401
    """Return all arguments and options of a command: names and explanation."""
    found: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
    for param in command.get_params(ctx):
        record = param.get_help_record(ctx)
        if record is not None:
            is_option = param.param_type_name == "option"
            name = _name(record[0], is_option)
            text = _RANGE.sub("", record[1])
            found["Options" if is_option else "Arguments"].append((name, text))
    return found


def print_reading_help(ctx: typer.Context, is_set: bool) -> None:
    """Print the options that the help of commands omits, and exit."""
    if not is_set:
        return
    command = ctx.command.get_command(ctx, "events")  # type: ignore[attr-defined]
    folded = [param for param in command.params if param.name in HIDDEN_OPTIONS]
    formatter = ctx.make_formatter()
    formatter.write_text("Every command that reads traces has these options as well.")
    formatter.write_paragraph()
    example = "tdxtrace analyze trace.txt --map my_probe=tdh_mem_page_aug"
    formatter.write_text(f"Example: {example}")
    _write(ctx, formatter, "Options", folded)
    typer.echo(formatter.getvalue().rstrip())
    raise typer.Exit


def _name(shown: str, has_value: bool) -> str:
    """Return a parameter as in man pages: a placeholder for its value, not its Python type."""
    name, _, rest = shown.partition(" <")
    if not (rest.endswith(">") and rest[0].islower()):
        return shown
    kind = rest.removesuffix(">")
    word = _VALUES.get(kind, kind) if has_value else ""
    return f"{name} {word}".rstrip()


def _piece(piece: str) -> str:
    if piece.startswith("[["):
        return piece[1:].partition("]]")[0] + "]"
    return _BRACED.sub(lambda found: found[1] + (found[2] or ""), piece)


def _write(ctx: Any, formatter: Any, title: str, params: list[Any]) -> None:  # noqa: ANN401
    records = [record for param in params if (record := param.get_help_record(ctx)) is not None]
    records = [(_name(name, title == "Options"), _RANGE.sub("", text)) for name, text in records]
    if records:
        with formatter.section(title):
            formatter.write_dl(records)
