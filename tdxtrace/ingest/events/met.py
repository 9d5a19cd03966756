"""The events of one source, by name, in the order in which they were met."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from tdxtrace.ingest.events.vocabulary import Event, Role, recognise, role_of

# Names of noise that are told apart; a hostile file could hold a new one on every line.
_MAX_NAMES: Final = 4096


@dataclass(slots=True)
class Vocabulary:
    """The events of one source by name, in the order they were met."""

    mappings: Mapping[str, tuple[str, Role | None]] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    _known: dict[tuple[str, str | None], int] = field(default_factory=dict)

    def index_of(self, name: str, args: str) -> int:
        """Return the place of event ``name`` in ``events``, meeting it if it is new.

        Two probes of one name, an entry and a return, are two events.
        """
        key = name, role_of(args)
        index = self._known.get(key)
        if index is None:
            if len(self.events) >= _MAX_NAMES:
                key = "(other names)", None
            index = self._known.setdefault(key, len(self.events))
            if index == len(self.events):
                self.events.append(recognise(key[0], args, self.mappings))
        return index

    def add(self, event: Event) -> int:
        """Return the place of ``event`` in ``events``, adding it if its name is new."""
        index = self._known.setdefault((event.name, None), len(self.events))
        if index == len(self.events):
            self.events.append(event)
        return index
