"""Defaults of options from a file: tdxtrace.toml, or [tool.tdxtrace] of pyproject.toml."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from tdxtrace.errors import QueryError
from tdxtrace.tables.text import one_line

_OWN: Final = "tdxtrace.toml"
_PROJECT: Final = "pyproject.toml"
_TABLE: Final = "[tool.tdxtrace]"
# Options that may be set for a host or a project; options for files are excluded.
_KEYS: Final = (
    *("at-most", "color", "confidence", "fail-on", "generation", "level-base", "limit"),
    *("memory", "module", "pace", "target"),
)


def here() -> Path:
    """Return the working directory; the root if it was removed."""
    try:
        return Path.cwd()
    except OSError:
        return Path("/")


def defaults(folder: Path, commands: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return the defaults of options by command, for click's ``default_map``.

    The nearest file is used, in ``folder`` or a parent folder, as by ruff. A command uses the keys
    that are its options; options on the command line have precedence.

    Args:
        folder: The working directory.
        commands: Names of the commands.

    Raises:
        InputError: If the file cannot be read.
        QueryError: If it is not TOML, or has an unknown key.
    """
    found = _settings(folder)
    if not found:
        return {}
    values = {name.replace("-", "_"): _words(value) for name, value in found.items()}
    return dict.fromkeys(commands, values)


def _settings(folder: Path) -> Mapping[str, Any]:
    for place in (folder, *folder.parents):
        own, project = place / _OWN, place / _PROJECT
        if _has(own, b""):
            return _checked(_parsed(own), own)
        if _has(project, _TABLE.encode()):
            tool = _parsed(project).get("tool", {})
            return _checked(tool.get("tdxtrace", {}), project)
    return {}


def _has(path: Path, text: bytes) -> bool:
    """Return whether a file contains ``text``; false if it cannot be read."""
    try:
        return path.is_file() and text in path.read_bytes()
    except OSError:
        return False


def _parsed(path: Path) -> dict[str, Any]:
    # Imported here, as most folders have no settings.
    from tdxtrace.tables.settings import parse_settings, read_settings

    return parse_settings(read_settings(path), path.name)


def _checked(found: object, path: Path) -> Mapping[str, Any]:
    if not isinstance(found, dict):
        raise QueryError(f"{one_line(str(path), 80)}: tool.tdxtrace is not a table")
    for name in found:
        if name.replace("_", "-") not in _KEYS:
            nearest = difflib.get_close_matches(name, _KEYS, n=1, cutoff=0)[0]
            known = ", ".join(_KEYS)
            raise QueryError(
                f"{one_line(str(path), 80)}: no setting {one_line(name, 40)!r}; nearest: {nearest} "
                f"(of {known})"
            )
    return found


def _words(value: object) -> str | list[str]:
    """Return a value as text, or list of texts, as on the command line."""
    return [str(one) for one in value] if isinstance(value, list) else str(value)
