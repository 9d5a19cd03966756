"""One thing that a host has or lacks, and what follows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

STATES: Final = ("ok", "limited", "missing", "unknown", "note")


@dataclass(frozen=True, slots=True)
class Check:
    """The answer to one question about the host."""

    name: str
    state: str
    """ok; limited: there, but less than wished; missing; unknown: not to be seen; note: a fact."""
    found: str
    """What was seen."""
    lost: str = ""
    """What cannot be answered without it."""
    remedy: str = ""
    """How to get it."""
