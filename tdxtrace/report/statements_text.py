"""Limits that a trace supports without a given target, as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import polars as pl
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.text import Text

from tdxtrace.report.columns import Sentence, TextTable
from tdxtrace.report.limits_text import (
    NOT_COUNTED,
    UNINFORMATIVE_SHARE,
    basis_text,
    pace_text,
    percent,
    percent_digits,
    recording_text,
    short_leaves,
    worst_text,
)
from tdxtrace.report.names import VALID_FOR
from tdxtrace.report.questions import questions
from tdxtrace.report.units import count, plural, short_duration
from tdxtrace.tables.trace import Findings

_WIDE: Final = 72
"""Columns of the terminal that the table with both units takes."""


def statements_text(
    statements: pl.DataFrame, models: pl.DataFrame, limits: pl.DataFrame
) -> RenderableType:
    """Return the supported shares and smallest targets, models, and the recording still needed.

    Args:
        statements: The ``limit_statements`` table.
        models: Rows of the ``limits`` table from a model, each with its own target.
        limits: The ``limits`` table for the default target.
    """
    if statements.is_empty():
        why = "has no requests" if limits.is_empty() else "has answers of too few requests"
        return Text(f"no limits: the trace {why}")
    named = short_leaves(statements)
    retried = named.filter(pl.col("n_retried") > 0)
    anyone = short_leaves(limits.filter(pl.col("made_by") == "anyone"))
    return Group(
        *(_shares(retried) if not retried.is_empty() else [Text("no request was retried")]),
        *_smallest(named),
        *_conditions(anyone),
        *_models(short_leaves(models)),
        *_missing(anyone),
        *worst_text(anyone),
        *pace_text(anyone),
        Text(basis_text(anyone)),
        Text(VALID_FOR, style="dim"),
    )


@dataclass(frozen=True, slots=True)
class _Shares:
    """The table of shares: one for both units if the terminal is wide, else one per unit."""

    rows: pl.DataFrame

    def __rich_console__(self, _: Console, options: ConsoleOptions) -> RenderResult:
        if options.max_width >= _WIDE:
            yield self._table(("ns", "attempts"))
        else:
            yield self._table(("ns",))
            yield self._table(("attempts",))

    def _table(self, units: Sequence[str]) -> TextTable:
        asked = self.rows.filter(pl.col("kind") == "asked")
        titles: list[str] = []
        for unit in units:
            within = asked.filter(pl.col("unit") == unit)["within"].unique().sort()
            titles += [short_duration(n) if unit == "ns" else str(n) for n in within]
        titles = [*titles[:-1], f"{titles[-1]} attempts"] if "attempts" in units else titles
        table = TextTable(("TDH.", *titles), right=range(1, len(titles) + 1))
        for (name,), rows in asked.group_by("name", maintain_order=True):
            cells = [
                percent_digits(share) if share < UNINFORMATIVE_SHARE else "-"
                for unit in units
                for share in rows.filter(pl.col("unit") == unit).sort("within")["more_high"]
            ]
            table.add_row(str(name), *cells)
        return table


def _shares(retried: pl.DataFrame) -> Iterator[RenderableType]:
    confidence = 100 * float(retried["confidence"][0])
    yield Text(
        f"upper bounds of the share that needs more, in %, each with {confidence:g} % confidence:"
    )
    yield _Shares(retried)


def _smallest(named: pl.DataFrame) -> Iterator[RenderableType]:
    rows = named.filter(pl.col("kind") == "smallest")
    yield Text("the smallest share that this trace supports by counting, and its limit:")
    titles = ("TDH.", "requests", "retried", "share", "time", "share", "attempts")
    table = TextTable(titles, right=range(1, 7), ranks=(0, 5, 6, 1, 2, 3, 4))
    for (name,), of_leaf in rows.group_by("name", maintain_order=True):
        by_unit = {row["unit"]: row for row in of_leaf.iter_rows(named=True)}
        time, attempts = by_unit["ns"], by_unit["attempts"]
        table.add_row(
            str(name),
            count(time["n_requests"]),
            count(time["n_retried"]),
            *_limit(time, short_duration(time["within"])),
            *_limit(attempts, count(attempts["within"])),
        )
    yield table


def _limit(row: dict[str, Any], limit: str) -> tuple[str, str]:
    return (
        ("-", "-")
        if row["more_high"] >= UNINFORMATIVE_SHARE
        else (percent(row["more_high"]), limit)
    )


def _conditions(anyone: pl.DataFrame) -> Iterator[Text]:
    """Yield the conditions of the shares: the recorded policy, omitted requests, drift."""
    rows = anyone.filter(pl.col("unit") == "attempts", pl.col("n_retried") > 0)
    names_by_text: dict[str, list[str]] = {}
    for row in rows.iter_rows(named=True):
        parts = [row["recorded_policy"]]
        if row["n_unanswered"]:
            parts.append(f"{plural(row['n_unanswered'], 'request')} without an answer left out")
        if row["drifts"]:
            parts.append("averages, as the share rises or falls over the recording")
        if text := "; ".join(filter(None, parts)):
            names_by_text.setdefault(text, []).append(row["name"])
    for text, names in names_by_text.items():
        yield Text(f"{', '.join(names)}: {text}")


def _models(models: pl.DataFrame) -> Iterator[Text]:
    if models.is_empty():
        return
    yield Text(
        "from a model, without any confidence, if the tail continues as seen (rarer causes of "
        "waiting would not show in it):"
    )
    for (name,), rows in models.group_by("name", maintain_order=True):
        by_unit = {row["unit"]: row for row in rows.iter_rows(named=True)}
        given = [
            (row, text(row["limit"]), text(row["max_seen"]))
            for unit, text in (("ns", short_duration), ("attempts", _attempts))
            if (row := by_unit[unit])["basis"] == "extrapolated"
        ]
        target = percent(given[0][0]["target"])
        limits = " or ".join(limit for _, limit, _ in given)
        max_attempts = " and ".join(seen for _, _, seen in given)
        yield Text(f"  {name}: {target} need more than {limits}; largest seen: {max_attempts}")


def _attempts(n: int) -> str:
    return plural(n, "attempt")


def _missing(anyone: pl.DataFrame) -> Iterator[Text]:
    """Yield the default target if the trace does not support it, and the recording needed."""
    rows = anyone.filter(pl.col("unit") == "attempts", pl.col("basis").is_in(NOT_COUNTED))
    if rows.is_empty():
        return
    target = rows["target"][0]
    yield Text(
        f"not supported by counting: {percent(target)} (1 in {round(1 / target):,}), for which"
    )
    yield from recording_text(rows)


def questions_text(findings: Findings) -> RenderableType:
    """Return the questions of the kernel's list and the answers of this trace."""
    parts: list[RenderableType] = []
    for question, answer in questions(findings):
        parts += [Sentence(question, style="bold"), Sentence(answer, indent=2)]
    return Group(*parts, Text(VALID_FOR, style="dim"))
