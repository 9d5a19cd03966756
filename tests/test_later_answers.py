"""Answers that are found when they are first asked for."""

from __future__ import annotations

import dataclasses

import polars as pl
from support.story import story

from tdxtrace import Findings, analyze


def test_an_answer_is_found_once_and_only_when_asked_for() -> None:
    asked: list[Findings] = []

    def count(findings: Findings) -> pl.DataFrame:
        asked.append(findings)
        return findings.retry_chains.head(1)

    found = analyze(story("B S S").trace)
    questions = {**found._questions, "retry_chains": count}
    findings = dataclasses.replace(found, _questions=questions)
    assert "on demand" in repr(findings)
    assert "on demand" in findings._repr_html_()
    assert asked == []
    assert findings._answer("retry_chains").height == 1
    assert findings._answer("retry_chains").height == 1
    assert asked == [findings]
    assert repr(findings).count("on demand") == len(found._questions)
