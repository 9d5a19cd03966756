"""Whose fault is it?"""

from __future__ import annotations

from typing import Final

import polars as pl

from tdxtrace.report.names import definition
from tdxtrace.report.sections import Grid, Section, grid, more
from tdxtrace.report.units import count, plural
from tdxtrace.tables.trace import Findings
from tdxtrace.tables.verdicts import VERDICTS

ORDER: Final = ("BUG", "HOSTILE", "UNDECIDED", "EXPECTED")
"""What asks for action first."""
_MOST: Final = 15


def ranked(findings: Findings) -> pl.DataFrame:
    """Return the verdicts, those that ask for action first, then the larger groups."""
    place = pl.col("verdict").cast(pl.Enum(ORDER))
    return findings.verdicts.sort(
        place, "n_rows", "what", descending=[False, True, False], maintain_order=True
    )


def says(findings: Findings) -> list[str]:
    """Return how many groups have which verdict, and the gravest in a sentence each."""
    rows = ranked(findings)
    if rows.is_empty():
        return ["No verdict: nothing was found that somebody would have to answer for."]
    counts = dict(rows.group_by("verdict").len().rows())
    told = ", ".join(f"{counts[v]} {v}" for v in ORDER if v in counts)
    grave = rows.filter(pl.col("verdict").is_in(["BUG", "HOSTILE"])).head(3)
    none = [] if grave.height else [_none_grave("UNDECIDED" in counts)]
    return [
        f"Verdicts on {plural(rows.height, 'group')} of findings: {told}.",
        *none,
        *(f"{row['verdict']}: {row['sentence']}" for row in grave.iter_rows(named=True)),
    ]


def _none_grave(has_undecided: bool) -> str:
    """No reassurance where the trace cannot tell."""
    open_ = "; what is UNDECIDED may still be either" if has_undecided else ""
    return f"Nothing is judged BUG, nothing HOSTILE{open_}."


def section(findings: Findings) -> Section:
    """Show each verdict with the rows and the rule that it rests on."""
    rows = ranked(findings)
    return Section(
        "verdicts",
        "Whose fault is it?",
        definition(VERDICTS),
        says(findings),
        grids=[] if rows.is_empty() else [_table(rows)],
    )


def _table(rows: pl.DataFrame) -> Grid:
    return grid(
        ("verdict", "findings", "rows", "rule", "why, or what would decide it"),
        [
            (
                row["verdict"],
                count(row["n_rows"]),
                row["evidence"],
                row["rule"],
                row["sentence"] if row["decided_by"] is None else _undecided(row),
            )
            for row in rows.head(_MOST).iter_rows(named=True)
        ],
        right=(1,),
        spare=(3, 2),
        caption="Rows are the first lines or records (seq) that show it.",
        more=more(rows.height - _MOST, "verdicts"),
    )


def _undecided(row: dict[str, str]) -> str:
    return f"{row['sentence']} To decide: {row['decided_by']}."
