"""How help is shown: on one screen, what is seldom needed in a place of its own."""

from __future__ import annotations

import re
from typing import Any, Final

import typer
from typer.core import TyperCommand

# Options that say how a trace is to be read where it does not tell itself, and the like: the
# same for every command, and seldom needed.
FOLDED: Final = ("input_format", "mappings", "level_base", "formats", "cache", "no_color")
WHERE: Final = "--help-reading"
_BRACED: Final = re.compile(r"^\{([^|]+?)(?:\.\.\.)?\}(\.\.\.)?$")
_VALUES: Final = {
    **dict.fromkeys(("int", "int range", "list[int]"), "N"),
    **dict.fromkeys(("float", "float range"), "X"),
    "str": "NAME",
}


class Command(TyperCommand):
    """A command whose help leaves out how traces are read, and says where that stands."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:  # noqa: ANN401
        """Say what is wanted as manuals do, ``TRACE...``, not ``{TRACE...}...``."""
        return [_piece(piece) for piece in super().collect_usage_pieces(ctx)]

    def format_options(self, ctx: Any, formatter: Any) -> None:  # noqa: ANN401 - typer's click
        """Write arguments and options, and a last line about those that are left out."""
        every = self.get_params(ctx)
        reads = any(param.name == "mappings" for param in every)
        shown = [param for param in every if not (reads and param.name in FOLDED)]
        for kind, title in (("argument", "Arguments"), ("option", "Options")):
            _write(ctx, formatter, title, [p for p in shown if p.param_type_name == kind])
        if reads:
            formatter.write_paragraph()
            formatter.write_text(f"More options, on how traces are read: tdxtrace {WHERE}")


def show_reading(ctx: typer.Context, wanted: bool) -> None:
    """Print the options that the help of commands leaves out, and stop."""
    if not wanted:
        return
    command = ctx.command.commands["events"]  # type: ignore[attr-defined]
    folded = [param for param in command.params if param.name in FOLDED]
    formatter = ctx.make_formatter()
    formatter.write_text("Every command that reads traces has these options as well.")
    formatter.write_paragraph()
    example = "tdxtrace analyze trace.txt --map my_probe=tdh_mem_page_aug"
    formatter.write_text(f"Example: {example}")
    _write(ctx, formatter, "Options", folded)
    typer.echo(formatter.getvalue().rstrip())
    raise typer.Exit


def _name(shown: str, has_value: bool) -> str:
    """A parameter as manuals show it: what stands for its value, not the type in Python."""
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
    records = [(_name(name, title == "Options"), text) for name, text in records]
    if records:
        with formatter.section(title):
            formatter.write_dl(records)
