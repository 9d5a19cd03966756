"""Verdicts as text for a terminal: problems first, groups with the same rule together."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import polars as pl
from rich.console import Group, RenderableType
from rich.text import Text

from tdxtrace.report.columns import Sentence
from tdxtrace.report.names import leaf_label
from tdxtrace.report.units import count, plural, word
from tdxtrace.tables.text import one_line
from tdxtrace.tables.trace import Source
from tdxtrace.tables.verdicts import PROBLEMS

STYLE: Final = {
    "BUG": "bold red",
    "HOSTILE": "bold magenta",
    "UNDECIDED": "bold yellow",
    "EXPECTED": "bold green",
}
"""Styles by verdict, the most important verdict first."""
_WHOSE: Final = {"BUG": "host kernel", "HOSTILE": "host"}
_NONE: Final = "no problems found: nothing was busy, refused, abandoned, repeated or printed"
_NOUNS: Final = {
    "busy": "busy answer",
    "broken_rule": "call",
    "zero_step": "zero-step episode",
    "abandoned": "abandoned request",
    "loop": "loop",
    "message": "kernel message",
}
# Command that shows the rows of an evidence table; {} is replaced by the trace.
_COMMANDS: Final = {
    "zero_steps": "zero-step-causes {}",
    "abandoned_requests": "abandoned-requests {}",
    "progress_loops": "progress-loops {}",
    "kernel_messages": "events {} --table kernel_messages",
}
_MAX_LINE: Final = 600


@dataclass(frozen=True, slots=True)
class VerdictKind:
    """Groups of findings with the same verdict and rule."""

    verdict: str
    rule: str
    groups: Sequence[dict[str, Any]]
    """Rows of the ``verdicts`` table, the largest group first."""

    @property
    def n_rows(self) -> int:
        """Number of findings."""
        return sum(int(group["n_rows"]) for group in self.groups)

    def what(self) -> str:
        """Return kind and leaves of the findings: ``8 busy answers of MEM.PAGE.AUG, MEM.TRACK``."""
        subjects = {group["subject"] for group in self.groups}
        noun = _NOUNS[subjects.pop()] if len(subjects) == 1 else "finding"
        leaves = dict.fromkeys(
            leaf_label(group["leaf"]) for group in self.groups if group["leaf"] is not None
        )
        of = f" of {', '.join(leaves)}" if leaves else ""
        return plural(self.n_rows, noun) + of

    def sentences(self) -> list[str]:
        """Return each group's sentence without full stop; a repeated reason is printed once."""
        sentences: list[str] = []
        last_reason = ""
        for group in self.groups:
            what, _, reason = group["sentence"].partition(": ")
            is_repeated = reason and reason == last_reason
            sentences.append(what if is_repeated else group["sentence"].removesuffix("."))
            last_reason = reason
        return sentences

    def command(self, sources: Sequence[Source]) -> str:
        """Return the command that shows the evidence of the largest group."""
        first = self.groups[0]
        path = one_line(shlex.quote(sources[first["source"]].path), _MAX_LINE)
        shown = _COMMANDS.get(first["evidence_table"])
        if shown is not None:
            return "tdxtrace " + shown.replace("{}", path)
        if not first["evidence"]:
            return f"tdxtrace verdicts {path}"
        return f"tdxtrace explain {path} --seq {first['evidence'].split(' ')[0]}"


def kinds_of(verdicts: pl.DataFrame) -> list[VerdictKind]:
    """Merge the groups of the ``verdicts`` table with the same verdict and rule.

    Returns:
        BUG first, then HOSTILE, UNDECIDED, EXPECTED; within each, most findings first.
    """
    merged = [
        VerdictKind(
            str(verdict),
            str(rule),
            rows.sort("n_rows", descending=True, maintain_order=True).rows(named=True),
        )
        for (verdict, rule), rows in verdicts.group_by("verdict", "rule", maintain_order=True)
    ]
    order = list(STYLE)
    return sorted(merged, key=lambda kind: (order.index(kind.verdict), -kind.n_rows))


def verdict_counts(kinds: Sequence[VerdictKind]) -> str:
    """Return the number of kinds by verdict: ``1 BUG, 2 EXPECTED``."""
    numbers = {verdict: sum(kind.verdict == verdict for kind in kinds) for verdict in STYLE}
    return ", ".join(f"{count(n)} {verdict}" for verdict, n in numbers.items() if n)


def problem_lines(
    kinds: Sequence[VerdictKind], sources: Sequence[Source], judged: str, path: str
) -> list[Sentence]:
    """Return the number of problems, then a line per problem with the command to inspect it.

    Args:
        kinds: Result of :func:`kinds_of`.
        sources: The inputs.
        judged: The checked events, e.g. ``503 requests``.
        path: The trace as a command-line argument.
    """
    found = [kind for kind in kinds if kind.verdict in PROBLEMS]
    undecided = sum(kind.verdict == "UNDECIDED" for kind in kinds)
    rest = f"; {plural(undecided, 'kind')} of findings undecided" if undecided else ""
    if not found:
        title = f"no problems found in {judged}{rest}"
        if not undecided:
            return [Sentence(title, style="bold green")]
        then = f"tdxtrace verdicts {path}"
        return [Sentence(f"{title}:", style="bold green", then=then)]
    title = f"{plural(len(found), 'problem')}: {verdict_counts(found)}{rest}"
    return [
        Sentence(title, style=STYLE[found[0].verdict]),
        *(
            Sentence(
                f"{kind.verdict} ({_WHOSE[kind.verdict]}) {kind.rule}: {kind.what()}:",
                indent=2,
                then=kind.command(sources),
            )
            for kind in found
        ),
    ]


def verdict_text(verdicts: pl.DataFrame, limit: int, sources: Sequence[Source]) -> RenderableType:
    """Return the output of ``tdxtrace verdicts``: counts by verdict, then each kind, worst first.

    Args:
        verdicts: The ``verdicts`` table.
        limit: Maximum number of kinds of verdicts; 0: all.
        sources: The inputs.
    """
    kinds = kinds_of(verdicts)
    if not kinds:
        return Text(_NONE, style="green")
    shown = kinds[:limit] if limit else kinds
    title = verdict_counts(kinds)
    if len(kinds) < verdicts.height:
        title += f", of {plural(verdicts.height, 'group')} of findings"
    more = len(kinds) - len(shown)
    return Group(
        Sentence(title, style=STYLE[kinds[0].verdict]),
        *(part for kind in shown for part in _kind_lines(kind, sources)),
        *([Text(f"{plural(more, 'more kind')} of verdicts (-n 0: all)")] if more else []),
    )


def _kind_lines(kind: VerdictKind, sources: Sequence[Source]) -> list[Sentence]:
    tds = dict.fromkeys(
        f"TD {word(group['td_id'])}" for group in kind.groups if group["td_id"] is not None
    )
    title = ", ".join([f"{kind.verdict} {kind.rule}: {kind.what()}", *tds])
    lines = []
    for sentence, group in zip(kind.sentences(), kind.groups, strict=True):
        more = " ..." if group["n_rows"] > len(group["evidence"].split()) else ""
        lines.append(f"{sentence} ({group['evidence_table']} seq {group['evidence']}{more})")
    lines.append(f"rule {kind.rule}: {kind.groups[0]['rule_source']}")
    lines += [
        f"to decide: {text}"
        for text in dict.fromkeys(group["decided_by"] for group in kind.groups)
        if text is not None
    ]
    lines.append(f"look closer: {kind.command(sources)}")
    return [
        Sentence(title, style=STYLE[kind.verdict]),
        *(Sentence(one_line(line, _MAX_LINE), indent=4) for line in lines),
    ]
