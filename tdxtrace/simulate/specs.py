"""What an event is: the probe or tracepoint it comes from, and its fields."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Fields = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Spec:
    """One kind of event: a probe somebody set, or a tracepoint of the kernel's."""

    group: str
    name: str
    kind: str
    """``entry`` and ``return`` of a probed function, or ``tracepoint``."""
    fields: Fields
    """Name and type of each argument, in order."""
    function: str = ""
    text: Callable[[tuple[int, ...]], str] | None = None
    """How the kernel prints a tracepoint's fields."""
