"""Sections on the causes of busy answers and on conflicts between TDs."""

from __future__ import annotations

from typing import Final

import polars as pl

from tdxtrace.report.charts import causes
from tdxtrace.report.names import definition, leaf_label
from tdxtrace.report.section import Figure, Grid, Section, grid, more
from tdxtrace.report.units import count, plural, share, total
from tdxtrace.tables.causes import BUSY_CAUSES
from tdxtrace.tables.trace import Findings
from tdxtrace.tables.verdicts import TD_CONFLICTS

_MAX_ROWS: Final = 15
_NO_BUSY: Final = "No SEAMCALL was answered busy."


def section(findings: Findings) -> Section:
    """Return the section on causes by leaf, and on which leaves conflicted."""
    shares = findings.cause_shares
    title, about = "Causes of busy answers", definition(BUSY_CAUSES)
    if shares.is_empty():
        return Section("busy_causes", title, about, [_NO_BUSY])
    figures = [
        Figure(
            "busy_causes",
            "Causes of busy answers, by leaf",
            "The most likely cause of each busy answer.",
            lambda: causes.causes_by_leaf(shares),
        )
    ]
    pairs = causes.contention_rows(findings.scan("busy_causes"), findings.leaf_stats)
    if not pairs.is_empty():
        figures.append(
            Figure(
                "contention",
                "Conflicts between leaves: observed, and possible by the locks",
                "Rows: the busy leaf; columns: the lock holder; numbers: busy answers. Dots: "
                "possible by the locks of a generation of the module, but not observed.",
                lambda: causes.contention(pairs),
            )
        )
    return Section("busy_causes", title, about, [_sentences(shares)], figures, [_table(shares)])


def _sentences(shares: pl.DataFrame) -> str:
    n = total(shares, "n_busy")
    by = shares.group_by("cause").agg(pl.col("n_busy").sum()).sort("n_busy", descending=True)
    parts = "; ".join(f"{causes.cause_label(cause)} {share(part, n)}" for cause, part in by.rows())
    return f"{plural(n, 'busy answer')}: {parts}."


def _table(shares: pl.DataFrame) -> Grid:
    rows = shares.sort("n_busy", "leaf", "resource", descending=[True, False, False])
    return grid(
        ("TDH.", "resource", "cause", "busy answers", "share of all", "confident"),
        [
            (
                leaf_label(row["leaf"]),
                row["resource"] or "not named",
                causes.cause_label(row["cause"]),
                count(row["n_busy"]),
                share(row["n_busy"], row["n_all"]),
                count(row["n_sure"]),
            )
            for row in rows.head(_MAX_ROWS).iter_rows(named=True)
        ],
        right=(3, 4, 5),
        droppable=(5,),
        more=more(rows.height - _MAX_ROWS, "busy-causes --about shares"),
    )


def td_conflicts(findings: Findings) -> Section:
    """Return the section on busy answers caused by other TDs; without a table if there are none."""
    title, about = "Conflicts between TDs", definition(TD_CONFLICTS)
    rows = findings.td_conflicts
    if rows.is_empty():
        return Section("td_conflicts", title, about, [_NO_BUSY])
    conflicts = rows.filter(pl.col("n_other_td") > 0)
    grids = [] if conflicts.is_empty() else [_conflict_table(conflicts)]
    return Section("td_conflicts", title, about, [_conflicts(rows)], grids=grids)


def _conflicts(rows: pl.DataFrame) -> str:
    n, other = total(rows, "n_busy"), total(rows, "n_other_td")
    same, unknown = total(rows, "n_same_td"), total(rows, "n_unknown")
    rest = f"{count(same)} caused by the same TD, {count(unknown)} unknown"
    if other:
        return f"{plural(n, 'busy answer')}: {count(other)} caused by another TD, {rest}."
    return f"No busy answer is known to be caused by another TD. Of {count(n)}: {rest}."


def _conflict_table(conflicts: pl.DataFrame) -> Grid:
    rows = conflicts.sort("n_other_td", "leaf", "resource", descending=[True, False, False])
    return grid(
        ("TDH.", "resource", "busy answers", "another TD", "same TD", "unknown", "TDs"),
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
            for row in rows.head(_MAX_ROWS).iter_rows(named=True)
        ],
        right=range(2, 7),
        droppable=(6,),
        more=more(rows.height - _MAX_ROWS, "td-conflicts"),
    )
