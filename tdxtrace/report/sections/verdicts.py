"""Section on the verdicts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import polars as pl

from tdxtrace.report.names import definition, leaf_label
from tdxtrace.report.section import Grid, Problem, Section, grid, more
from tdxtrace.report.units import count, plural, word
from tdxtrace.report.verdict_text import VerdictKind, kinds_of, problem_lines
from tdxtrace.tables.text import one_line
from tdxtrace.tables.trace import Findings
from tdxtrace.tables.verdicts import PROBLEMS, VERDICTS

ORDER: Final = ("BUG", "HOSTILE", "UNDECIDED", "EXPECTED")
"""Verdicts in order of importance."""
_MAX_ROWS: Final = 15
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
    """Return the problems in one line; groups with the same rule count once, as in ``analyze``."""
    judged = plural(findings.retry_chains.height, "request")
    if findings.retry_chains.is_empty():
        n = findings.kernel_messages.height
        judged = plural(n, "kernel message") if n else "KVM's own events"
    sources = findings.provenance.sources
    first = problem_lines(kinds_of(findings.verdicts), sources, judged, "")[0]
    line, _ = next(iter(first.lines(_LONG)))
    return f"{line[0].upper()}{line[1:].rstrip(':')}."


def section(findings: Findings) -> Section:
    """Return the section with each problem, then the undecided and the expected groups."""
    rows = ranked(findings)
    severe = pl.col("verdict").is_in(PROBLEMS)
    others = [rows.filter(verdict=verdict) for verdict in ("UNDECIDED", "EXPECTED")]
    if rows.is_empty():
        return Section("verdicts", "Verdicts", definition(VERDICTS), [headline(findings)])
    problems = [_problem(findings, kind) for kind in problem_kinds(findings)]
    return Section(
        "verdicts",
        "Problems" if problems else "Verdicts",
        definition(VERDICTS),
        [
            f"BUG or HOSTILE: {count(rows.filter(severe).height)} of "
            f"{plural(rows.height, 'group')} of findings."
        ],
        grids=[_table(part) for part in others if part.height],
        problems=problems,
    )


def problem_kinds(findings: Findings) -> list[VerdictKind]:
    """Return the BUG and HOSTILE groups, merged by rule, the worst first."""
    return [kind for kind in kinds_of(findings.verdicts) if kind.verdict in PROBLEMS][:_MAX_ROWS]


def _problem(findings: Findings, kind: VerdictKind) -> Problem:
    tds = dict.fromkeys(word(g["td_id"]) for g in kind.groups if g["td_id"] is not None)
    return Problem(
        verdict=kind.verdict,
        where=", ".join([kind.what(), *(f"TD {td}" for td in tds)]),
        what=sentence(kind),
        evidence=one_line("; ".join(map(_evidence, kind.groups)), _LONG),
        rule=one_line(f"{kind.rule}: {kind.groups[0]['rule_source']}", _LONG),
        look=kind.command(findings.provenance.sources),
        advice=_ADVICE[kind.verdict],
    )


def sentence(kind: VerdictKind) -> str:
    """Return the sentences of a kind's groups as one sentence."""
    return one_line("; ".join(kind.sentences()) + ".", _LONG)


def _evidence(group: Mapping[str, Any]) -> str:
    rest = " and others" if group["n_rows"] > len(group["evidence"].split()) else ""
    return f"{group['evidence_table']}, rows {group['evidence']}{rest}"


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
            for row in rows.head(_MAX_ROWS).iter_rows(named=True)
        ],
        right=(2,),
        droppable=(4, 3),
        caption="Rows are the first lines or records (seq) of the evidence.",
        more=more(rows.height - _MAX_ROWS, "verdicts"),
    )
    return replace(shown, summary=f"{plural(rows.height, f'{verdict} group')}, {why}")


def _undecided(row: Mapping[str, Any]) -> str:
    return f"{row['sentence']} To decide: {row['decided_by']}."
