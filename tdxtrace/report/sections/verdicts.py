"""Section on the verdicts."""

from __future__ import annotations

from typing import Final

import polars as pl

from tdxtrace.report.names import definition
from tdxtrace.report.section import Grid, Section, grid, more
from tdxtrace.report.units import count, plural
from tdxtrace.tables.trace import Findings
from tdxtrace.tables.verdicts import VERDICTS

ORDER: Final = ("BUG", "HOSTILE", "UNDECIDED", "EXPECTED")
"""Verdicts in order of importance."""
_MOST: Final = 15


def ranked(findings: Findings) -> pl.DataFrame:
    """Return the verdicts by importance, then by size of the group."""
    place = pl.col("verdict").cast(pl.Enum(ORDER))
    return findings.verdicts.sort(
        place, "n_rows", "what", descending=[False, True, False], maintain_order=True
    )


def sentences(findings: Findings) -> list[str]:
    """Return the number of groups by verdict, and a sentence for each of the first BUG, HOSTILE."""
    rows = ranked(findings)
    if rows.is_empty():
        return ["No verdict: no busy answer, zero-step episode or other finding to judge."]
    counts = dict(rows.group_by("verdict").len().rows())
    parts = ", ".join(f"{counts[v]} {v}" for v in ORDER if v in counts)
    severe = rows.filter(pl.col("verdict").is_in(["BUG", "HOSTILE"])).head(3)
    none = [] if severe.height else [_none_severe("UNDECIDED" in counts)]
    return [
        f"Verdicts on {plural(rows.height, 'group')} of findings: {parts}.",
        *none,
        *(f"{row['verdict']}: {row['sentence']}" for row in severe.iter_rows(named=True)),
    ]


def _none_severe(has_undecided: bool) -> str:
    """No BUG or HOSTILE, with the caveat that UNDECIDED groups could be either."""
    caveat = "; the UNDECIDED groups could be either" if has_undecided else ""
    return f"No BUG and no HOSTILE{caveat}."


def section(findings: Findings) -> Section:
    """Return the section with each verdict, its evidence rows and its rule."""
    rows = ranked(findings)
    return Section(
        "verdicts",
        "Verdicts",
        definition(VERDICTS),
        sentences(findings),
        grids=[] if rows.is_empty() else [_table(rows)],
    )


def _table(rows: pl.DataFrame) -> Grid:
    return grid(
        ("verdict", "findings", "rows", "rule", "reason"),
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
        caption="Rows are the first lines or records (seq) of the evidence.",
        more=more(rows.height - _MOST, "verdicts"),
    )


def _undecided(row: dict[str, str]) -> str:
    return f"{row['sentence']} To decide: {row['decided_by']}."
