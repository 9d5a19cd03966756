"""Comparison of scores with thresholds: failures, tables for display, and JSON."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from tdxtrace.tables.causes import CAUSES
from tdxtrace.validate.causes import GENERATION_GIVEN, GENERATION_OPEN
from tdxtrace.validate.matrix import Result, total
from tdxtrace.validate.step_causes import confusion_rows as step_confusion
from tdxtrace.validate.verdicts import accusation_rows, false_accusations, verdict_score_rows

_CHAINS: Final = ("exact", "marked", "wrong", "missing", "extra", "needless", "unseen")


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Minimum scores; the defaults are the scores that the project promises."""

    min_exact: float = 1.0
    """Share of exact chains among the chains not marked as uncertain."""
    min_precision: float = 1.0
    """Precision of zero-step episodes of proof and strong evidence."""
    min_recall: float = 0.99
    """Recall of the zero-step episodes in the capture, by proof or strong evidence."""
    min_cause_precision: float = 0.99
    """Precision of each cause, on all captures."""
    min_cause_recall: float = 0.99
    """Recall of each cause, on captures with all calls and their times; answers caused by an armed
    entry or a guest count only if they are decidable (``validate.decidable``)."""
    min_explained_by_capture: float = 0.95
    """Share of busy answers explained from the probes of ``tdxtrace capture``, divided by the share
    explained from all probes of the same runs."""


@dataclass(frozen=True, slots=True)
class Figures:
    """Shares that thresholds apply to, over some cells; None if nothing was counted."""

    exact: float | None
    precision: float | None
    recall: float | None
    unparsed: int
    needless: int
    cause_precision: float | None = None
    """Smallest precision of any cause."""
    cause_recall: float | None = None
    """Smallest recall of any cause, with the module's generation given."""
    false_bugs: int = 0
    """Busy answers wrongly attributed to a kernel bug."""
    explained_by_capture: float | None = None
    """See Thresholds; None if no run was recorded with both sets of probes."""
    wrong_step_causes: int = 0
    """Zero-step episodes with a wrong cause."""


def figures(results: Sequence[Result]) -> Figures:
    """Compute the shares over all cells."""
    chains, steps = total(results, "retry_chains"), total(results, "zero_steps")
    sure = sum(chains[name] for name in ("exact", "wrong", "missing", "extra"))
    found = steps["proof_found"] + steps["strong_found"]
    return Figures(
        _share(chains["exact"], sure),
        _share(steps["proof_true"] + steps["strong_true"], found),
        _share(steps["found_surely"], steps["shown"]),
        sum(result.unparsed for result in results),
        chains["needless"],
        cause_precision(results),
        cause_recall([result for result in results if result.cell.shows_causes]),
        false_bugs(results),
        explained_by_capture(results),
        total(results, "zero_step_causes")["wrong"],
    )


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def failures(results: Sequence[Result], thresholds: Thresholds) -> list[str]:
    """Return a line for each threshold that is not reached."""
    actual = figures(results)
    limits = (
        ("exact chains", actual.exact, thresholds.min_exact),
        ("zero-step precision", actual.precision, thresholds.min_precision),
        ("zero-step recall", actual.recall, thresholds.min_recall),
        ("precision of causes", actual.cause_precision, thresholds.min_cause_precision),
        ("recall of causes", actual.cause_recall, thresholds.min_cause_recall),
        (
            "answers explained from capture's probes, relative to all probes",
            actual.explained_by_capture,
            thresholds.min_explained_by_capture,
        ),
    )
    failed = [
        f"{name}: {value:.6f}, below the threshold of {minimum:g}"
        for name, value, minimum in limits
        if value is not None and value < minimum
    ]
    if actual.unparsed:
        failed.append(f"{actual.unparsed} lines were not parsed")
    if actual.needless:
        failed.append(f"{actual.needless} complete chains are marked as uncertain")
    if actual.false_bugs:
        failed.append(f"{actual.false_bugs} busy answers are wrongly attributed to kernel bugs")
    if actual.wrong_step_causes:
        failed.append(f"{actual.wrong_step_causes} zero-step causes are wrong")
    wrong = {name: total(results, name)["wrong"] for name in _EXACT}
    failed += [f"{n} answers of {name} are wrong" for name, n in wrong.items() if n]
    return [*failed, *false_accusations(total(results, "verdicts"))]


def table(results: Sequence[Result]) -> list[list[str]]:
    """Return table rows for display: a heading, one row per scenario, one for the total."""
    head = ["scenario", "cells", *_CHAINS, "proof", "strong", "weak", "recall", "at edge"]
    by_name: dict[str, list[Result]] = {}
    for result in results:
        by_name.setdefault(result.cell.plan.scenario, []).append(result)
    rows = [_row(name, part) for name, part in sorted(by_name.items())]
    return [head, *rows, _row("all", results)]


def verdict_table(results: Sequence[Result]) -> Sequence[list[str]]:
    """Return the scores of verdicts and their inputs, by scenario."""
    names = sorted({result.cell.plan.scenario for result in results})
    parts = {
        name: total((r for r in results if r.cell.plan.scenario == name), "verdicts")
        for name in names
    }
    return verdict_score_rows({**parts, "all": total(results, "verdicts")})


def answer_tables(results: Sequence[Result]) -> list[list[list[str]]]:
    """Return the tables of accusations, of zero-step causes and of explained busy answers."""
    return [
        accusation_rows(total(results, "verdicts")),
        step_confusion(total(results, "zero_step_causes")),
        capture_rows(results),
    ]


def by_capture(results: Sequence[Result]) -> list[list[str]]:
    """Return the scores of :func:`table` by capture: format, probes, fault."""
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


def as_json(results: Sequence[Result], thresholds: Thresholds) -> str:
    """Return thresholds, shares, counts by analysis, and each cell with its counts as JSON."""
    document: dict[str, Any] = {
        "thresholds": dataclasses.asdict(thresholds),
        "figures": dataclasses.asdict(figures(results)),
        "failures": failures(results, thresholds),
        "answers": {
            name: dict(sorted(total(results, name).items()))
            for name in sorted({name for result in results for name in result.counts})
        },
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
    return json.dumps(document, indent=1) + "\n"


# Tables of counts and times, in which no answer may be wrong.
_EXACT: Final = ("accept_rates", "boot_phases", "tdvmcalls", "module_updates")
_TRUE: Final = CAUSES[:-1]
_NAME: Final = "busy_causes"


def confusion_table(results: Sequence[Result]) -> list[list[str]]:
    """Return table rows for display: a heading, one row per generation, quality and true cause.

    Numbers are counts of captured busy attempts; ``recall`` is the share with the right cause.
    The last two columns are the number of undecidable answers, and the recall of the others.
    """
    head = ["module", "capture", "generation", "true cause", *CAUSES, "recall"]
    rows = [[*head, "undecidable", "recall of others"]]
    for generation, quality, part in _groups(results):
        for condition in (GENERATION_GIVEN, GENERATION_OPEN):
            counts = total(part, _NAME)
            for cause in _TRUE:
                found = [counts[f"{condition} {cause} {name}"] for name in CAUSES]
                if sum(found):
                    right = found[CAUSES.index(cause)] / sum(found)
                    numbers = [str(n) if n else "-" for n in found]
                    row = [generation, quality, condition, cause, *numbers, f"{right:.3f}"]
                    hidden = [counts[f"{condition} {cause} {name} undecidable"] for name in CAUSES]
                    rest = _recall(counts, cause, (condition,))
                    shown = "-" if rest is None else f"{rest:.3f}"
                    rows.append([*row, str(sum(hidden)) if any(hidden) else "-", shown])
    return rows


def _groups(results: Sequence[Result]) -> Iterator[tuple[str, str, list[Result]]]:
    for generation in sorted({result.cell.plan.generation for result in results}):
        for quality in ("full", "degraded"):
            part = [
                result
                for result in results
                if result.cell.plan.generation == generation
                and result.cell.shows_causes == (quality == "full")
            ]
            if part:
                yield generation, quality, part


def cause_precision(results: Iterable[Result]) -> float | None:
    """Return the smallest precision of any cause; None without answers."""
    counts = total(results, _NAME)
    shares = [_precision(counts, cause) for cause in _TRUE]
    return min((share for share in shares if share is not None), default=None)


def cause_recall(results: Iterable[Result]) -> float | None:
    """Return the smallest recall of any cause over decidable answers; None without answers."""
    counts = total(results, _NAME)
    shares = [_recall(counts, true, (GENERATION_GIVEN,)) for true in _TRUE]
    return min((share for share in shares if share is not None), default=None)


def _recall(counts: Counter[str], true: str, conditions: tuple[str, ...]) -> float | None:
    found = {
        name: sum(
            counts[f"{condition} {true} {name}"] - counts[f"{condition} {true} {name} undecidable"]
            for condition in conditions
        )
        for name in CAUSES
    }
    return _share(found[true], sum(found.values()))


def _precision(counts: Counter[str], cause: str) -> float | None:
    """Return the share of right answers among those with a cause; None without answers."""
    conditions = GENERATION_GIVEN, GENERATION_OPEN
    answers = sum(
        counts[f"{condition} {true} {cause}"] for condition in conditions for true in _TRUE
    )
    return _share(sum(counts[f"{condition} {cause} {cause}"] for condition in conditions), answers)


def false_bugs(results: Iterable[Result]) -> int:
    """Count the answers that are wrongly kernel_bug."""
    counts = total(results, _NAME)
    return sum(
        counts[f"{condition} {true} kernel_bug"]
        for condition in (GENERATION_GIVEN, GENERATION_OPEN)
        for true in _TRUE
        if true != "kernel_bug"
    )


def explained_by_capture(results: Sequence[Result]) -> float | None:
    """Return the share explained from ``capture``'s probes, relative to that from all probes."""
    whole, recorded = (_share(*_explained(part)) for part in _recorded_both_ways(results))
    return None if recorded is None or not whole else recorded / whole


def capture_rows(results: Sequence[Result]) -> list[list[str]]:
    """Return table rows for display: busy answers explained from each set of probes."""
    rows = [["the same runs", "cells", "busy answers", "explained", "share"]]
    names = "all probes", "as tdxtrace capture records"
    for name, part in zip(names, _recorded_both_ways(results), strict=True):
        named, answers = _explained(part)
        share = _share(named, answers)
        shown = "-" if share is None else f"{share:.4f}"
        rows.append([name, str(len(part)), str(answers), str(named), shown])
    return rows


def _recorded_both_ways(results: Sequence[Result]) -> tuple[list[Result], list[Result]]:
    """Return the results with all probes and with ``capture``'s, for runs that have both."""
    full = [result for result in results if result.cell.shows_causes]
    whole = {result.cell.plan: result for result in full if result.cell.probes == "wrappers"}
    recorded = [r for r in full if r.cell.probes == "capture" and r.cell.plan in whole]
    return [whole[r.cell.plan] for r in recorded], recorded


def _explained(results: Sequence[Result]) -> tuple[int, int]:
    """Return the number of busy answers with a cause, and of all busy answers."""
    counts = total(results, _NAME)
    pairs = [(true, found) for true in _TRUE for found in CAUSES]
    of = {pair: counts[f"{GENERATION_GIVEN} {pair[0]} {pair[1]}"] for pair in pairs}
    return sum(n for (_, found), n in of.items() if found != CAUSES[-1]), sum(of.values())
