"""What does a question in SQL find in the tables?"""

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
"""Name under which the leaves and their names can be joined."""

# Text and quoted names, which are left as they are, or a number as the kernel prints
# words: the SQL of polars takes 0x... for bytes.
_WORDS: Final = re.compile(r"""'(?:[^']|'')*'|"[^"]*"|(?<![\w.])0[xX](?P<hex>[0-9a-fA-F]+)\b""")
_ASKS: Final = re.compile(r"^\s*+\(*+\s*+(?:select|with|show)\b", re.IGNORECASE)
# Functions of the SQL of polars that open files: a question is about the trace only.
_OPENS_FILES: Final = re.compile(r"\b(?:read|scan)_\w+\s*\(", re.IGNORECASE)
_NO_COLUMN: Final = re.compile(r"(?:unable to find column |no column named )['\"]([^'\"]*)['\"]")
_NO_TABLE: Final = re.compile(r"relation '([^']*)' was not found")
_NOT_READ: Final = "only SELECT, WITH and SHOW TABLES are understood"


def ask(sql: str, tables: Mapping[str, Table], find: Callable[[str], pl.DataFrame]) -> pl.DataFrame:
    """Return what a SELECT finds.

    Columns have the names and types of the tables; numbers may be written in hexadecimal
    (``status = 0x8000020000000092``).  ``leaves`` (leaf, name, request) can be joined for
    the names of leaves.

    Args:
        sql: One statement, in the dialect of polars.
        tables: The tables that may be asked, by name.
        find: Gives the rows of a table; called for those that the statement names.

    Raises:
        QueryError: If the statement is not understood; a wrong name of a table or column
            is answered with the nearest right one.
    """
    plain = _WORDS.sub(lambda found: str(int(found["hex"], 16)) if found["hex"] else found[0], sql)
    if not _ASKS.match(plain):
        raise QueryError(f"not a question: '{one_line(sql, 40)}'; {_NOT_READ}")
    if _OPENS_FILES.search(_WORDS.sub("", sql)):
        raise QueryError("a question reads the tables of the trace, no other files")
    named = [name for name in tables if re.search(rf"\b{name}\b", sql)]
    frames = {
        name: find(name) if name in named else table.empty() for name, table in tables.items()
    }
    frames[LEAVES] = leaf_table().select("leaf", "name", "request")
    try:
        return pl.SQLContext(frames).execute(plain, eager=True)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        columns = [name for table in named or frames for name in frames[table].columns]
        raise QueryError(_explained(str(error), list(frames), columns)) from None


def _explained(error: str, tables: list[str], columns: list[str]) -> str:
    """One line: what is wrong in the statement, and the nearest right name."""
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
