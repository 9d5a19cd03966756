"""The report in at most 40 lines of Markdown, for a mail to a kernel list."""

from __future__ import annotations

from typing import Final

import polars as pl

from tdxtrace import __version__
from tdxtrace.report.counts import facts, n_cut_by_losses
from tdxtrace.report.markdown import table, text, wrapped
from tdxtrace.report.origin import Origin
from tdxtrace.report.sections import leaves, provenance, summary, verdicts
from tdxtrace.report.units import duration, plural
from tdxtrace.tables.text import one_line
from tdxtrace.tables.trace import Findings

MAX_LINES: Final = 40
# Numbers of problems and leaves to show, in order: the first pair that fits MAX_LINES is used.
_SIZES: Final = ((3, 6), (3, 4), (2, 4), (1, 3), (1, 1), (0, 0))
# Maximum number of characters of a sentence: six lines.
_SENTENCE: Final = 420


def brief(title: str, findings: Findings, made: Origin) -> str:
    """Return the report in at most MAX_LINES lines of at most 75 characters, tables aside.

    Args:
        title: Title of the report.
        findings: Result of ``analyze``.
        made: Origin of the report; its command may be empty.
    """
    lines: list[str] = []
    for n_problems, n_leaves in _SIZES:
        parts = _parts(title, findings, made, n_problems, n_leaves)
        lines = [line for part in parts if part for line in (*part, "")][:-1]
        if len(lines) <= MAX_LINES:
            break
    return "\n".join(lines) + "\n"


def _parts(
    title: str, findings: Findings, made: Origin, n_problems: int, n_leaves: int
) -> list[list[str]]:
    stats = findings.leaf_stats
    return [
        [f"# {text(title)}"],
        _wrapped(verdicts.headline(findings)),
        _problems(findings, n_problems),
        [line for sentence in summary.limit(findings) for line in _wrapped(sentence)],
        _leaves(stats, n_leaves),
        [*_wrapped(", ".join(facts(findings)) + "."), *_inputs(findings), *_losses(findings)],
        _wrapped(f"tdxtrace {__version__}" + (f": {made.command}" if made.command else "")),
    ]


def _wrapped(line: str, bullet: str = "") -> list[str]:
    return wrapped(one_line(line, _SENTENCE), bullet)


def _problems(findings: Findings, max_kinds: int) -> list[str]:
    kinds = verdicts.problem_kinds(findings)
    lines = [
        line
        for kind in kinds[:max_kinds]
        for line in _wrapped(f"{kind.verdict}: {verdicts.sentence(kind)}", "- ")
    ]
    rest = len(kinds) - max_kinds
    return [*lines, *([f"- {rest} more (tdxtrace verdicts)"] if rest > 0 else [])]


def _leaves(stats: pl.DataFrame, max_leaves: int) -> list[str]:
    shown = leaves.brief_table(stats, max_leaves)
    return list(table(shown)) if shown.rows else []


def _inputs(findings: Findings) -> list[str]:
    source = findings.provenance.sources[0]
    first, last = source.first_ns, source.last_ns
    length = duration(None if first is None or last is None else last - first)
    more = len(findings.provenance.sources) - 1
    others = f" and {plural(more, 'other input')}" if more else ""
    return _wrapped(
        f"{source.format}, {length}, kernel {provenance.kernel(source)}{others}; TDX module "
        f"{provenance.module(findings)}."
    )


def _losses(findings: Findings) -> list[str]:
    data_losses = findings.losses.filter(pl.col("severity") != "info")
    cut = n_cut_by_losses(findings)
    if data_losses.is_empty():
        return ["No lost events reported."]
    return _wrapped(f"Events were lost: {plural(cut, 'request')} cut by it.")
