"""Where decoded rows go: into memory, or batch by batch into a store."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import polars as pl

from tdxtrace.ingest.decode.implied_losses import LossDetector
from tdxtrace.ingest.decode.levels import LevelBaseDetector
from tdxtrace.tables.events import EVENT_TABLES
from tdxtrace.tables.schema import Table


class Sink(Protocol):
    """What takes the rows of event tables as they are decoded."""

    def add(self, name: str, rows: pl.DataFrame) -> None:
        """Take rows of the table ``name``."""


@dataclass(slots=True)
class MemorySink:
    """Keeps all rows."""

    tables: dict[str, list[pl.DataFrame]] = field(default_factory=dict)

    def add(self, name: str, rows: pl.DataFrame) -> None:
        """Keep rows of the table ``name``."""
        self.tables.setdefault(name, []).append(rows)

    def whole(self) -> dict[str, pl.DataFrame]:
        """Every event table, in the catalog's order."""
        return {table.name: self._joined(table) for table in EVENT_TABLES}

    def _joined(self, table: Table) -> pl.DataFrame:
        """Join the frames of a table, of which some may lack columns that are optional."""
        frames = [table.empty(), *self.tables.get(table.name, [])]
        rows = pl.concat(frames, how="diagonal", rechunk=False)
        return rows.select(column.name for column in table.columns if column.name in rows)


@dataclass(slots=True)
class SourceSink:
    """Passes on the rows of one source and looks at them on the way."""

    target: Sink
    level_base: LevelBaseDetector
    losses: LossDetector = field(default_factory=LossDetector)
    n_rows: int = 0

    def add(self, name: str, rows: pl.DataFrame) -> None:
        """Pass rows on."""
        if not rows.height:
            return
        self.n_rows += rows.height
        if name == "seamcalls":
            self.level_base.observe(rows)
            self.losses.observe_calls(rows)
        elif name == "vm_entries":
            self.losses.observe_entries(rows)
        self.target.add(name, rows)
