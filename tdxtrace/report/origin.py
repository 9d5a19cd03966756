"""Origin of a report: the command that made it, when, and the hashes of its inputs."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Origin:
    """Command, date and inputs of a report; empty for a report created from Python."""

    command: str = ""
    date: str = ""
    """UTC, to the minute."""
    hashes: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 in hex by path, of the inputs that are files."""


def origin(command: str, inputs: Iterable[str]) -> Origin:
    """Return the origin of a report created now.

    The date is taken from SOURCE_DATE_EPOCH, if set, so that a report can be reproduced byte by
    byte (reproducible-builds.org, specs/source-date-epoch).

    Args:
        command: The command line.
        inputs: Paths of the inputs; pipes and folders have no hash.
    """
    given = os.environ.get("SOURCE_DATE_EPOCH", "")
    now = datetime.fromtimestamp(int(given), UTC) if given.isdecimal() else datetime.now(UTC)
    hashes = {path: _hash(Path(path)) for path in inputs if Path(path).is_file()}
    return Origin(command, f"{now:%Y-%m-%d %H:%M} UTC", {p: h for p, h in hashes.items() if h})


def _hash(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""
