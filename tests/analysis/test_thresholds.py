"""Failure rules of a CI job."""

from __future__ import annotations

import pytest
from support.running import SAMPLES
from support.story import story

from tdxtrace.analysis.thresholds import QUANTITIES, check_findings, parse_rule
from tdxtrace.errors import QueryError
from tdxtrace.ingest.read import read_trace
from tdxtrace.pipeline import analyze

BUSY = analyze(
    story("B1 B1 B1 S1 E2 S3 4/B4 4/S5 2/enterB 2/enterC 3/>F 3/>C lost _5s S6 B7").trace,
)
CALM = analyze(story("").trace)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max-attempts", 4),
        ("max-chain-ms", 0.07),
        ("retried-seamcalls", 4),
        ("busy", 6),
        ("abandoned", 1),
        ("failed", 1),
        ("cut", 2),
        ("zero-steps", 1),
        ("losses", 1),
        # All of them are undecided.
        ("problems", 0),
    ],
)
def test_every_quantity_has_its_value(name: str, value: float) -> None:
    assert QUANTITIES[name](BUSY) == pytest.approx(value)


def test_problems_are_counted_by_their_rule() -> None:
    findings = analyze(read_trace(SAMPLES / "contended.txt"))
    assert findings.verdicts["verdict"].eq("BUG").sum() > 2
    assert QUANTITIES["problems"](findings) == 2


def test_every_quantity_is_tested_here() -> None:
    marks = test_every_quantity_has_its_value.pytestmark  # type: ignore[attr-defined]
    assert {name for name, _ in marks[0].args[1]} == set(QUANTITIES)


@pytest.mark.parametrize("name", sorted(QUANTITIES))
def test_empty_findings_give_zero_for_every_quantity(name: str) -> None:
    assert QUANTITIES[name](CALM) == 0


@pytest.mark.parametrize(
    ("rule", "broken"),
    [
        ("max-attempts>3", True),
        ("max-attempts>4", False),
        ("max-attempts>=4", True),
        ("max-attempts<5", True),
        ("max-attempts<4", False),
        ("max-attempts<=4", True),
        ("max-attempts==4", True),
        ("max-attempts==5", False),
        ("max_attempts > 3", True),
        (" zero-steps>0 ", True),
        ("zero-steps>1", False),
        ("max-chain-ms>0.06", True),
        ("max-chain-ms>0.08", False),
    ],
)
def test_a_rule_compares(rule: str, broken: bool) -> None:
    assert bool(check_findings(BUSY, [parse_rule(rule)])) is broken


def test_each_broken_rule_is_one_line_with_value_and_limit() -> None:
    rules = [parse_rule(text) for text in ("max-attempts>3", "failed>9", "cut>=2")]
    assert check_findings(BUSY, rules) == [
        "max-attempts is 4, the rule is to fail on max-attempts>3",
        "cut is 2, the rule is to fail on cut>=2",
    ]


@pytest.mark.parametrize(
    "text", ["", "max-attempts", "max-attempts>", ">3", "max-attempts>x", "max-attempts=>3", "a!=1"]
)
def test_a_malformed_rule_is_refused(text: str) -> None:
    with pytest.raises(QueryError, match="not a rule"):
        parse_rule(text)


def test_an_unknown_quantity_is_refused_with_the_nearest() -> None:
    with pytest.raises(
        QueryError, match=r"unknown quantity 'max-tries'; nearest: max-.*zero-steps"
    ):
        parse_rule("max-tries>3")
