"""Declarations of tables, and checks of data frames against them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import polars as pl

from tdxtrace.errors import TableError


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a :class:`Table`: name, type, description, unit."""

    name: str
    dtype: pl.DataType
    doc: str
    unit: str | None = None
    nullable: bool = False
    """Whether null, which means "not observed", is allowed."""
    optional: bool = False
    """Whether the column is missing in a table in which no row has a value for it."""


@dataclass(frozen=True, slots=True)
class Table:
    """A table: its columns, its key and rules that hold for every row.

    ``grain`` describes a row; ``meaning`` defines the table's term in one sentence; ``rules`` map
    a rule's name to an expression that is true for every valid row.
    """

    name: str
    grain: str
    columns: tuple[Column, ...]
    key: tuple[str, ...]
    rules: Mapping[str, pl.Expr] = field(default_factory=dict)
    meaning: str = ""

    @property
    def schema(self) -> pl.Schema:
        """Names and types of the columns that are not optional, in order."""
        return pl.Schema({c.name: c.dtype for c in self.columns if not c.optional})

    def schema_of(self, frame: pl.DataFrame) -> pl.Schema:
        """Names and types of the columns, with the optional ones that ``frame`` has, in order."""
        given = frame.schema
        present = {c.name: c.dtype for c in self.columns if c.optional and c.name in given}
        return pl.Schema({**self.schema, **present})

    def with_optional(self, frame: pl.DataFrame) -> pl.DataFrame:
        """Return ``frame`` with every optional column; missing ones are added as null."""
        missing = (c for c in self.columns if c.optional and c.name not in frame.schema)
        return frame.with_columns(pl.lit(None, c.dtype).alias(c.name) for c in missing)

    def empty(self) -> pl.DataFrame:
        """The table with no rows."""
        return self.schema.to_frame()

    def conform(self, frame: pl.DataFrame) -> pl.DataFrame:
        """Return ``frame`` with exactly this table's columns, in order.

        Optional columns that are present stay.  Only names and types are checked; :meth:`check`
        checks the values.

        Raises:
            TableError: If a column is missing or has another type.
        """
        actual, expected = frame.schema, self.schema_of(frame)
        problems = [
            f"column {name!r} is {actual[name]}, not {dtype}"
            if name in actual
            else f"column {name!r} is missing"
            for name, dtype in expected.items()
            if actual.get(name) != dtype
        ]
        if problems:
            raise TableError(f"not a {self.name!r} table: " + "; ".join(problems))
        return frame if frame.columns == expected.names() else frame.select(expected.names())

    def pick(self, rows: pl.DataFrame | pl.LazyFrame, *names: str) -> pl.DataFrame:
        """Return some columns of rows of this table; a query computes only these columns.

        Raises:
            TableError: If one of these columns is missing or has another type.
        """
        actual = rows.collect_schema()
        wrong = [name for name in names if actual.get(name) != self.schema[name]]
        if wrong:
            raise TableError(f"not a {self.name!r} table: " + ", ".join(map(repr, wrong)))
        return rows.lazy().select(names).collect()

    def check(self, frame: pl.DataFrame) -> pl.DataFrame:
        """Return ``frame`` with this table's columns, after checking every row.

        Raises:
            TableError: If a column is missing or has another type, a value is null where
                that is not allowed, a key is repeated or a rule is broken; the message counts
                the rows of each.
        """
        checks = {
            f"{c.name} is never null": pl.col(c.name).is_not_null()
            for c in self.columns
            if not c.nullable
        }
        conformed = self.conform(frame)
        if not _is_ascending(conformed, self.key):
            checks["key is unique: " + ", ".join(self.key)] = pl.struct(self.key).is_unique()
        checks |= self.rules
        counts = conformed.select(
            (~check.fill_null(True)).sum().alias(name) for name, check in checks.items()
        ).row(0, named=True)
        failures = [
            f"{name!r} fails in {n} of {conformed.height} rows" for name, n in counts.items() if n
        ]
        if failures:
            raise TableError(f"invalid {self.name!r} table: " + "; ".join(failures))
        return conformed


def _is_ascending(frame: pl.DataFrame, key: Sequence[str]) -> bool:
    """Return whether the rows are strictly ascending by a key of two integers, hence unique.

    This takes a tenth of the time of a search for repeated keys.
    """
    if len(key) != 2 or not all(frame[name].dtype.is_integer() for name in key):
        return False
    first, second = (frame[name] for name in key)
    if first.null_count() or second.null_count() or not first.is_sorted():
        return False
    rises = (second.head(-1) < second.tail(-1)) | (first.head(-1) < first.tail(-1))
    return frame.height < 2 or bool(rises.all())
