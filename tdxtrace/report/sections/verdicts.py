"""Section on the verdicts."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import polars as pl

from tdxtrace.report.names import definition, leaf_label
from tdxtrace.report.section import Grid, Problem, Section, grid, more
from tdxtrace.report.units import count, plural, word
from tdxtrace.tables.text import one_line
from tdxtrace.tables.trace import Findings
from tdxtrace.tables.verdicts import VERDICTS

ORDER: Final = ("BUG", "HOSTILE", "UNDECIDED", "EXPECTED")
"""Verdicts in order of importance."""
SEVERE: Final = ("BUG", "HOSTILE")
"""Verdicts that are problems."""
_MOST: Final = 15
_LONG: Final = 1200
_SUBJECTS: Final = {
    "busy": "busy answers",
    "broken_rule": "broken rule",
    "zero_step": "zero-step episodes",
    "abandoned": "abandoned requests",
    "loop": "loops",
    "message": "kernel messages",
}
_ADVICE: Final = {
    "BUG": "Report it with these rows, the kernel's version and the trace to kvm@vger.kernel.org "
    "and linux-coco@lists.linux.dev.",
    "HOSTILE": "KVM never does this: find out what on this host made these calls "
    "(a changed kernel, its userspace), and keep the trace.",
}


def ranked(findings: Findings) -> pl.DataFrame:
    """Return the verdicts by importance, then by size of the group."""
    place = pl.col("verdict").cast(pl.Enum(ORDER))
    return findings.verdicts.sort(
        place, "n_rows", "what", descending=[False, True, False], maintain_order=True
    )


def headline(findings: Findings) -> str:
    """Return what is wrong in one line: the number of BUG and HOSTILE groups, and of others."""
    counts = _counts(findings)
    if not counts:
        return "No problems found: nothing was busy, refused, abandoned or repeated."
    severe = [f"{count(counts[v])} {v}" for v in SEVERE if v in counts]
    others = [f"{count(counts[v])} {v}" for v in ORDER if v in counts and v not in SEVERE]
    rest = f" ({', '.join(others)})" if others else ""
    if severe:
        n = sum(counts[v] for v in SEVERE if v in counts)
        return f"{plural(n, 'problem')}: {', '.join(severe)}{rest}."
    caveat = "; the UNDECIDED groups could be either" if "UNDECIDED" in counts else ""
    return f"No BUG and no HOSTILE found{rest}{caveat}."


def _counts(findings: Findings) -> dict[str, int]:
    return dict(findings.verdicts.group_by("verdict").len().rows())


def section(findings: Findings) -> Section:
    """Return the section with each problem, then the groups that are none or undecided."""
    rows = ranked(findings)
    severe = pl.col("verdict").is_in(SEVERE)
    others = [rows.filter(verdict=verdict) for verdict in ("UNDECIDED", "EXPECTED")]
    n = rows.select(severe.sum()).item()
    if rows.is_empty():
        return Section("verdicts", "Verdicts", definition(VERDICTS), [headline(findings)])
    return Section(
        "verdicts",
        "Problems" if n else "Verdicts",
        definition(VERDICTS),
        [f"{count(n)} of {plural(rows.height, 'group')} of findings are BUG or HOSTILE."],
        grids=[_table(part) for part in others if part.height],
        problems=[
            _problem(findings, row) for row in rows.filter(severe).head(_MOST).iter_rows(named=True)
        ],
    )


def _problem(findings: Findings, row: Mapping[str, Any]) -> Problem:
    first = row["evidence"].partition(" ")[0]
    path = findings.provenance.sources[row["source"]].path
    shown = " ".join(row["evidence"].split())
    rest = " and others" if row["n_rows"] > len(row["evidence"].split()) else ""
    return Problem(
        verdict=row["verdict"],
        where=where(row),
        what=one_line(row["sentence"], _LONG),
        evidence=one_line(f"{row['evidence_table']}, rows {shown}{rest}", _LONG),
        rule=one_line(f"{row['rule']}: {row['rule_source']}", _LONG),
        look=f"tdxtrace explain {one_line(shlex.quote(path), 200)} --seq {first}",
        advice=_ADVICE[row["verdict"]],
    )


def where(row: Mapping[str, Any]) -> str:
    """Return the kind of a group's findings, its leaf and its TD."""
    leaf = [] if row["leaf"] is None else [f"TDH.{leaf_label(row['leaf'])}"]
    td = [] if row["td_id"] is None else [f"TD {word(row['td_id'])}"]
    return ", ".join([_SUBJECTS[row["subject"]], *leaf, *td])


def _table(rows: pl.DataFrame) -> Grid:
    verdict = rows["verdict"][0]
    why = "and what would decide them" if verdict == "UNDECIDED" else "explained by the rules"
    shown = grid(
        ("verdict", "where", "findings", "rows", "rule", "reason"),
        [
            (
                row["verdict"],
                where(row),
                count(row["n_rows"]),
                row["evidence"],
                row["rule"],
                row["sentence"] if row["decided_by"] is None else _undecided(row),
            )
            for row in rows.head(_MOST).iter_rows(named=True)
        ],
        right=(2,),
        spare=(4, 3),
        caption="Rows are the first lines or records (seq) of the evidence.",
        more=more(rows.height - _MOST, "verdicts"),
    )
    return replace(shown, fold=f"{plural(rows.height, f'{verdict} group')}, {why}")


def _undecided(row: Mapping[str, Any]) -> str:
    return f"{row['sentence']} To decide: {row['decided_by']}."
