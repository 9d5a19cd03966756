"""The report: which questions are answered, in which order."""

from __future__ import annotations

from tdxtrace.report.questions import (
    aftermath,
    causes,
    costs,
    leaves,
    limits,
    quality,
    sharing,
    short,
    steps,
    times,
    verdicts,
    zero_steps,
)
from tdxtrace.report.sections import Section
from tdxtrace.tables.trace import Findings


def sections(findings: Findings) -> list[Section]:
    """Return the sections of the report on ``findings``, the answer first."""
    return [
        short.section(findings),
        verdicts.section(findings),
        limits.section(findings),
        quality.section(findings),
        leaves.section(findings),
        limits.attempts(findings),
        limits.replayed(findings),
        times.section(findings),
        costs.latencies(findings),
        costs.time_shares(findings),
        causes.section(findings),
        sharing.section(findings),
        aftermath.abandoned(findings),
        aftermath.loops(findings),
        zero_steps.section(findings),
        steps.causes(findings),
        steps.thresholds(findings),
        zero_steps.vcpus(findings),
    ]


def title(findings: Findings) -> str:
    """Return the report's title: which inputs it is about, at most three by name."""
    names = [source.path.rpartition("/")[2] for source in findings.provenance.sources]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return "TDX SEAMCALL retries: " + ", ".join(names[:3]) + more
