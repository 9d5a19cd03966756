"""Sections on recommended retry limits, on the attempts curve, and on replayed policies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import polars as pl

from tdxtrace.report.charts import limits as charts
from tdxtrace.report.limits_text import UNINFORMATIVE_SHARE, percent, recording_lines, short_leaves
from tdxtrace.report.names import VALID_FOR, definition, leaf_label
from tdxtrace.report.questions import questions
from tdxtrace.report.section import Figure, Grid, Section, grid
from tdxtrace.report.units import count, duration, plural, share
from tdxtrace.tables.limits import ATTEMPTS, LIMITS, POLICIES
from tdxtrace.tables.trace import Findings

_MAX_LEAVES: Final = 14


def _for_anyone(findings: Findings) -> pl.DataFrame:
    return findings.limits.filter(pl.col("unit") == "attempts", pl.col("made_by") == "anyone")


def sentences(findings: Findings) -> list[str]:
    """Return the supported limits of the most retried leaves, and the recording a target needs."""
    rows = short_leaves(_for_anyone(findings))
    if rows.is_empty():
        return ["No limit is recommended: no request was captured."]
    supported = _supported(findings)
    target, confidence = rows["target"][0], rows["confidence"][0]
    confidence_text = f"with {100 * confidence:g} % confidence"
    aim = f"at most 1 request in {1 / target:,.0f} to need more, {confidence_text}"
    counted = rows.filter(pl.col("basis").is_in(["observed", "nothing_busy"]))
    if counted.height:
        text = ", ".join(
            f"{row['name']} {count(row['limit'])}" for row in counted.head(6).iter_rows(named=True)
        )
        return [*supported, f"Recommended limits in attempts ({aim}): {text}."]
    first = rows.head(1)
    how = "; ".join(recording_lines(first))
    return [*supported, f"No limit is recommended ({aim}): this trace supports none. {how}."]


def _supported(findings: Findings) -> list[str]:
    """Return a sentence on the smallest share that counting supports, for up to three leaves."""
    rows = findings.limit_statements.filter(kind="smallest")
    rows = rows.filter((pl.col("more_high") < UNINFORMATIVE_SHARE).all().over("leaf"))
    retried = rows.filter(pl.col("n_retried") > 0)
    parts = []
    for (leaf,), of_leaf in (retried if retried.height else rows.head(2)).group_by(
        "leaf", maintain_order=True
    ):
        by_unit = {row["unit"]: row for row in of_leaf.iter_rows(named=True)}
        time, attempts = by_unit["ns"], by_unit["attempts"]
        in_time = f"{percent(time['more_high'])} more than {duration(time['within'])}, "
        parts.append(
            # Where no request was retried, none took any time between attempts.
            f"of TDH.{leaf_label(leaf)} {in_time if time['within'] else ''}"
            f"{percent(attempts['more_high'])} more than {plural(attempts['within'], 'attempt')}"
        )
    if not parts:
        return ["This trace has too few requests to support any limit."]
    confidence_text = f"each with {100 * rows['confidence'][0]:g} % confidence"
    return [
        f"By counting, at most these shares need more ({confidence_text}): {'; '.join(parts[:3])}."
    ]


def section(findings: Findings) -> Section:
    """Return the section on the recommended limit of each leaf, and its basis."""
    rows = _for_anyone(findings)
    return Section(
        "limits",
        "Which retry limit is safe?",
        definition(LIMITS),
        sentences(findings),
        grids=[] if rows.is_empty() else [*_shares(findings), _table(rows)],
    )


def _shares(findings: Findings) -> list[Grid]:
    """Return the table of the shares of requests that need more than common limits."""
    asked = findings.limit_statements.filter(pl.col("kind") == "asked", pl.col("n_retried") > 0)
    if asked.is_empty():
        return []
    asked = asked.sort(pl.col("unit") != "ns", "within", maintain_order=True)
    numbers = asked.select("unit", "within").unique(maintain_order=True)
    shown = {"ns": duration, "attempts": count}
    titles = [f"> {shown[unit](n)}" for unit, n in numbers.iter_rows()]
    leaves = findings.limit_statements["leaf"].unique(maintain_order=True)
    rows = [
        (
            leaf_label(leaf),
            *(percent(share) if share < UNINFORMATIVE_SHARE else "-" for share in own["more_high"]),
        )
        for leaf in leaves
        if (own := asked.filter(pl.col("leaf") == leaf)).height
    ]
    caption = "At most this share of the requests needs more time, or more attempts, each with "
    return [
        grid(
            ("TDH.", *titles),
            rows[:_MAX_LEAVES],
            right=range(1, len(titles) + 1),
            droppable=(1, 6, 2),
            caption=f"{caption}{100 * asked['confidence'][0]:g} % confidence; -: not known.",
            more=f"{count(len(rows) - _MAX_LEAVES)} more leaves" if len(rows) > _MAX_LEAVES else "",
        )
    ]


def _table(rows: pl.DataFrame) -> Grid:
    ordered = rows.sort("n_retried", "n_requests", "leaf", descending=[True, True, False])
    return grid(
        ("TDH.", "limit", "basis", "requests", "retried", "max observed", "reason or warning"),
        [
            (
                leaf_label(row["leaf"]),
                count(row["limit"]),
                row["basis"].replace("_", " "),
                count(row["n_requests"]),
                count(row["n_retried"]),
                count(row["max_seen"]),
                row["reason"] or VALID_FOR,
            )
            for row in ordered.head(_MAX_LEAVES).iter_rows(named=True)
        ],
        right=(1, 3, 4, 5),
        droppable=(6,),
        caption="Limits in attempts, for busy answers of any cause.",
        more=f"{count(rows.height - _MAX_LEAVES)} more leaves" if rows.height > _MAX_LEAVES else "",
    )


def list_questions(findings: Findings) -> Section:
    """Return the section with the answers to the questions of the kernel's list."""
    return Section(
        "questions",
        "The questions of the kernel's list",
        "Questions about retries asked in 2024, and the answers from this trace.",
        [f"{question} {answer}" for question, answer in questions(findings)],
    )


def attempts(findings: Findings) -> Section:
    """Return the section on the share of requests by number of attempts needed."""
    title, about = "Attempts per request", definition(ATTEMPTS)
    rows = charts.curve_rows(findings.attempts)
    if rows.is_empty():
        return Section("attempts", title, about, ["No request needed a second attempt."])
    names = rows["leaf"].unique(maintain_order=True).to_list()
    sentences = []
    for n in charts.PROPOSED_LIMITS:
        leaf = names[0]
        last = rows.filter(pl.col("leaf") == leaf, pl.col("within") <= n).tail(1)
        sentences.append(
            f"TDH.{leaf}: {last['needed more'].item()} of the requests needed more than {n} "
            f"attempts (95 % interval: {last['interval'].item()})."
        )
    return Section(
        "attempts",
        title,
        about,
        sentences,
        figures=[
            Figure(
                "attempts",
                "Requests that needed more than n attempts",
                f"Kaplan-Meier, with the 95 % band of {names[0]}; cut requests are censored. "
                "A line at the bottom: none needed more. Thin lines: limits that were "
                f"proposed, and those recommended. The {plural(len(names), 'leaf', 'leaves')} with "
                "the most retried requests.",
                lambda: charts.attempts_curve(findings.attempts, findings.limits),
            )
        ],
    )


def replayed(findings: Findings) -> Section:
    """Return the section on the replay of each policy on the requests of this trace."""
    title, about = "Replayed retry policies", definition(POLICIES)
    rows = findings.policies.filter(pl.col("n_retried") > 0)
    if rows.is_empty():
        return Section("policies", title, about, ["No request was retried."])
    sums = (
        rows.group_by("policy", maintain_order=True)
        .agg(
            pl.col("n_requests", "n_exceeding", "n_dependent", "n_undecided").sum(),
            pl.col("n_warnings", "n_bugs").sum(),
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
            *(_needed_more(row) for row in ((worst,) if worst == best else (worst, best))),
            *_withheld(sums),
        ],
        figures=[
            Figure(
                "policies",
                "Requests that need more than a policy allows",
                "Each cell: the share, and below it the 95 % interval; most retried leaves. "
                "Where the recording does not determine the share (a kick, a VM that would have "
                "died, requests after one that was given up) there is only the interval. Arrivals "
                "are as recorded: another policy would also change which calls conflict.",
                lambda: charts.policies_compared(findings.policies),
            )
        ],
        grids=[_policies(sums)],
    )


def _needed_more(row: Mapping[str, Any]) -> str:
    n, of = row["n_exceeding"], row["n_requests"]
    text = f"{row['policy']}: {count(n)} of {plural(of, 'request')} ({share(n, of)})"
    if not row["n_dependent"] and not row["n_undecided"]:
        return f"{text} would have needed more."
    low, high = n - row["n_dependent"], min(n + row["n_undecided"], of)
    return (
        f"{text} needed more in this recording; under the policy itself {count(low)} to "
        f"{count(high)} of as many."
    )


def _withheld(sums: pl.DataFrame) -> list[str]:
    """Return which policies have undecided or dependent requests, and why; empty if none."""
    dependent = sums.filter(pl.col("n_dependent") > 0)["policy"].to_list()
    undecided = sums.filter(pl.col("n_undecided") > 0)["policy"].to_list()
    parts = []
    if undecided:
        parts.append(
            f"Undecided for {', '.join(undecided)}: requests that were not observed to their end, "
            "whose next call differs from the recorded one by a kick of the vCPUs, that were busy "
            "for as long as the policy's calls take back to back, or whose VM the policy would "
            "have killed before."
        )
    if dependent:
        parts.append(
            f"Possibly fewer for {', '.join(dependent)}: a request that is given up leaves host "
            "priority set, which keeps guests off the lock until the next request."
        )
    return parts


def _policies(sums: pl.DataFrame) -> Grid:
    return grid(
        ("policy", "need more", "unknown", "warnings", "VMs killed", "left blocked", "retrying"),
        [
            (
                row["policy"],
                _at_least(row),
                count(row["n_undecided"]),
                count(row["n_warnings"]),
                count(row["n_vms_killed"]),
                count(row["n_entries_left"]),
                duration(row["waited_ns"]),
            )
            for row in sums.iter_rows(named=True)
        ],
        right=range(1, 7),
        droppable=(3,),
        caption="Retried leaves only. Unknown: requests for which the recording does not show "
        "whether they need more; left blocked: SEPT entries left with host priority set.",
    )


def _at_least(row: Mapping[str, Any]) -> str:
    n, dependent = row["n_exceeding"], row["n_dependent"]
    return f"{count(n - dependent)} to {count(n)}" if dependent else count(n)
