"""Text on standard output: as wide as a terminal, or whole in a pipe; in colour, or plain."""

from __future__ import annotations

import io
import json
import os
import sys
from typing import TYPE_CHECKING, Any, Final

from tdxtrace.cli.options import Color

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

# Columns that no text fills.
_ENDLESS: Final = 1 << 20


def is_terminal() -> bool:
    """Whether standard output is a terminal: in a pipe or file nothing is cut, folded or left out.

    What COLUMNS says counts for terminals only.
    """
    return sys.stdout.isatty()


def console(color: Color = Color.auto) -> Console:
    """Return a console on stdout, as wide as the terminal; without one, as wide as the text.

    Colours: as ``color`` says; else none with NO_COLOR (no-color.org), some with FORCE_COLOR, and
    else if stdout is a terminal.
    """
    from rich.console import Console

    chosen = color
    if color is Color.auto and os.environ.get("NO_COLOR"):
        chosen = Color.never
    elif color is Color.auto and os.environ.get("FORCE_COLOR"):
        chosen = Color.always
    return Console(
        highlight=False,
        width=None if is_terminal() else _ENDLESS,
        no_color=False,
        force_terminal=chosen is Color.always or None,
        color_system=None if chosen is Color.never else "auto",
    )


def print_screen(shown: RenderableType, color: Color = Color.auto) -> None:
    """Print a rich renderable; lines that are wider than the terminal are left to it."""
    console(color).print(shown, crop=False)


def plain_text(shown: RenderableType) -> str:
    """Return a rich renderable as text for a file: whole lines, no colours."""
    from rich.console import Console

    plain = Console(width=_ENDLESS, color_system=None, highlight=False, file=io.StringIO())
    with plain.capture() as text:
        plain.print(shown, crop=False)
    return text.get()


def json_text(facts: dict[str, Any]) -> str:
    """Return plain data as JSON text that ends in a newline."""
    return json.dumps(facts, indent=2, ensure_ascii=True) + "\n"
