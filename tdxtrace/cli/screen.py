"""Text on standard output: wrapped to a terminal, or unwrapped in a pipe; coloured or plain."""

from __future__ import annotations

import io
import json
import os
import sys
from typing import TYPE_CHECKING, Any, Final

from tdxtrace.cli.options import Color

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

# Width in columns that no text reaches: lines are not wrapped.
_ENDLESS: Final = 1 << 20


def is_terminal() -> bool:
    """Return whether standard output is a terminal.

    In a pipe or file nothing is cut, wrapped or omitted; COLUMNS is ignored there.
    """
    return sys.stdout.isatty()


def console(color: Color = Color.auto) -> Console:
    """Return a console on stdout, as wide as the terminal, or as the text if not on a terminal.

    With ``auto``, NO_COLOR (no-color.org) disables colours, FORCE_COLOR enables them, and without
    both they are enabled on a terminal.
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
    """Print a rich renderable; the terminal wraps lines that are too wide."""
    console(color).print(shown, crop=False)


def plain_text(shown: RenderableType) -> str:
    """Return a rich renderable as text for a file, without wrapping and colours."""
    from rich.console import Console

    plain = Console(width=_ENDLESS, color_system=None, highlight=False, file=io.StringIO())
    with plain.capture() as text:
        plain.print(shown, crop=False)
    return text.get()


def json_text(facts: dict[str, Any]) -> str:
    """Return plain data as JSON text that ends in a newline."""
    return json.dumps(facts, indent=2, ensure_ascii=True) + "\n"
