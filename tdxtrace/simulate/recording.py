"""A tracer's buffer after a run: its events in order, and what it lost."""

from __future__ import annotations

from dataclasses import dataclass, field

from tdxtrace.simulate.observe import Seen


@dataclass(frozen=True, slots=True)
class Lost:
    """Events of one CPU that the buffer had no room for, at this place in the stream."""

    ts_ns: int
    cpu: int
    n_events: int
    tid: int = 0
    comm: str = "<idle>"
    is_counted: bool = True
    """Whether the ring buffer could store how many."""


@dataclass(slots=True)
class Recording:
    """Events and losses in the order they are read back."""

    items: list[Seen | Lost]
    n_cpus: int
    kernel: str
    n_written: int = 0
    """Events written to the buffer, kept or not."""
    dropped: set[int] = field(default_factory=set)
    """Identities (id()) of events that were recorded and are lost: for whoever scores."""
    graveyard: list[Seen] = field(default_factory=list)
    """Those events themselves."""
    cut_share: float = 0.0
    """How much of the written file is cut off its end."""

    def events(self) -> list[Seen]:
        """The events that are left."""
        return [item for item in self.items if isinstance(item, Seen)]


Rendered = list[tuple[str, Seen | Lost | None]]
"""Lines with what each stands for: an event, a loss, or nothing (a header)."""
