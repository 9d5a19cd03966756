"""Who made SEAMCALLs busy?"""

from __future__ import annotations

from typing import Final

import polars as pl

from tdxtrace.report.charts import causes
from tdxtrace.report.names import definition, leaf_label
from tdxtrace.report.sections import Figure, Grid, Section, grid, more
from tdxtrace.report.units import count, plural, share, total
from tdxtrace.tables.causes import BUSY_CAUSES
from tdxtrace.tables.trace import Findings

_MOST: Final = 15
_WORDS: Final = {
    "host_conflict": "another SEAMCALL of the host",
    "armed_entry": "an entry that zero-step mitigation armed",
    "guest": "the guest",
    "kernel_bug": "a broken rule of the kernel",
    "unexplained": "not explained",
}


def section(findings: Findings) -> Section:
    """Show the share of each cause by leaf, and which leaves collided."""
    shares = findings.cause_shares
    title, about = "Who made SEAMCALLs busy?", definition(BUSY_CAUSES)
    if shares.is_empty():
        return Section("busy_causes", title, about, ["Nobody: nothing was answered busy."])
    figures = [
        Figure(
            "busy_causes",
            "Causes of busy answers, by leaf",
            "The most likely cause of each busy answer.",
            lambda: causes.causes_by_leaf(shares),
        )
    ]
    if not causes.contention_rows(findings.busy_causes, findings.leaf_stats).is_empty():
        figures.append(
            Figure(
                "contention",
                "Which leaf made which busy: observed, and expected from the locks",
                "Rows: what was busy; columns: what held the lock; numbers: busy answers. Dots: "
                "the locks of some generation of the module allow it, and it did not happen.",
                lambda: causes.contention(findings.busy_causes, findings.leaf_stats),
            )
        )
    return Section("busy_causes", title, about, [_says(shares)], figures, [_table(shares)])


def _says(shares: pl.DataFrame) -> str:
    n = total(shares, "n_busy")
    by = shares.group_by("cause").agg(pl.col("n_busy").sum()).sort("n_busy", descending=True)
    told = "; ".join(f"{_WORDS[cause]} {share(part, n)}" for cause, part in by.rows())
    return f"{plural(n, 'busy answer')}: {told}."


def _table(shares: pl.DataFrame) -> Grid:
    rows = shares.sort("n_busy", "leaf", "resource", descending=[True, False, False])
    return grid(
        ("TDH.", "resource", "cause", "busy answers", "share of all", "of them sure"),
        [
            (
                leaf_label(row["leaf"]),
                row["resource"] or "not named",
                row["cause"].replace("_", " "),
                count(row["n_busy"]),
                share(row["n_busy"], row["n_all"]),
                count(row["n_sure"]),
            )
            for row in rows.head(_MOST).iter_rows(named=True)
        ],
        right=(3, 4, 5),
        spare=(5,),
        more=more(rows.height - _MOST, "busy-causes --about shares"),
    )
