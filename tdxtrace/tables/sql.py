"""SQL queries of the tables, by the SQL interface of polars."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Final

import polars as pl

from tdxtrace.errors import QueryError
from tdxtrace.tables.schema import Table
from tdxtrace.tables.text import one_line
from tdxtrace.tdx.leaves import leaf_table

LEAVES: Final = "leaves"
"""Name of the table of leaves and their names, for joins."""

# String literals and quoted names, which stay unchanged, or a hexadecimal number: the SQL
# of polars takes 0x... for bytes.
_LITERALS: Final = re.compile(r"""'(?:[^']|'')*'|"[^"]*"|(?<![\w.])0[xX](?P<hex>[0-9a-fA-F]+)\b""")
_SELECTS: Final = re.compile(r"^\s*+\(*+\s*+(?:select|with|show)\b", re.IGNORECASE)
# Functions of the SQL of polars that open files: a query may read the trace only.
_OPENS_FILES: Final = re.compile(r"\b(?:read|scan)_\w+\s*\(", re.IGNORECASE)
_NO_COLUMN: Final = re.compile(r"(?:unable to find column |no column named )['\"]([^'\"]*)['\"]")
_NO_TABLE: Final = re.compile(r"relation '([^']*)' was not found")
_SUPPORTED: Final = "only SELECT, WITH and SHOW TABLES are understood"


def run_query(
    sql: str, tables: Mapping[str, Table], load: Callable[[str], pl.DataFrame | pl.LazyFrame]
) -> pl.DataFrame:
    """Return the result of a SELECT.

    Columns have the names and types of the tables; numbers may be written in hexadecimal
    (``status = 0x8000020000000092``).  ``leaves`` (leaf, name, request) can be joined for
    the names of leaves.

    Args:
        sql: One statement, in the dialect of polars.
        tables: The tables that can be queried, by name.
        load: Returns the rows of a table, or a query of them; called for those that the statement
            names.

    Raises:
        QueryError: If the statement is not understood; for an unknown table or column the
            message gives the nearest name.
    """
    plain = _LITERALS.sub(lambda m: str(int(m["hex"], 16)) if m["hex"] else m[0], sql)
    if not _SELECTS.match(plain):
        raise QueryError(f"not a query: '{one_line(sql, 40)}'; {_SUPPORTED}")
    if _OPENS_FILES.search(_LITERALS.sub("", sql)):
        raise QueryError("a query reads the tables of the trace, no other files")
    named = [name for name in tables if re.search(rf"\b{name}\b", sql)]
    frames: dict[str, pl.DataFrame | pl.LazyFrame] = {
        name: load(name) if name in named else table.empty() for name, table in tables.items()
    }
    frames[LEAVES] = leaf_table().select("leaf", "name", "request")
    try:
        return pl.SQLContext(frames).execute(plain, eager=True)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        columns = [
            name
            for table in named or frames
            for name in frames[table].lazy().collect_schema().names()
        ]
        raise QueryError(_describe(str(error), list(frames), columns)) from None


def _describe(error: str, tables: list[str], columns: list[str]) -> str:
    """One line with the error in the statement, and the nearest known name."""
    for pattern, noun, known in (
        (_NO_TABLE, "table", tables),
        (_NO_COLUMN, "column", columns),
    ):
        found = pattern.search(error)
        if found is not None:
            near = get_close_matches(found[1], known, n=1, cutoff=0)[0]
            names = ", ".join(dict.fromkeys(known))
            return f"no {noun} '{one_line(found[1], 40)}'; nearest: {near} (of {names})"
    return f"SQL not understood: {one_line(error.splitlines()[0])}"
