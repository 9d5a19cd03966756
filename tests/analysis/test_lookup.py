"""Lookup of rows by source and number."""

import polars as pl
from hypothesis import given
from hypothesis import strategies as st

from tdxtrace.analysis.lookup import find_rows

_KEYS = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 9)), max_size=12)
_SCHEMA = {"source": pl.UInt16, "seq": pl.UInt64}


@given(_KEYS, _KEYS)
def test_a_row_is_found_by_its_source_and_number_as_a_join_finds_it(
    wanted: list[tuple[int, int]], known: list[tuple[int, int]]
) -> None:
    rows = pl.DataFrame(wanted, schema=_SCHEMA, orient="row")
    others = pl.DataFrame(sorted(set(known)), schema=_SCHEMA, orient="row")
    joined = rows.join(
        others.with_row_index("row"), on=["source", "seq"], how="left", maintain_order="left"
    )
    assert find_rows(rows, others).to_list() == joined["row"].to_list()


def test_all_rows_in_order_are_found() -> None:
    rows = pl.DataFrame([(0, 3), (1, 1)], schema=_SCHEMA, orient="row")
    assert find_rows(rows, rows).to_list() == [0, 1]
