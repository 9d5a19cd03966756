"""True causes against found ones: per generation of the module and quality of the capture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from tdxtrace.tables.causes import CAUSES
from tdxtrace.validate.causes import TOLD, UNTOLD
from tdxtrace.validate.matrix import Result, total

_TRUE: Final = CAUSES[:-1]
_NAME: Final = "busy_causes"


def confusion_table(results: Sequence[Result]) -> list[list[str]]:
    """Rows for people: a heading, one row per generation, quality and true cause.

    A number is of busy attempts that the capture shows; the last columns are the share of
    them with the right answer, and of those the share whose one named holder is right.
    """
    rows = [["module", "capture", "generation", "true cause", *CAUSES, "recall"]]
    for generation, quality, part in _groups(results):
        for how in (TOLD, UNTOLD):
            counts = total(part, _NAME)
            for cause in _TRUE:
                found = [counts[f"{how} {cause} {name}"] for name in CAUSES]
                if sum(found):
                    right = found[CAUSES.index(cause)] / sum(found)
                    numbers = [str(n) if n else "-" for n in found]
                    rows.append([generation, quality, how, cause, *numbers, f"{right:.3f}"])
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


def precision(results: Iterable[Result]) -> float | None:
    """Share of right answers of the cause that comes out worst; None without an answer."""
    counts = total(results, _NAME)
    shares = [_share(counts, [(true, found) for true in _TRUE], found) for found in _TRUE]
    return min((share for share in shares if share is not None), default=None)


def recall(results: Iterable[Result]) -> float | None:
    """Share of attempts with the right answer, of the cause that comes out worst."""
    counts = total(results, _NAME)
    shares = [_share(counts, [(true, name) for name in CAUSES], true, (TOLD,)) for true in _TRUE]
    return min((share for share in shares if share is not None), default=None)


def _share(
    counts: Counter[str],
    pairs: list[tuple[str, str]],
    cause: str,
    hows: tuple[str, ...] = (TOLD, UNTOLD),
) -> float | None:
    whole = sum(counts[f"{how} {true} {found}"] for how in hows for true, found in pairs)
    right = sum(counts[f"{how} {cause} {cause}"] for how in hows)
    return right / whole if whole else None


def false_bugs(results: Iterable[Result]) -> int:
    """How many answers are kernel_bug and should not be."""
    counts = total(results, _NAME)
    return sum(
        counts[f"{how} {true} kernel_bug"]
        for how in (TOLD, UNTOLD)
        for true in _TRUE
        if true != "kernel_bug"
    )
