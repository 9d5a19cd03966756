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
    optional: bool = False
    """A table has the column only if a row of it has a value there."""


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
        """Names and types of the columns that every such table has, in order."""
        return pl.Schema({c.name: c.dtype for c in self.columns if not c.optional})

    def schema_of(self, frame: pl.DataFrame) -> pl.Schema:
        """Names and types of all columns that ``frame`` may have, in order."""
        given = frame.schema
        present = {c.name: c.dtype for c in self.columns if c.optional and c.name in given}
        return pl.Schema({**self.schema, **present})

    def with_optional(self, frame: pl.DataFrame) -> pl.DataFrame:
        """Return ``frame`` with every optional column, null where it had none."""
        missing = (c for c in self.columns if c.optional and c.name not in frame.schema)
        return frame.with_columns(pl.lit(None, c.dtype).alias(c.name) for c in missing)

    def without_unused(self, frame: pl.DataFrame) -> pl.DataFrame:
        """Return ``frame`` without the optional columns that are null in all rows."""
        optional = {c.name for c in self.columns if c.optional}
        return frame.drop(
            c.name for c in frame if c.name in optional and c.null_count() == frame.height
        )

    def empty(self) -> pl.DataFrame:
        """The table with no rows: what "nothing found" looks like."""
        return self.schema.to_frame()

    def conform(self, frame: pl.DataFrame) -> pl.DataFrame:
        """Select exactly this table's columns, or say why that is impossible.

        Optional columns that are present stay.  Looks at names and types only; :meth:`check`
        reads the values.

        Raises:
            TableError: If a column is missing or has another type.
        """
        have, wanted = frame.schema, self.schema_of(frame)
        problems = [
            f"column {name!r} is {have[name]}, not {dtype}"
            if name in have
            else f"column {name!r} is missing"
            for name, dtype in wanted.items()
            if have.get(name) != dtype
        ]
        if problems:
            raise TableError(f"not a {self.name!r} table: " + "; ".join(problems))
        return frame.select(wanted.names())

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
