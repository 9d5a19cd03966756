"""Several inputs with equal TD, thread and time values are analyzed independently."""

from __future__ import annotations

from dataclasses import replace

import polars as pl
import pytest
from support.story import story

from tdxtrace.pipeline import analyze
from tdxtrace.tables.findings import FINDING_TABLES
from tdxtrace.tables.trace import Findings, Trace

FAULTS = "enterX S1 " * 7
BUSY = f"{FAULTS} enterB enterB enterC 2/(7 B7 2/)S S7 2/blockK3 2/blockK3 2/trackS enterZ _ 2/S9"
CALM = "S1 2/blockS1 2/trackS enterX >X ?1 S2 2/E3 2/S3 enterX enterC"
LEFT = "2/B1 2/S2 3/S1 trackP trackS blockK1 S5 cachewbI! cachewbS! demoteJ4 demoteJ4 demoteS4"
# What is about all inputs together.
_TOGETHER = {
    *("attempts", "latencies", "policies", "limits", "limit_statements"),
    *("losses", "threads"),
}


def together(*texts: str) -> Trace:
    """The stories as inputs of one trace."""
    alone = [story(text).trace for text in texts]
    tables = {
        name: pl.concat(
            table.with_columns(source=pl.lit(number, pl.UInt16))
            for number, trace in enumerate(alone)
            for table in [trace.tables()[name]]
        )
        for name in alone[0].tables()
    }
    sources = tuple(trace.provenance.sources[0] for trace in alone)
    return replace(alone[0], **tables, provenance=replace(alone[0].provenance, sources=sources))


def of_source(table: pl.DataFrame, number: int) -> pl.DataFrame:
    rows = table.filter(pl.col("source") == number)
    sources = [c for c in rows.columns if c == "source" or c.endswith("_source")]
    return rows.with_columns(pl.lit(0, rows.schema[c]).alias(c) for c in sources)


@pytest.mark.parametrize("texts", [(BUSY, BUSY), (BUSY, CALM), (LEFT, CALM), (LEFT, BUSY, CALM)])
def test_each_input_is_judged_for_itself(texts: tuple[str, ...]) -> None:
    findings = analyze(together(*texts))
    for number, text in enumerate(texts):
        alone = analyze(story(text).trace)
        for name in [table.name for table in FINDING_TABLES if table.name not in _TOGETHER]:
            expected: pl.DataFrame = getattr(alone, name)
            found = of_source(getattr(findings, name), number)
            sources = [c for c in found.columns if c.endswith("_source")]
            order = [c for c in found.columns if c not in sources]
            assert found.drop(sources).sort(order).equals(expected.drop(sources).sort(order)), name


def rows_of_td(findings: Findings, source: int) -> pl.DataFrame:
    of_td = findings.attempts.filter(pl.col("by") == "td", pl.col("source") == source)
    return of_td.drop("source")


def test_curves_of_tds_are_of_one_input() -> None:
    findings = analyze(together(BUSY, CALM))
    assert findings.attempts.filter(pl.col("by") != "td")["source"].null_count() > 0
    assert findings.attempts.filter(pl.col("by") == "td")["source"].null_count() == 0
    for number, text in enumerate((BUSY, CALM)):
        assert rows_of_td(findings, number).equals(rows_of_td(analyze(story(text).trace), 0))


def test_tds_are_counted_by_input() -> None:
    limits = analyze(together(BUSY, CALM, LEFT)).limits
    assert limits.filter(leaf=6)["n_tds"].unique().to_list() == [3]
