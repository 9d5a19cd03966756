"""What a table declaration is, and how a frame is held against one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import polars as pl

from tdxtrace.errors import TableError


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a :class:`Table`: its name, type, unit and meaning."""

    name: str
    dtype: pl.DataType
    doc: str
    unit: str | None = None
    nullable: bool = False
    """Null means "not observed"; a column that is always observed forbids it."""


@dataclass(frozen=True, slots=True)
class Table:
    """A table as the rest of the world may rely on it.

    ``rules`` map a rule's name to an expression that is true of a sound row; ``meaning``
    defines in one sentence what the table is about.
    """

    name: str
    grain: str
    columns: tuple[Column, ...]
    key: tuple[str, ...]
    rules: Mapping[str, pl.Expr] = field(default_factory=dict)
    meaning: str = ""

    @property
    def schema(self) -> pl.Schema:
        """Column names and types, in order."""
        return pl.Schema({c.name: c.dtype for c in self.columns})

    def empty(self) -> pl.DataFrame:
        """The table with no rows: what "nothing found" looks like."""
        return self.schema.to_frame()

    def conform(self, frame: pl.DataFrame) -> pl.DataFrame:
        """Select exactly this table's columns, or say why that is impossible.

        Looks at names and types only; :meth:`check` reads the values.

        Raises:
            TableError: If a column is missing or has another type.
        """
        have = frame.schema
        problems = [
            f"column {c.name!r} is {have[c.name]}, not {c.dtype}"
            if c.name in have
            else f"column {c.name!r} is missing"
            for c in self.columns
            if have.get(c.name) != c.dtype
        ]
        if problems:
            raise TableError(f"not a {self.name!r} table: " + "; ".join(problems))
        return frame.select(self.schema.names())

    def check(self, frame: pl.DataFrame) -> pl.DataFrame:
        """Return ``frame`` if every row keeps the table's promises.

        Raises:
            TableError: If a null, a repeated key or a broken rule is found; the
                message counts the rows behind each.
        """
        promises = {
            f"{c.name} is never null": pl.col(c.name).is_not_null()
            for c in self.columns
            if not c.nullable
        }
        promises["key is unique: " + ", ".join(self.key)] = pl.struct(self.key).is_unique()
        promises |= self.rules
        conformed = self.conform(frame)
        counts = conformed.select(
            (~promise.fill_null(True)).sum().alias(name) for name, promise in promises.items()
        ).row(0, named=True)
        broken = [
            f"{name!r} fails in {n} of {conformed.height} rows" for name, n in counts.items() if n
        ]
        if broken:
            raise TableError(f"unsound {self.name!r} table: " + "; ".join(broken))
        return conformed
