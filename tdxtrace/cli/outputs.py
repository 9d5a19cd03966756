"""Output of commands: tables as data, and files that are written atomically."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl

from tdxtrace.cli.options import OutputFormat
from tdxtrace.cli.screen import json_text
from tdxtrace.errors import InputError, QueryError
from tdxtrace.tables.files import Inputs, atomic_file, atomic_folder
from tdxtrace.tables.store import is_store
from tdxtrace.tables.text import one_line

# Maximum length of a spreadsheet cell: Excel's limit, 32,767 characters.
_MAX_CELL = 32_767


def serialise(rows: pl.DataFrame, form: OutputFormat) -> bytes:
    """Return a table as CSV, JSON (one array of objects) or Parquet."""
    buffer = io.BytesIO()
    if form is OutputFormat.csv:
        rows.with_columns(_escape_formulas(pl.selectors.string())).write_csv(buffer)
    elif form is OutputFormat.json:
        rows.write_json(buffer)
        buffer.write(b"\n")
    else:
        rows.write_parquet(buffer)
    return buffer.getvalue()


def _escape_formulas(texts: pl.Expr) -> pl.Expr:
    """Return text without control characters, which spreadsheets do not parse as formulas.

    Cells that begin with = + - @ or a tab are prefixed with an apostrophe: OWASP, "CSV
    Injection".
    """
    printable = texts.map_batches(
        lambda cells: pl.Series(
            [None if cell is None else one_line(cell, _MAX_CELL) for cell in cells], dtype=pl.String
        ),
        return_dtype=pl.String,
    )
    return printable.str.replace(r"^([=+\-@])", "'$1")


def write_table(
    rows: pl.DataFrame,
    form: OutputFormat,
    output: Path | None,
    *,
    force: bool,
    inputs: Inputs,
) -> None:
    """Write a table as ``form`` to ``output``, or to stdout.

    Raises:
        InputError: If ``output`` exists and ``force`` is not given, is one of ``inputs``, or
            cannot be written.
        QueryError: If ``form`` is Parquet and stdout is a terminal.
    """
    if form is OutputFormat.parquet and output is None and sys.stdout.isatty():
        raise QueryError("Parquet is binary: name a file with --output FILE")
    data = serialise(rows, form)
    if output is None:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    else:
        write_file(output, data, force=force, inputs=inputs)


def write_file(path: Path, data: bytes, *, force: bool, inputs: Inputs) -> None:
    """Write a file atomically.

    Raises:
        InputError: If it exists and ``force`` is not given, is one of ``inputs``, or cannot be
            written.
    """
    with atomic_file(path, force=force, inputs=inputs) as file:
        file.write(data)


def write_folder(
    folder: Path,
    tables: dict[str, pl.DataFrame],
    facts: dict[str, Any],
    inputs: Sequence[str | Path | None],
) -> None:
    """Write every table as Parquet, and ``findings.json``, into ``folder``.

    Raises:
        InputError: If the folder cannot be made or written, is a converted trace (its tables
            have the same names), or if a file to write is one of ``inputs``.
    """
    if is_store(folder):
        shown = one_line(str(folder))
        raise InputError(f"{shown} is a converted trace; name another folder for the answers")
    with atomic_folder(folder, force=True, inputs=inputs) as made:
        for name, rows in tables.items():
            with (made / f"{name}.parquet").open("wb") as file:
                rows.write_parquet(file)
        (made / "findings.json").write_bytes(json_text(facts).encode())
