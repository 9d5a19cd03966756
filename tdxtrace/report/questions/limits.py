"""After how many attempts may a caller stop, and what would each policy have done?"""

from __future__ import annotations

from typing import Final

import polars as pl

from tdxtrace.report.charts import curve, policies
from tdxtrace.report.names import definition, leaf_label
from tdxtrace.report.sections import Figure, Grid, Section, grid
from tdxtrace.report.units import count, duration, plural, share
from tdxtrace.tables.limits import ATTEMPTS, LIMITS, POLICIES
from tdxtrace.tables.trace import Findings

_MOST: Final = 14


def _for_anyone(findings: Findings) -> pl.DataFrame:
    return findings.limits.filter(pl.col("unit") == "attempts", pl.col("made_by") == "anyone")


def says(findings: Findings) -> list[str]:
    """Return the recommendation in a sentence, and why there is none where it is withheld."""
    rows = _for_anyone(findings)
    if rows.is_empty():
        return ["No limit is recommended: no request was captured."]
    given = rows.filter(pl.col("limit").is_not_null()).sort("n_retried", descending=True)
    target, confidence = rows["target"][0], rows["confidence"][0]
    aim = f"at most 1 request in {1 / target:,.0f} to need more, with {confidence:.0%} confidence"
    if given.is_empty():
        wanted = rows.sort("n_retried", "n_requests", descending=True).row(0, named=True)
        about = ""
        if wanted["needed_requests"] is not None:
            about = (
                f" For TDH.{leaf_label(wanted['leaf'])} about "
                f"{count(wanted['needed_requests'])} requests would be needed."
            )
        return [f"No limit is recommended ({aim}): this trace supports none.{about}"]
    told = ", ".join(
        f"{leaf_label(row['leaf'])} {count(row['limit'])}"
        for row in given.head(6).iter_rows(named=True)
    )
    withheld = rows.height - given.height
    more = f" Withheld for {plural(withheld, 'leaf', 'leaves')}." if withheld else ""
    return [f"Recommended limits in attempts ({aim}): {told}.{more}"]


def section(findings: Findings) -> Section:
    """Show the recommended limit of each leaf, and what it rests on."""
    rows = _for_anyone(findings)
    return Section(
        "limits",
        "After how many attempts may a caller stop?",
        definition(LIMITS),
        says(findings),
        grids=[] if rows.is_empty() else [_table(rows)],
    )


def _table(rows: pl.DataFrame) -> Grid:
    ordered = rows.sort("n_retried", "n_requests", "leaf", descending=[True, True, False])
    return grid(
        ("TDH.", "limit", "basis", "requests", "retried", "most seen", "why, or what to beware of"),
        [
            (
                leaf_label(row["leaf"]),
                count(row["limit"]),
                row["basis"].replace("_", " "),
                count(row["n_requests"]),
                count(row["n_retried"]),
                count(row["max_seen"]),
                row["reason"] or f"may change with {row['would_change']}",
            )
            for row in ordered.head(_MOST).iter_rows(named=True)
        ],
        right=(1, 3, 4, 5),
        spare=(6,),
        caption="Limits in attempts, whoever made the calls busy.",
        more=f"{count(rows.height - _MOST)} more leaves" if rows.height > _MOST else "",
    )


def attempts(findings: Findings) -> Section:
    """Show which share of requests needed more than so many attempts."""
    title, about = "How many attempts does a request need?", definition(ATTEMPTS)
    rows = curve.curve_rows(findings.attempts)
    if rows.is_empty():
        return Section("attempts", title, about, ["No request needed a second attempt."])
    names = rows["leaf"].unique(maintain_order=True).to_list()
    said = []
    for n in curve.KNOWN_LIMITS:
        leaf = names[0]
        last = rows.filter(pl.col("leaf") == leaf, pl.col("within") <= n).tail(1)
        said.append(
            f"TDH.{leaf}: {last['needed more'].item()} of the requests needed more than {n} "
            f"attempts (95 % interval: {last['interval'].item()})."
        )
    return Section(
        "attempts",
        title,
        about,
        said,
        figures=[
            Figure(
                "attempts",
                "Requests that needed more than n attempts",
                f"Kaplan-Meier, with the 95 % band of {names[0]}; cut requests are censored. "
                "A line that falls to the bottom: none needed more. Dashed: limits that were "
                f"proposed, and those found here. The {plural(len(names), 'leaf', 'leaves')} with "
                "most retried requests.",
                lambda: curve.attempts_curve(findings.attempts, findings.limits),
            )
        ],
    )


def replayed(findings: Findings) -> Section:
    """Show what each policy would have done with the requests of this trace."""
    title, about = "What would each policy have done?", definition(POLICIES)
    rows = findings.policies.filter(pl.col("n_retried") > 0)
    if rows.is_empty():
        return Section("policies", title, about, ["The same: nothing was retried."])
    sums = (
        rows.group_by("policy", maintain_order=True)
        .agg(
            pl.col("n_requests", "n_exceeding", "n_undecided", "n_warnings", "n_bugs").sum(),
            pl.col("waited_ns", "n_entries_left").sum(),
            pl.col("n_vms_killed").max(),
        )
        .sort("n_exceeding", "policy", descending=[True, False])
    )
    worst, best = sums.row(0, named=True), sums.row(-1, named=True)
    return Section(
        "policies",
        title,
        about,
        [
            f"{row['policy']}: {count(row['n_exceeding'])} of "
            f"{plural(row['n_requests'], 'request')} "
            f"({share(row['n_exceeding'], row['n_requests'])}) would have needed more."
            for row in ((worst,) if worst == best else (worst, best))
        ],
        figures=[
            Figure(
                "policies",
                "Requests that need more than a policy grants",
                "Each cell: the share, and below it the 95 % interval; leaves retried most. "
                "Requests are taken as they came: another policy would also change who meets whom.",
                lambda: policies.policies_compared(findings.policies),
            )
        ],
        grids=[_policies(sums)],
    )


def _policies(sums: pl.DataFrame) -> Grid:
    return grid(
        ("policy", "need more", "not known", "warnings", "VMs killed", "left behind", "retrying"),
        [
            (
                row["policy"],
                count(row["n_exceeding"]),
                count(row["n_undecided"]),
                count(row["n_warnings"]),
                count(row["n_vms_killed"]),
                count(row["n_entries_left"]),
                duration(row["waited_ns"]),
            )
            for row in sums.iter_rows(named=True)
        ],
        right=range(1, 7),
        spare=(3,),
        caption="Leaves that were retried. Not known: requests that left sight before the policy "
        "ends; left behind: SEPT entries with host priority set.",
    )
