"""Finding tables that are computed on first access."""

from __future__ import annotations

import dataclasses

import polars as pl
from support.story import story

from tdxtrace import Findings, analyze


def test_a_table_is_computed_once_and_only_on_access() -> None:
    calls: list[Findings] = []

    def count(findings: Findings) -> pl.DataFrame:
        calls.append(findings)
        return findings.leaf_stats.head(1)

    found = analyze(story("B S S").trace)
    analyses = {**found._analyses, "td_conflicts": count}
    findings = dataclasses.replace(found, _analyses=analyses)
    pending = repr(findings).count("on demand")
    assert pending > 20
    assert "on demand" in findings._repr_html_()
    assert calls == []
    assert findings._table("td_conflicts").height == 1
    assert findings._table("td_conflicts").height == 1
    assert calls == [findings]
    assert repr(findings).count("on demand") == pending - 1
