"""Did TDs get in each other's way?"""

from __future__ import annotations

from typing import Final

import polars as pl

from tdxtrace.report.names import definition, leaf_label
from tdxtrace.report.sections import Grid, Section, grid, more
from tdxtrace.report.units import count, plural, total
from tdxtrace.tables.trace import Findings
from tdxtrace.tables.verdicts import TD_CONFLICTS

_MOST: Final = 12


def section(findings: Findings) -> Section:
    """Show which leaves were kept busy by another TD; one line where none was."""
    title, about = "Did TDs get in each other's way?", definition(TD_CONFLICTS)
    rows = findings.td_conflicts
    if rows.is_empty():
        return Section("td_conflicts", title, about, ["No: nothing was answered busy."])
    met = rows.filter(pl.col("n_other_td") > 0)
    says = [_says(rows)]
    return Section(
        "td_conflicts", title, about, says, grids=[] if met.is_empty() else [_table(met)]
    )


def _says(rows: pl.DataFrame) -> str:
    n, other = total(rows, "n_busy"), total(rows, "n_other_td")
    same, unknown = total(rows, "n_same_td"), total(rows, "n_unknown")
    rest = f"the same TD held it {plural(same, 'time')}, who did is not known of {count(unknown)}"
    if other:
        return f"{plural(n, 'busy answer')}: another TD held it {plural(other, 'time')}, {rest}."
    return f"No other TD is known to have held what was busy. {plural(n, 'busy answer')}: {rest}."


def _table(met: pl.DataFrame) -> Grid:
    rows = met.sort("n_other_td", "leaf", "resource", descending=[True, False, False])
    return grid(
        ("TDH.", "resource", "busy answers", "by another TD", "by the same", "not known", "TDs"),
        [
            (
                leaf_label(row["leaf"]),
                row["resource"] or "not named",
                count(row["n_busy"]),
                count(row["n_other_td"]),
                count(row["n_same_td"]),
                count(row["n_unknown"]),
                count(row["n_tds"]),
            )
            for row in rows.head(_MOST).iter_rows(named=True)
        ],
        right=range(2, 7),
        spare=(6,),
        more=more(rows.height - _MOST, "td-conflicts"),
    )
