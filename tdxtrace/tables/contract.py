"""JSON Schema files of the tables and of the JSON report, generated from the catalog."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import polars as pl

from tdxtrace.tables.catalog import SCHEMA_VERSION, TABLES
from tdxtrace.tables.events import KERNEL_MESSAGES, LOADER_CALLS, LOSSES, THREADS
from tdxtrace.tables.findings import FINDING_TABLES
from tdxtrace.tables.schema import Column, Table

REPORT = "report"
"""Name of the schema of the JSON report."""
_JSON_TYPES = {"Boolean": "boolean", "String": "string", "Float64": "number"}


def _json_type(dtype: pl.DataType) -> dict[str, object]:
    if isinstance(dtype, pl.Enum):
        return {"type": "string", "enum": dtype.categories.to_list()}
    name = str(dtype)
    if name in _JSON_TYPES:
        return {"type": _JSON_TYPES[name]}
    bits = int("".join(filter(str.isdigit, name)))
    if name.startswith("UInt"):
        return {"type": "integer", "minimum": 0, "maximum": 2**bits - 1}
    return {"type": "integer", "minimum": -(2 ** (bits - 1)), "maximum": 2 ** (bits - 1) - 1}


def _column(column: Column) -> dict[str, object]:
    kind = _json_type(column.dtype)
    if column.nullable:
        kind["type"] = [kind["type"], "null"]
        if "enum" in kind:
            kind["enum"] = [*kind["enum"], None]  # type: ignore[misc]
    arrow = "Enum" if isinstance(column.dtype, pl.Enum) else str(column.dtype)
    unit = {"x-unit": column.unit} if column.unit else {}
    return {"description": column.doc, **kind, "x-polars-type": arrow, **unit}


def render(table: Table) -> str:
    """Return the JSON Schema (2020-12) of one row of ``table``, as text."""
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": table.name,
        "description": table.grain,
        "type": "object",
        "properties": {c.name: _column(c) for c in table.columns},
        "required": [c.name for c in table.columns if not c.optional],
        "additionalProperties": False,
        "x-key": list(table.key),
        "x-schema-version": SCHEMA_VERSION,
    }
    return json.dumps(schema, indent=2) + "\n"


def render_report() -> str:
    """Return the JSON Schema of what ``tdxtrace report --format json`` writes, as text."""
    properties = _report()
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": REPORT,
        "description": "a report: its sections as sentences, and the finding tables behind them",
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
        "x-schema-version": SCHEMA_VERSION,
    }
    return json.dumps(schema, indent=2) + "\n"


def _section(text: dict[str, object]) -> dict[str, object]:
    section: dict[str, object] = dict.fromkeys(("name", "title", "definition"), text)
    section["says"] = {"type": "array", "items": text}
    section["problems"] = {
        "description": "What is BUG or HOSTILE: what, where, evidence, rule, and what to do next.",
        "type": "array",
        "items": {"type": "object"},
    }
    return section


def _report() -> dict[str, dict[str, object]]:
    text: dict[str, object] = {"type": "string"}
    count: dict[str, object] = {"type": "integer", "minimum": 0}
    section = _section(text)
    rows = {
        table.name: {"type": "array", "items": {"$ref": f"{table.name}.json"}}
        for table in (*FINDING_TABLES, KERNEL_MESSAGES, LOADER_CALLS, THREADS, LOSSES)
    }
    return {
        "schema_version": {"const": SCHEMA_VERSION},
        "tdxtrace": {"description": "Version that wrote it.", **text},
        "title": text,
        "made": {
            "description": "Command, date (UTC) and SHA-256 of the inputs; empty where unknown.",
            "type": "object",
        },
        "provenance": {"description": "Inputs, and assumptions about them.", "type": "object"},
        "options": {"description": "Filters that were applied, if any.", "type": "object"},
        "sections": {
            "description": "Sections of the report, the most important first.",
            "type": "array",
            "items": {"type": "object", "properties": section, "required": list(section)},
        },
        "n_rows": {
            "description": "Number of rows of each table.",
            "type": "object",
            "additionalProperties": count,
        },
        "tables": {
            "description": "All rows, by table.",
            "type": "object",
            "properties": rows,
            "required": list(rows),
            "additionalProperties": False,
        },
    }


def write(folder: Path) -> None:
    """Write one file per table into ``folder``, and remove its other ``*.json`` files."""
    for stale in folder.glob("*.json"):
        stale.unlink()
    for table in TABLES:
        (folder / f"{table.name}.json").write_text(render(table), "utf-8")
    (folder / f"{REPORT}.json").write_text(render_report(), "utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1] if len(sys.argv) > 1 else "schemas"))
