"""Settings that a user writes in TOML: policies and scenarios."""

from __future__ import annotations

import math
import tomllib
from pathlib import Path
from typing import Any, Final

from tdxtrace.errors import InputError, QueryError
from tdxtrace.tables.text import one_line

_MAX_BYTES: Final = 256 << 10
_MAX_DEPTH: Final = 8
"""Nesting depth of tables and lists; a scenario has three levels."""


def read_settings(path: Path) -> str:
    """Return the text of a file of settings.

    Raises:
        InputError: If it cannot be read, is not UTF-8 text, or is longer than 256 KiB.
    """
    shown = one_line(str(path))
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_BYTES + 1)
        if len(text) > _MAX_BYTES:
            raise InputError(f"cannot read {shown}: longer than {_MAX_BYTES >> 10} KiB")
        return text.decode("utf-8")
    except OSError as error:
        raise InputError(f"cannot read {shown}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"cannot read {shown}: it is not UTF-8 text") from None


def parse_settings(text: str, shown: str) -> dict[str, Any]:
    """Parse TOML; ``shown`` is its name in error messages.

    Raises:
        QueryError: If it is not TOML, is nested deeper than 8 levels, or has a number that is not
            finite or has more than 64 bits.
    """
    try:
        given = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise QueryError(f"{shown} is not TOML: {one_line(str(error))}") from None
    except (ValueError, RecursionError):
        raise QueryError(
            f"{shown} cannot be parsed: a number is too long, or it is nested too deep"
        ) from None
    values: list[tuple[object, int]] = [(given, 0)]
    while values:
        value, depth = values.pop()
        if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
            raise QueryError(f"{shown} has an integer of more than 64 bits")
        if isinstance(value, float) and not math.isfinite(value):
            raise QueryError(f"{shown} has a number that is not finite")
        if isinstance(value, (dict, list)):
            if depth == _MAX_DEPTH:
                raise QueryError(f"{shown} has tables or lists nested more than {depth} deep")
            inner = value.values() if isinstance(value, dict) else value
            values += [(one, depth + 1) for one in inner]
    return given
