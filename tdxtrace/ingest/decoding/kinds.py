"""What the decoder asks of every event: its function, side, leaf and probe."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tdxtrace.ingest.events.vocabulary import Event
from tdxtrace.ingest.raw import UNKNOWN, BoolArray
from tdxtrace.tables.events import PROBES


@dataclass(slots=True)
class Kinds:
    """What the decoder asks of every event, as arrays indexed by event."""

    function: NDArray[np.int32]
    is_return: BoolArray
    leaf: NDArray[np.int32]
    probe: NDArray[np.int8]
    has_seamcalls: bool
    """Whether any of them is a probe of the lower layer."""

    @classmethod
    def of(cls, events: list[Event]) -> Kinds:
        """Look every event up once."""
        functions = {name: i for i, name in enumerate(sorted({e.function for e in events}))}
        return cls(
            np.array([functions[e.function] for e in events], np.int32),
            np.array([e.role == "return" for e in events], np.bool_),
            np.array([UNKNOWN if e.leaf is None else e.leaf for e in events], np.int32),
            np.array([PROBES.index(e.probe) for e in events], np.int8),
            any(e.probe == "seamcall" for e in events),
        )
