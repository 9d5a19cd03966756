"""Where decoded rows go: into memory, or batch by batch into a store."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import polars as pl

from tdxtrace.ingest.ahead import Behind
from tdxtrace.ingest.decoding.doubts import Watch
from tdxtrace.ingest.decoding.levels import Signs
from tdxtrace.tables.events import EVENT_TABLES


class Sink(Protocol):
    """What takes the rows of event tables as they are decoded."""

    @property
    def keeps_rows(self) -> bool:
        """Whether rows stay in memory."""

    def add(self, name: str, rows: pl.DataFrame) -> None:
        """Take rows of the table ``name``."""


@dataclass(slots=True)
class MemorySink:
    """Keeps all rows."""

    tables: dict[str, list[pl.DataFrame]] = field(default_factory=dict)
    keeps_rows: bool = True

    def add(self, name: str, rows: pl.DataFrame) -> None:
        """Keep rows of the table ``name``."""
        self.tables.setdefault(name, []).append(rows)

    def whole(self) -> dict[str, pl.DataFrame]:
        """Every event table, in the catalog's order."""
        return {
            table.name: pl.concat(
                [table.empty(), *self.tables.get(table.name, [])], how="diagonal", rechunk=False
            )
            for table in EVENT_TABLES
        }


@dataclass(slots=True)
class SourceSink:
    """Passes on the rows of one source and looks at them on the way."""

    target: Sink
    signs: Signs
    watch: Watch = field(default_factory=Watch)
    n_rows: int = 0
    behind: Behind | None = None
    """Takes the rows while others are made, if there are many."""

    @property
    def keeps_rows(self) -> bool:
        """Whether rows stay in memory."""
        return self.target.keeps_rows

    def add(self, name: str, rows: pl.DataFrame) -> None:
        """Pass rows on."""
        if not rows.height:
            return
        self.n_rows += rows.height
        if self.behind is None:
            self._add(name, rows)
        else:
            self.behind.do(partial(self._add, name, rows))

    def _add(self, name: str, rows: pl.DataFrame) -> None:
        if name == "seamcalls":
            self.signs.look(rows)
            self.watch.look(rows)
        elif name == "vm_entries":
            self.watch.beginning.look_at_entries(rows)
        self.target.add(name, rows)
