"""User-defined failure rules such as ``max-attempts>16``."""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import polars as pl

from tdxtrace.errors import QueryError
from tdxtrace.tables.trace import Findings
from tdxtrace.tables.verdicts import PROBLEMS

_RULE: Final = re.compile(
    r"^\s*(?P<name>[\w-]+)\s*(?P<sign>>=|<=|==|>|<)\s*(?P<limit>\d+(\.\d+)?)\s*$"
)
_OPERATORS: Final[Mapping[str, Callable[[float, float], bool]]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
    "==": operator.eq,
}


@dataclass(frozen=True, slots=True)
class FailRule:
    """Rule that fails if comparing the quantity with the limit by ``sign`` is true."""

    name: str
    sign: str
    limit: float


def _outcomes(name: str) -> Callable[[Findings], float]:
    return lambda f: f.retry_chains.filter(pl.col("outcome") == name).height


def _losses(findings: Findings) -> float:
    return findings.losses.filter(pl.col("severity") != "info").height


def _longest_ms(findings: Findings) -> float:
    longest = findings.leaf_stats["max_ns"].max()
    return float(longest) / 1e6 if isinstance(longest, int) else 0.0


def _problems(findings: Findings) -> float:
    severe = findings.verdicts.filter(pl.col("verdict").is_in(PROBLEMS))
    return severe.select("verdict", "rule").n_unique()


# Quantities by name.  Empty findings count as 0.
QUANTITIES: Final[Mapping[str, Callable[[Findings], float]]] = {
    "max-attempts": lambda f: float(f.leaf_stats["max_attempts"].cast(pl.Int64).max() or 0),  # type: ignore[arg-type]
    "max-chain-ms": _longest_ms,
    "retried-seamcalls": lambda f: float(f.leaf_stats["retried_seamcalls"].sum()),
    "busy": lambda f: float(f.leaf_stats["n_busy"].sum()),
    "abandoned": _outcomes("abandoned"),
    "failed": _outcomes("failed"),
    "cut": _outcomes("cut"),
    "zero-steps": lambda f: f.zero_steps.filter(pl.col("strength") != "weak").height,
    "losses": _losses,
    "problems": _problems,
}


def parse_rule(text: str) -> FailRule:
    """Parse a rule such as ``max-attempts>16``.

    Raises:
        QueryError: If the rule is malformed, or its quantity is unknown; the message contains the
            nearest one.
    """
    found = _RULE.match(text)
    if found is None:
        raise QueryError(f"not a rule: {text!r}; write e.g. 'max-attempts>16'")
    name = found["name"].replace("_", "-")
    if name not in QUANTITIES:
        near = difflib.get_close_matches(name, QUANTITIES, n=1, cutoff=0)[0]
        raise QueryError(
            f"unknown quantity {name!r}; nearest: {near}; all: {', '.join(QUANTITIES)}"
        )
    return FailRule(name, found["sign"], float(found["limit"]))


def check_findings(findings: Findings, rules: Sequence[FailRule]) -> list[str]:
    """Return one line for each rule that the findings match."""
    return check_rules(rules, lambda name: QUANTITIES[name](findings))


def check_rules(rules: Sequence[FailRule], quantity: Callable[[str], float]) -> list[str]:
    """Return one line for each rule that matches; ``quantity`` returns a value by name."""
    return [
        f"{rule.name} is {value:g}, the rule is to fail on {rule.name}{rule.sign}{rule.limit:g}"
        for rule in rules
        if _OPERATORS[rule.sign](value := quantity(rule.name), rule.limit)
    ]
