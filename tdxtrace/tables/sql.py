"""SQL queries of the tables, run by polars."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Final

import polars as pl

from tdxtrace.errors import QueryError
from tdxtrace.tables.names import with_names
from tdxtrace.tables.schema import Table
from tdxtrace.tables.text import one_line
from tdxtrace.tdx.leaves import leaf_table

LEAVES: Final = "leaves"
"""Name of the table of leaves and their names, for joins."""

_LEAVES_COLUMNS: Final = {
    "leaf": "Number of the leaf.",
    "name": "Its name, such as TDH.MEM.PAGE.AUG.",
    "request": "Operands by which two of its calls are attempts at one request.",
}

# Tokens that a statement may consist of; comments are removed.  Other text is refused, because
# sqlparser, which polars uses, would accept some of it as a string or a name.
_TOKEN: Final = re.compile(
    r"""(?P<space>(?:[ \t\r\n]|--[^\n]*+|/\*(?s:.*?)(?:\*/|\Z))++)
    |(?P<text>'(?:[^'\\]|''|\\(?!'))*+')
    |(?P<quoted>"(?:[^"]|"")*+"|`[^`]*+`)
    |0[xX](?P<hex>[0-9a-fA-F]++)(?!\w)
    |(?P<number>[0-9]++(?:\.[0-9]*+)?(?:[eE][-+]?[0-9]++)?|\.[0-9]++)(?!\w)
    |(?P<word>[A-Za-z_][A-Za-z_0-9]*+)(?!')
    |(?P<sign>[-+*%=<>!(),.;:|&^~\[\]/])""",
    re.VERBOSE,
)
_SELECTS: Final = ("select", "with", "show")
# Words allowed before a parenthesis.  Functions of polars' SQL that read anything but columns
# (read_csv, scan_*) or generate rows are left out.
_FUNCTIONS: Final = frozenset(
    """
    abs acos acosd array_agg array_contains array_get array_length array_lower array_mean
    array_reverse array_sum array_to_string array_unique array_upper asin asind atan atan2 atan2d
    atand avg bit_and bit_count bit_length bit_not bit_or bit_xor bitand bitcount bitnot bitor
    bitxor cast cbrt ceil ceiling char_length character_length coalesce columns concat concat_ws
    corr cos cosd cot cotd count covar covar_pop covar_samp cume_dist current_date current_time
    current_timestamp date date_part date_trunc day degrees dense_rank div ends_with exp extract
    first first_value floor greatest group_concat grouping hour if ifnull initcap interval lag last
    last_value lead least left length ln log log10 log1p log2 lower lpad ltrim max median min
    minute mod month normalize now nth_value ntile nullif octet_length percent_rank pi position
    pow power quantile_cont quantile_disc quarter radians rank regexp_like regexp_replace replace
    reverse right round row_number rpad rtrim second sign sin sind split_part sqrt starts_with
    stddev stddev_samp stdev stdev_samp strftime string_agg string_to_array strpos strptime struct
    substr substring sum tan tand time timestamp trim trunc truncate try_cast unnest upper var
    var_samp variance week year
    """.split()
)
_KEYWORDS: Final = frozenset(
    """
    all and any array as between by case char cube decimal distinct else except exclude exists
    filter from group having ilike in intersect is join like limit not numeric offset on or over
    partition qualify rename rlike rollup select sets some then union using values varchar when
    where with
    """.split()
)
_NO_COLUMN: Final = re.compile(r"(?:unable to find column |no column named )['\"]([^'\"]*)['\"]")
_NO_TABLE: Final = re.compile(r"relation '([^']*)' was not found")
_NO_NAMES: Final = re.compile(r"cannot compare string with numeric type")
_DESCRIBE: Final = re.compile(r"(?<!\s)\s*+desc(?:ribe)?\s++(\w++)\s*+;?\s*+", re.IGNORECASE)
_SUPPORTED: Final = "only SELECT, WITH, SHOW TABLES and DESCRIBE TABLE are understood"
NAMED: Final = "named_"
"""Prefix of a table's name: the table with names instead of numbers of leaves, statuses, exits."""


def run_query(
    sql: str, tables: Mapping[str, Table], load: Callable[[str], pl.DataFrame | pl.LazyFrame]
) -> pl.DataFrame:
    """Return the result of a SELECT.

    Columns have the names and types of the tables; numbers may be written in hexadecimal
    (``status = 0x8000020000000092``).  ``leaves`` (leaf, name, request) can be joined for
    the names of leaves; a table prefixed with ``named_`` has names instead of numbers
    (``select * from named_retry_chains where leaf = 'TDH.VP.ENTER'``).

    Args:
        sql: One statement, in the dialect of polars; or ``describe`` and a table, for its columns.
        tables: The tables that can be queried, by name.
        load: Returns the rows of a table, or a query of them; called for the tables that the
            statement names.

    Raises:
        QueryError: If the statement is not understood; for an unknown table or column the
            message gives the nearest name.
    """
    described = _DESCRIBE.fullmatch(sql)
    if described is not None:
        return _columns(described[1], tables)
    plain, names = _validated(sql)
    named = [name for name in tables if name in names]
    frames: dict[str, pl.DataFrame | pl.LazyFrame] = {
        name: load(name) if name in named else table.empty() for name, table in tables.items()
    }
    for view in (f"{NAMED}{name}" for name in tables if f"{NAMED}{name}" in names):
        named.append(view)
        frames[view] = with_names(load(view.removeprefix(NAMED)))
    frames[LEAVES] = leaf_table().select(*_LEAVES_COLUMNS)
    try:
        return pl.SQLContext(frames).execute(plain, eager=True)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        named += [LEAVES] if LEAVES in names else []
        columns = [
            name
            for table in named or frames
            for name in frames[table].lazy().collect_schema().names()
        ]
        raise QueryError(_describe(str(error), list(frames), columns)) from None


def _validated(sql: str) -> tuple[str, set[str]]:
    """Return the statement that is passed to polars, and the names in it.

    Comments are removed, numbers are decimal, and each parenthesis follows a function or keyword
    of ``_FUNCTIONS`` or ``_KEYWORDS``.

    Raises:
        QueryError: If it is not a SELECT, or contains anything else.
    """
    tokens: list[str] = []
    words = [""]
    at = 0
    while at < len(sql):
        found = _TOKEN.match(sql, at)
        if found is None:
            raise QueryError(f"SQL not understood at '{one_line(sql[at:], 20)}'")
        token, at = found[0], found.end()
        if found["space"]:
            tokens.append(" ")
            continue
        if token == "(":
            _refuse_unknown(words[-1])
        words.append(token)
        tokens.append(str(int(found["hex"], 16)) if found["hex"] else token)
    first = next((word for word in words if word not in ("", "(")), "")
    if first.lower() not in _SELECTS:
        raise QueryError(f"not a SELECT statement: '{one_line(sql, 40)}'; {_SUPPORTED}")
    return "".join(tokens), {word.strip('"`') for word in words}


def _refuse_unknown(before: str) -> None:
    """Raise an error if ``before``, the token before a parenthesis, is not allowed there."""
    word = before.lower()
    if re.match(r"(?:read|scan)_", word.strip("'\"`")):
        raise QueryError("a query can read only the tables of the trace, no files")
    if not (word[:1].isalpha() or word[:1] in ("_", "'", '"', "`")):
        return
    if word not in _FUNCTIONS and word not in _KEYWORDS:
        nearest = get_close_matches(word, sorted(_FUNCTIONS), n=1, cutoff=0)[0]
        raise QueryError(f"unsupported function '{one_line(before, 40)}'; nearest: {nearest}")


def _columns(name: str, tables: Mapping[str, Table]) -> pl.DataFrame:
    """Return the columns of a table: name, type, unit and meaning.

    Raises:
        QueryError: If the table does not exist.
    """
    table = tables.get(name.removeprefix(NAMED))
    columns = [(c.name, str(c.dtype), c.unit, c.doc) for c in table.columns] if table else []
    if name == LEAVES:
        dtypes = leaf_table().schema
        columns = [(c, str(dtypes[c]), None, text) for c, text in _LEAVES_COLUMNS.items()]
    if not columns:
        known = [*tables, LEAVES]
        raise QueryError(_describe(f"relation '{name}' was not found", known, []))
    return pl.DataFrame(
        columns,
        schema=dict.fromkeys(("column", "type", "unit", "meaning"), pl.String),
        orient="row",
    )


def _describe(error: str, tables: list[str], columns: list[str]) -> str:
    """Return one line that describes the error in the statement, with the nearest valid name."""
    for pattern, noun, known in (
        (_NO_TABLE, "table", tables),
        (_NO_COLUMN, "column", columns),
    ):
        found = pattern.search(error)
        if found is not None:
            nearest = get_close_matches(found[1], known, n=1, cutoff=0)[0]
            names = ", ".join(dict.fromkeys(known))
            return f"no {noun} '{one_line(found[1], 40)}'; nearest: {nearest} (of {names})"
    hint = "; named_TABLE has names in place of numbers" if _NO_NAMES.search(error) else ""
    return f"SQL not understood: {one_line(error.splitlines()[0])}{hint}"
