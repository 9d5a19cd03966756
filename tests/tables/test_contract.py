"""The JSON Schemas of the tables: valid, and satisfied by rows of real traces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import polars as pl
import pytest
from support.contracts import breaches
from support.running import SAMPLE_FILES, SAMPLES
from support.story import story

from tdxtrace.ingest.read import read_trace
from tdxtrace.pipeline import analyze
from tdxtrace.tables.catalog import SCHEMA_VERSION, TABLES
from tdxtrace.tables.contract import render, write
from tdxtrace.tables.events import EVENT_TABLES, LOSSES, SEAMCALLS
from tdxtrace.tables.findings import FINDING_TABLES
from tdxtrace.tables.schema import Column, Table

ROOT = SAMPLES.parent
FROM_TRACES = (*EVENT_TABLES, *FINDING_TABLES)


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_a_contract_is_a_valid_schema(table: Table) -> None:
    schema = json.loads(render(table))
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert (schema["title"], schema["description"]) == (table.name, table.grain)
    assert schema["x-key"] == list(table.key)
    assert schema["x-schema-version"] == SCHEMA_VERSION
    assert list(schema["properties"]) == [c.name for c in table.columns]
    assert schema["required"] == [c.name for c in table.columns if not c.optional]
    assert schema["additionalProperties"] is False


@pytest.mark.parametrize("path", SAMPLE_FILES, ids=lambda path: path.name)
def test_rows_of_a_sample_satisfy_their_schemas(path: Path) -> None:
    trace = read_trace(path)
    tables = trace.tables() | analyze(trace).tables()
    assert set(tables) == {table.name for table in FROM_TRACES}
    for table in FROM_TRACES:
        assert breaches(table, tables[table.name].head(60).to_dicts()) == []


def test_rows_of_rare_events_satisfy_their_schemas() -> None:
    trace = story("B~ S U lost@1 >F ?1 >W enterB 2/>U full@2 9/S1^2#7", {1: 40}).trace
    tables = trace.tables() | analyze(trace).tables()
    for table in FROM_TRACES:
        assert breaches(table, tables[table.name].to_dicts()) == []


VALID_ROW: dict[str, Any] = story("B S").seamcalls.row(0, named=True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"status": -1}, "minimum"),
        ({"status": 2**64}, "maximum"),
        ({"leaf": 65_536}, "maximum"),
        ({"leaf": None}, "not of type 'integer'"),
        ({"leaf": "6"}, "not of type 'integer'"),
        ({"leaf": 6.5}, "not of type 'integer'"),
        ({"probe": "guess"}, "not one of"),
        ({"probe": None}, "not one of|not of type"),
        ({"in_irq": 1}, "not of type 'boolean'"),
        ({"start_ns": -(2**63) - 1}, "minimum"),
        ({"more": 1}, "Additional properties"),
    ],
)
def test_a_schema_rejects_values_outside_the_types_of_the_table(
    change: dict[str, Any], said: str
) -> None:
    assert breaches(SEAMCALLS, [VALID_ROW]) == []
    (result, *_) = breaches(SEAMCALLS, [VALID_ROW | change])
    assert any(word in result for word in said.split("|"))


@pytest.mark.parametrize("name", ["status", "gpa", "td_id", "start_ns", "tid", "in_irq"])
def test_null_is_allowed_in_nullable_columns(name: str) -> None:
    assert breaches(SEAMCALLS, [VALID_ROW | {name: None}]) == []


def test_a_nullable_enum_allows_null_and_its_values() -> None:
    cut = next(t for t in TABLES if t.name == "retry_chains")
    trace = story("B").trace
    row = analyze(trace).retry_chains.row(0, named=True)
    for value in (None, "trace_end", "lost_events"):
        assert breaches(cut, [row | {"cut_by": value}]) == []
    assert breaches(cut, [row | {"cut_by": "unknown_value"}])


def test_units_and_types_are_in_the_schema() -> None:
    properties = json.loads(render(LOSSES))["properties"]
    assert properties["start_ns"]["x-unit"] == "ns"
    assert "x-unit" not in properties["n_lines"]
    assert properties["kind"]["x-polars-type"] == "Enum"
    assert properties["n_lines"]["x-polars-type"] == "UInt64"


def test_writing_removes_stale_schemas_and_keeps_other_files(tmp_path: Path) -> None:
    (tmp_path / "gone.json").write_text("{}")
    (tmp_path / "README.md").write_text("mine")
    write(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {
        *(f"{table.name}.json" for table in TABLES),
        "README.md",
        "report.json",
    }
    for table in TABLES:
        assert (tmp_path / f"{table.name}.json").read_text() == render(table)


def test_rendering_is_deterministic_and_ends_with_a_newline() -> None:
    table = Table("t", "one row per t", (Column("x", pl.Int8(), "X.", nullable=True),), ("x",))
    text = render(table)
    assert text == render(table)
    assert text.endswith("}\n")
    assert json.loads(text)["properties"]["x"] == {
        "description": "X.",
        "type": ["integer", "null"],
        "minimum": -128,
        "maximum": 127,
        "x-polars-type": "Int8",
    }
