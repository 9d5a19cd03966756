"""SQL queries of events and findings."""

from __future__ import annotations

from typing import Any

import polars as pl
import pytest
from support.story import story

import tdxtrace
from tdxtrace.analysis.selection import Selection
from tdxtrace.errors import QueryError
from tdxtrace.tables.events import EVENT_TABLES
from tdxtrace.tables.findings import FINDING_TABLES
from tdxtrace.tables.trace import Trace

BUSY = "0x8000020000000092"


@pytest.fixture
def trace() -> Trace:
    return story("B1 B1 S1 2/S2 lost@1 2/trackB 2/trackS").trace


def test_events_and_findings_can_be_joined(trace: Trace) -> None:
    rows = trace.sql(
        "select c.first_seq, s.status from retry_chains c join seamcalls s "
        "on c.last_seq = s.seq order by c.first_seq"
    )
    assert rows.rows() == [(2, 0), (8, 0), (11, 0)]


def test_every_table_can_be_queried(trace: Trace) -> None:
    whole = trace.tables() | tdxtrace.analyze(trace).tables()
    assert set(whole) == {t.name for t in (*EVENT_TABLES, *FINDING_TABLES)}
    for name, rows in whole.items():
        assert tdxtrace.query(trace, f"select * from {name}").equals(rows)


def test_numbers_may_be_hexadecimal(trace: Trace) -> None:
    busy = trace.sql(f"select seq from seamcalls where status = {BUSY}")
    assert busy["seq"].to_list() == [2, 4, 11]
    assert trace.sql("select seq from seamcalls where gpa = 0X2000")["seq"].to_list() == [8]


def test_hexadecimal_in_quotes_is_unchanged(trace: Trace) -> None:
    assert trace.sql("select '0x10' as a, 'it''s 0x1' as b").row(0) == ("0x10", "it's 0x1")
    assert trace.sql('select seq as "0x10" from seamcalls limit 1').columns == ["0x10"]


def test_leaf_names_can_be_joined(trace: Trace) -> None:
    rows = trace.sql("select distinct name from seamcalls join leaves using (leaf) order by name")
    assert rows["name"].to_list() == ["TDH.MEM.PAGE.AUG", "TDH.MEM.TRACK"]


def test_show_tables_lists_every_table(trace: Trace) -> None:
    named = trace.sql("show tables")["name"].to_list()
    assert set(named) == {t.name for t in (*EVENT_TABLES, *FINDING_TABLES)} | {"leaves"}


def test_a_query_respects_the_selection(trace: Trace) -> None:
    only = Selection(leaves=("TDH.MEM.TRACK",))
    for table in ("seamcalls", "retry_chains"):
        rows = tdxtrace.query(trace, f"select distinct leaf from {table}", only)
        assert rows["leaf"].to_list() == [38]


def test_a_query_of_events_runs_no_analysis(trace: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tdxtrace.pipeline.analyze", None)
    assert trace.sql("select count(*) from seamcalls").item() == 6


def test_findings_can_be_queried_without_events(trace: Trace) -> None:
    findings = tdxtrace.analyze(trace)
    assert findings.sql("select sum(n_attempts) from retry_chains").item() == 6
    with pytest.raises(QueryError, match="no table 'seamcalls'; nearest"):
        findings.sql("select * from seamcalls")


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("select leef from seamcalls", r"no column 'leef'; nearest: leaf \(of source, seq"),
        ("select s.stat from seamcalls s", "no column 'stat'; nearest: status"),
        ("select * from seamcals", r"no table 'seamcals'; nearest: seamcalls \(of"),
        ("select a\x1b[31m from seamcalls", "SQL not understood"),
        ('select * from "x\x1b[31m"', r"no table 'x\\x1b\[31m'"),
        ("select hex(seq) from seamcalls", "unsupported function 'hex'; nearest: exp"),
        ("select seq from seamcalls where", "SQL not understood: sql parser error"),
        ("select 1; select 2", "one .* statement"),
        ("drop table seamcalls", "not a SELECT statement: 'drop table seamcalls'; only SELECT"),
        ("", "not a SELECT statement: ''"),
        ("select probe from seamcalls where probe = 3", "SQL not understood"),
    ],
)
def test_an_invalid_statement_is_explained_in_one_line(
    trace: Trace, statement: str, message: str
) -> None:
    with pytest.raises(QueryError, match=message) as raised:
        trace.sql(statement)
    assert str(raised.value).isprintable()


FILES = """
select * from read_csv(F)
select * from READ_CSV (F)
select * from "read_csv"(F)
select * from 'read_csv'(F)
select * from `read_csv` (F)
select * from read_csv/* */(F)
select * from read_csv -- (\\n(F)
select * from /* ' */ read_csv(F) -- '
select * from seamcalls, "read_csv"(F)
select * from seamcalls join "read_csv"(F) using (source)
select 'a\\' from "read_csv"(F) where a = ''
select E'\\'' from "read_csv"(F) where a = ''
select $$'$$ from "read_csv"(F) -- '
select 1 from "a""b", "read_csv"(F)
select `a``b` from "read_csv"(F)
select 1from"read_csv"(F)
with t as (select * from "read_csv"(F)) select * from t
select * from (select * from "Read_Csv"(F)) t
select (select max(root) from "read_csv"(F)) from seamcalls
select source from seamcalls union all (select 1 from "scan_csv"(F))
select source from seamcalls where seq in (select 1 from read_parquet(F))
select * from read_ipc(F)
select * from read_json(F)
select * from lateral "read_ndjson"(F)
select * from table("read_csv"(F))
select * from main."read_csv"(F)
(select * from "read_csv"(F))
show tables; select * from "read_csv"(F)
select * from F
select * from "/etc/passwd"
explain select * from "read_csv"(F)
"""


@pytest.mark.parametrize("statement", FILES.strip().split("\n"))
def test_no_statement_reads_a_file(
    trace: Trace, statement: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Polars gets nothing that would read one."""
    reached: list[str] = []
    execute: Any = pl.SQLContext.execute

    def watched(context: object, query: str, *, eager: bool) -> object:
        reached.append(query)
        return execute(context, query, eager=eager)

    monkeypatch.setattr(pl.SQLContext, "execute", watched)
    with pytest.raises(QueryError):
        trace.sql(statement.replace("F", "'/etc/passwd'").replace("\\n", "\n"))
    assert not any("read" in query or "scan" in query for query in reached)


@pytest.mark.parametrize(
    "statement",
    [
        "select count(*) filter (where leaf = 6), (1 + 2) * 3 as n from seamcalls -- all",
        "with t as (select seq from seamcalls /* read_csv( */) select max(seq) from t",
        "select '-- read_csv(', \"source\" from seamcalls s where s.seq in (2, 4) and not (1 = 2)",
        "(select seq from seamcalls) union all (select seq from seamcalls)",
        "select leaf, row_number() over (partition by tid order by seq) from seamcalls",
        "select cast(seq as varchar(9)), 1e3, .5, 1.5e-3 from seamcalls where '1' ~ '\\d'",
    ],
)
def test_usual_statements_are_answered(trace: Trace, statement: str) -> None:
    assert trace.sql(statement).width


def test_an_empty_result_has_the_selected_columns(trace: Trace) -> None:
    rows = story("").trace.sql("select seq, status from seamcalls where leaf = 6")
    assert rows.schema == {"seq": pl.UInt64, "status": pl.UInt64}
    assert rows.is_empty()


def test_the_table_of_leaves_is_described_and_corrected_like_the_others() -> None:
    trace = story("B1 S1").trace
    described = trace.sql("describe leaves")
    assert described["column"].to_list() == ["leaf", "name", "request"]
    with pytest.raises(QueryError, match=r"^no column 'nme'; nearest: name \(of leaf, name, req"):
        trace.sql("select nme from leaves")
