"""``tdxtrace query``."""

from __future__ import annotations

import io
import json
from pathlib import Path

import polars as pl
import pytest
from support.running import answered, refused, tdxtrace

from tdxtrace.ingest.read import read_trace

COUNT = "select leaf, count(*) n from seamcalls group by leaf order by n desc, leaf"


def test_an_answer_can_be_had_in_four_forms(chains: Path) -> None:
    rows = pl.read_parquet(answered("query", chains, COUNT, "--format", "parquet").stdout)
    assert rows.columns == ["leaf", "n"]
    assert rows["n"].sum() == read_trace(chains).seamcalls.height
    csv = answered("query", chains, COUNT, "--format", "csv").stdout
    assert pl.read_csv(io.BytesIO(csv)).rows() == rows.rows()
    result = json.loads(answered("query", chains, COUNT, "--format", "json").text)
    assert [tuple(row.values()) for row in result] == rows.rows()
    first = answered("query", chains, COUNT).lines[1].split()
    assert first[-1] == str(rows["n"][0])
    assert first[0].startswith("TDH.")


def test_filters_hold_for_a_question(chains: Path) -> None:
    done = answered("query", chains, COUNT, "--leaf", "TDH.MEM.PAGE.AUG", "--format", "json")
    assert [row["leaf"] for row in json.loads(done.text)] == [6]


def test_names_that_tables_print_can_be_asked_for(chains: Path) -> None:
    enters = "select leaf, status from named_seamcalls where leaf = 'TDH.VP.ENTER'"
    rows = json.loads(answered("query", chains, enters, "--format", "json").text)
    n = read_trace(chains).seamcalls.filter(leaf=0).height
    assert [row["leaf"] for row in rows] == ["TDH.VP.ENTER"] * n
    assert "exit EPT_VIOLATION" in {row["status"] for row in rows}
    both = "select count(*) as n from seamcalls a join named_seamcalls b on a.seq = b.seq"
    assert json.loads(answered("query", chains, both, "--format", "json").text)[0]["n"] > n


def test_a_table_can_be_described(chains: Path) -> None:
    lines = answered("query", chains, "describe retry_chains").lines
    assert lines[0].split() == ["column", "type", "unit", "meaning"]
    assert any(line.startswith("took_ns ") and " ns " in line for line in lines)


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("describe retry_chain", "no table 'retry_chain'; nearest: retry_chains"),
        ("select 1 from seamcalls where leaf = 'TDH.VP.ENTER'", "named_TABLE has names"),
        ("select leef from seamcalls", "no column 'leef'; nearest: leaf"),
        ("select 1 from retry_chain", "no table 'retry_chain'; nearest: retry_chains"),
        ("vacuum", "not a SELECT statement"),
    ],
)
def test_a_wrong_word_is_answered_with_the_right_one(
    chains: Path, statement: str, message: str
) -> None:
    assert message in refused(2, "query", chains, statement)


def test_a_question_without_a_statement_is_refused(chains: Path) -> None:
    done = tdxtrace("query", chains)
    assert done.status == 2
    assert "Missing argument" in done.stderr


# A name that a spreadsheet would run, one that a terminal would obey, and plain ones.
NAMES = {
    "=cmd|'/c calc'!A1": "'=cmd|'/c calc'!A1",
    "+1": "'+1",
    "-1+2": "'-1+2",
    "@SUM(A1)": "'@SUM(A1)",
    "a\x1b[31mb": "a\\x1b[31mb",
    "\t=1": "\\t=1",
    "<script>alert(1)</script>": "<script>alert(1)</script>",
    'a, "b"': 'a, "b"',
}


@pytest.mark.parametrize(("name", "shown"), NAMES.items())
def test_csv_holds_names_as_text(name: str, shown: str) -> None:
    from tdxtrace.cli.options import OutputFormat
    from tdxtrace.cli.outputs import serialise

    data = serialise(pl.DataFrame({"comm": [name, None], "tid": [-1, 2]}), OutputFormat.csv)
    back = pl.read_csv(io.BytesIO(data))
    assert back.rows() == [(shown, -1), (None, 2)]
