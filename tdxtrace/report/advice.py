"""What to look at next, or to capture better, given what was found."""

from __future__ import annotations

import shlex

import polars as pl

from tdxtrace.tables.text import one_line
from tdxtrace.tables.trace import Findings
from tdxtrace.tdx.leaves import leaf_name


def next_steps(findings: Findings) -> list[str]:
    """Return sentences, the most useful first; each names a command or an option."""
    path = one_line(shlex.quote(findings.provenance.sources[0].path), 60)
    return [*_about_the_capture(findings), *_about_the_findings(findings, path)]


def _about_the_findings(findings: Findings, path: str) -> list[str]:
    steps = []
    if findings.zero_steps.height:
        steps.append(f"tdxtrace zero-steps {path}")
    abandoned = findings.retry_chains.filter(pl.col("outcome") == "abandoned").height
    if abandoned:
        steps.append(f"tdxtrace retry-chains {path} --outcome abandoned")
    worst = findings.leaf_stats.filter(pl.col("retried_seamcalls") > 0).head(1)
    if worst.height:
        name = worst.select(leaf_name(pl.col("leaf"))).item() or str(worst["leaf"][0])
        steps.append(f"tdxtrace retry-chains {path} --leaf {name}")
    if findings.kernel_messages.height and findings.retry_chains.is_empty():
        steps.append(f"tdxtrace events {path} --table kernel_messages")
    if not steps:
        steps.append(f"tdxtrace events {path}")
    return steps


def _about_the_capture(findings: Findings) -> list[str]:
    losses = findings.losses.filter(pl.col("severity") != "info")
    order = {"data_loss": 0, "error": 1}
    ranked = sorted(losses.iter_rows(named=True), key=lambda row: order[row["severity"]])
    return [f"{row['kind'].replace('_', ' ')}: {row['advice']}" for row in ranked[:1]]
