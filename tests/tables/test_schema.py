"""A declared table, and frames held against it."""

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
        Column("number", pl.UInt8(), "Which."),
        Column("name", pl.String(), "How called.", nullable=True),
        Column("age_s", pl.Int64(), "How old.", unit="s"),
    ),
    key=("number",),
    rules={"nobody is unborn": pl.col("age_s") >= 0},
)


def people(*rows: tuple[int | None, str | None, int | None]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=PEOPLE.schema, orient="row")


def test_an_empty_table_has_every_column_and_no_row() -> None:
    assert PEOPLE.empty().schema == PEOPLE.schema
    assert PEOPLE.check(PEOPLE.empty()).height == 0


def test_conform_takes_the_columns_in_order_and_leaves_out_others() -> None:
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
def test_conform_says_what_is_missing_or_of_another_type(frame: pl.DataFrame, said: str) -> None:
    with pytest.raises(TableError, match=said) as error:
        PEOPLE.conform(frame)
    assert str(error.value).startswith("not a 'people' table: ")


def test_conform_does_not_look_at_values() -> None:
    PEOPLE.conform(people((None, None, -5), (None, None, None)))


def test_check_returns_what_is_sound() -> None:
    sound = people((1, "a", 5), (2, None, 0))
    assert PEOPLE.check(sound).equals(sound)


@pytest.mark.parametrize(
    ("frame", "said"),
    [
        (people((None, "a", 1), (2, "b", 1)), "'number is never null' fails in 1 of 2 rows"),
        (people((1, "a", 1), (1, "b", 1), (2, "c", 1)), "'key is unique: number' fails in 2 of 3"),
        (people((1, "a", -1)), "'nobody is unborn' fails in 1 of 1 rows"),
        (people((1, "a", None)), "'age_s is never null' fails in 1 of 1 rows"),
        (people((None, "a", -1)), "'number is never null'.*; 'nobody is unborn'"),
    ],
)
def test_check_counts_the_rows_behind_each_broken_promise(frame: pl.DataFrame, said: str) -> None:
    with pytest.raises(TableError, match=said) as error:
        PEOPLE.check(frame)
    assert str(error.value).startswith("unsound 'people' table: ")


def test_a_rule_about_what_was_not_observed_is_not_broken() -> None:
    lenient = Table("t", "", (Column("x", pl.Int64(), "", nullable=True),), ("x",), PEOPLE.rules)
    rules = {"positive": pl.col("x") > 0}
    table = Table("t", "", lenient.columns, ("x",), rules)
    assert table.check(pl.DataFrame({"x": [1, None]})).height == 2


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_every_table_is_declared_in_full(table: Table) -> None:
    names = [column.name for column in table.columns]
    assert len(set(names)) == len(names)
    assert set(table.key) <= set(names)
    assert table.grain.startswith("one row per ")
    assert table.empty().schema == table.schema
    table.check(table.empty())
    for column in table.columns:
        assert column.doc.endswith(".")
        assert (column.unit == "ns") is column.name.endswith("_ns"), column.name


def test_tables_have_names_of_their_own() -> None:
    assert len({table.name for table in TABLES}) == len(TABLES)


@given(st.sampled_from([column for column in SEAMCALLS.columns if not column.optional]))
def test_a_table_without_a_column_is_refused(column: Column) -> None:
    with pytest.raises(TableError, match=f"column '{column.name}' is missing"):
        SEAMCALLS.check(story("B S").seamcalls.drop(column.name))


def test_an_optional_column_is_there_only_if_a_row_has_a_value() -> None:
    calls = story("B S").seamcalls
    assert SEAMCALLS.empty().columns == calls.columns
    wide = SEAMCALLS.with_optional(calls)
    assert [name for name in wide.columns if name not in calls.columns] == ["page_2", "page_3"]
    assert SEAMCALLS.check(wide).equals(wide)
    assert SEAMCALLS.without_unused(wide).equals(calls)
    second = wide.with_columns(page_2=pl.lit(0x1000, pl.UInt64))
    assert SEAMCALLS.without_unused(second).columns == [*calls.columns, "page_2"]
    with pytest.raises(TableError, match="'page_2' is Int64, not UInt64"):
        SEAMCALLS.conform(calls.with_columns(page_2=pl.lit(1, pl.Int64)))
