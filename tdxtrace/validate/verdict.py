"""Whether the scores are good enough, as a table, as JSON and as a yes or no."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from tdxtrace.validate import confusion
from tdxtrace.validate.judgements import false_accusations, judged
from tdxtrace.validate.matrix import Result, total

_CHAINS: Final = ("exact", "marked", "wrong", "missing", "extra", "needless", "unseen")


@dataclass(frozen=True, slots=True)
class Thresholds:
    """What must be reached; the defaults are what the project promises."""

    min_exact: float = 1.0
    """Share of the chains not marked as uncertain that are exact."""
    min_precision: float = 1.0
    """Of zero-step episodes of proof and strong form."""
    min_recall: float = 0.99
    """Of zero-step episodes that the capture shows, by proof or strong form."""
    min_cause_precision: float = 0.99
    """Of the answers with each cause, on any capture."""
    min_cause_recall: float = 0.99
    """Of the busy attempts with each cause, on captures that show who was at work when."""


@dataclass(frozen=True, slots=True)
class Figures:
    """The shares that thresholds are about, over some cells; None where nothing counts."""

    exact: float | None
    precision: float | None
    recall: float | None
    unparsed: int
    needless: int
    cause_precision: float | None = None
    """Of the cause that comes out worst."""
    cause_recall: float | None = None
    """Of the cause that comes out worst, the module's generation said."""
    false_bugs: int = 0
    """Busy answers that were called a kernel bug and were none."""


def figures(results: Sequence[Result]) -> Figures:
    """Work the shares out."""
    chains, steps = total(results, "retry_chains"), total(results, "zero_steps")
    sure = sum(chains[name] for name in ("exact", "wrong", "missing", "extra"))
    found = steps["proof_found"] + steps["strong_found"]
    return Figures(
        _share(chains["exact"], sure),
        _share(steps["proof_true"] + steps["strong_true"], found),
        _share(steps["found_surely"], steps["shown"]),
        sum(result.unparsed for result in results),
        chains["needless"],
        confusion.precision(results),
        confusion.recall([result for result in results if result.cell.shows_causes]),
        confusion.false_bugs(results),
    )


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def failures(results: Sequence[Result], wanted: Thresholds) -> list[str]:
    """Say what falls short, one line each; nothing if all is well."""
    have = figures(results)
    limits = (
        ("exact chains", have.exact, wanted.min_exact),
        ("zero-step precision", have.precision, wanted.min_precision),
        ("zero-step recall", have.recall, wanted.min_recall),
        ("precision of causes", have.cause_precision, wanted.min_cause_precision),
        ("recall of causes", have.cause_recall, wanted.min_cause_recall),
    )
    short = [
        f"{name}: {value:.6f}, at least {least:g} is wanted"
        for name, value, least in limits
        if value is not None and value < least
    ]
    if have.unparsed:
        short.append(f"{have.unparsed} lines were not understood")
    if have.needless:
        short.append(f"{have.needless} chains are marked though the capture shows all of them")
    if have.false_bugs:
        short.append(f"{have.false_bugs} busy answers are called kernel bugs and are none")
    return [*short, *false_accusations(total(results, "verdicts"))]


def table(results: Sequence[Result]) -> list[list[str]]:
    """Rows for people: a heading, one row per scenario, one for all."""
    head = ["scenario", "cells", *_CHAINS, "proof", "strong", "weak", "recall", "at edge"]
    by_name: dict[str, list[Result]] = {}
    for result in results:
        by_name.setdefault(result.cell.plan.scenario, []).append(result)
    rows = [_row(name, part) for name, part in sorted(by_name.items())]
    return [head, *rows, _row("all", results)]


def judgements(results: Sequence[Result]) -> Sequence[list[str]]:
    """The scores of verdicts and of what they rest on, by scenario."""
    names = sorted({result.cell.plan.scenario for result in results})
    parts = {
        name: total((r for r in results if r.cell.plan.scenario == name), "verdicts")
        for name in names
    }
    return judged({**parts, "all": total(results, "verdicts")})


def by_capture(results: Sequence[Result]) -> list[list[str]]:
    """The same by capture: which format, which probes, which fault."""
    head = ["capture", "cells", *_CHAINS, "proof", "strong", "weak", "recall", "at edge"]
    parts: dict[str, list[Result]] = {}
    for result in results:
        parts.setdefault(result.cell.capture, []).append(result)
    return [head, *(_row(name, part) for name, part in parts.items())]


def _row(name: str, results: Sequence[Result]) -> list[str]:
    chains, steps = total(results, "retry_chains"), total(results, "zero_steps")
    shown = f"{steps['found_surely']}/{steps['shown']}" if steps["shown"] else "-"
    return [
        name,
        str(len(results)),
        *(str(chains[measure]) for measure in _CHAINS),
        *(_of(steps, strength) for strength in ("proof", "strong", "weak")),
        shown,
        str(steps["at_the_edge"]),
    ]


def _of(steps: Counter[str], strength: str) -> str:
    found = steps[f"{strength}_found"]
    return f"{steps[f'{strength}_true']}/{found}" if found else "-"


def as_json(results: Sequence[Result], wanted: Thresholds) -> str:
    """Everything, for machines: thresholds, shares, and each cell with its counts."""
    made: dict[str, Any] = {
        "thresholds": dataclasses.asdict(wanted),
        "figures": dataclasses.asdict(figures(results)),
        "failures": failures(results, wanted),
        "cells": [
            {
                **dataclasses.asdict(result.cell),
                "counts": result.counts,
                "unparsed": result.unparsed,
                "examples": result.examples,
            }
            for result in results
        ],
    }
    return json.dumps(made, indent=1) + "\n"
