"""Checks of data frames against declared tables."""

from __future__ import annotations

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.story import story

from tdxtrace.errors import TableError
from tdxtrace.tables.catalog import TABLES
from tdxtrace.tables.events import SEAMCALLS
from tdxtrace.tables.schema import Column, Table

PEOPLE = Table(
    name="people",
    grain="one row per person",
    columns=(
        Column("number", pl.UInt8(), "Number of the person."),
        Column("name", pl.String(), "Name.", nullable=True),
        Column("age_s", pl.Int64(), "Age.", unit="s"),
    ),
    key=("number",),
    rules={"age is not negative": pl.col("age_s") >= 0},
)


def people(*rows: tuple[int | None, str | None, int | None]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=PEOPLE.schema, orient="row")


def test_an_empty_table_has_every_column_and_no_row() -> None:
    assert PEOPLE.empty().schema == PEOPLE.schema
    assert PEOPLE.check(PEOPLE.empty()).height == 0


def test_conform_selects_the_columns_in_order() -> None:
    mixed = people((1, "a", 5)).select("age_s", pl.lit(7).alias("more"), "number", "name")
    assert PEOPLE.conform(mixed).columns == ["number", "name", "age_s"]


@pytest.mark.parametrize(
    ("frame", "said"),
    [
        (people().drop("name"), "column 'name' is missing"),
        (people().with_columns(pl.col("number").cast(pl.Int64)), "column 'number' is Int64, not U"),
        (people().drop("name", "age_s"), "'name' is missing; column 'age_s' is missing"),
    ],
)
def test_conform_names_missing_and_mistyped_columns(frame: pl.DataFrame, said: str) -> None:
    with pytest.raises(TableError, match=said) as error:
        PEOPLE.conform(frame)
    assert str(error.value).startswith("not a 'people' table: ")


def test_conform_does_not_check_values() -> None:
    PEOPLE.conform(people((None, None, -5), (None, None, None)))


def test_check_returns_a_valid_frame() -> None:
    valid = people((1, "a", 5), (2, None, 0))
    assert PEOPLE.check(valid).equals(valid)


@pytest.mark.parametrize(
    ("frame", "said"),
    [
        (people((None, "a", 1), (2, "b", 1)), "'number is never null' fails in 1 of 2 rows"),
        (people((1, "a", 1), (1, "b", 1), (2, "c", 1)), "'key is unique: number' fails in 2 of 3"),
        (people((1, "a", -1)), "'age is not negative' fails in 1 of 1 rows"),
        (people((1, "a", None)), "'age_s is never null' fails in 1 of 1 rows"),
        (people((None, "a", -1)), "'number is never null'.*; 'age is not negative'"),
    ],
)
def test_check_counts_the_rows_of_each_failure(frame: pl.DataFrame, said: str) -> None:
    with pytest.raises(TableError, match=said) as error:
        PEOPLE.check(frame)
    assert str(error.value).startswith("invalid 'people' table: ")


def test_a_rule_does_not_fail_on_null() -> None:
    lenient = Table("t", "", (Column("x", pl.Int64(), "", nullable=True),), ("x",), PEOPLE.rules)
    rules = {"positive": pl.col("x") > 0}
    table = Table("t", "", lenient.columns, ("x",), rules)
    assert table.check(pl.DataFrame({"x": [1, None]})).height == 2


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_every_table_is_fully_declared(table: Table) -> None:
    names = [column.name for column in table.columns]
    assert len(set(names)) == len(names)
    assert set(table.key) <= set(names)
    assert table.grain.startswith("one row per ")
    assert table.empty().schema == table.schema
    table.check(table.empty())
    for column in table.columns:
        assert column.doc.endswith(".")
        assert (column.unit == "ns") is column.name.endswith("_ns"), column.name


def test_names_of_tables_are_unique() -> None:
    assert len({table.name for table in TABLES}) == len(TABLES)


@given(st.sampled_from([column for column in SEAMCALLS.columns if not column.optional]))
def test_a_frame_without_a_column_is_rejected(column: Column) -> None:
    with pytest.raises(TableError, match=f"column '{column.name}' is missing"):
        SEAMCALLS.check(story("B S").seamcalls.drop(column.name))


def test_an_optional_column_exists_only_if_a_row_has_a_value() -> None:
    calls = story("B S").seamcalls
    assert SEAMCALLS.empty().columns == calls.columns
    wide = SEAMCALLS.with_optional(calls)
    assert [name for name in wide.columns if name not in calls.columns] == ["page_2", "page_3"]
    assert SEAMCALLS.check(wide).equals(wide)
    with pytest.raises(TableError, match="'page_2' is Int64, not UInt64"):
        SEAMCALLS.conform(calls.with_columns(page_2=pl.lit(1, pl.Int64)))
