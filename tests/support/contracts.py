"""Validation of rows and reports against the published JSON Schemas."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import jsonschema  # type: ignore[import-untyped]
from referencing import Registry, Resource

from tdxtrace.tables.catalog import TABLES
from tdxtrace.tables.contract import render, render_report
from tdxtrace.tables.schema import Table


@cache
def _validator(text: str) -> Any:  # noqa: ANN401 - the library has no types
    schema = json.loads(text)
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def breaches(table: Table, rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the violations of ``table``'s schema by rows; the schema itself is checked too."""
    validator = _validator(render(table))
    return [
        f"{'/'.join(map(str, error.path))}: {error.message}"
        for row in rows
        for error in validator.iter_errors(row)
    ]


def report_breaches(report: Mapping[str, Any]) -> list[str]:
    """Return the violations of the report's schema, including those of its tables' rows."""
    contracts = {f"{t.name}.json": json.loads(render(t)) for t in TABLES}
    registry = Registry().with_resources(
        (name, Resource.from_contents(contract)) for name, contract in contracts.items()
    )
    schema = json.loads(render_report())
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema, registry=registry)
    return [error.message for error in validator.iter_errors(report)]
