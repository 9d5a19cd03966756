"""The report: which questions are answered, in which order."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

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

# What takes longest, in two groups of about the same length, neither of which rests on the
# other: each leaves half of a processor idle.
_APART: Final = ("step_thresholds", "time_shares", "zero_step_causes", "progress_loops")
_HERE: Final = ("busy_causes", "attempts", "limits", "policies", "latencies")


def sections(findings: Findings) -> list[Section]:
    """Return the sections of the report on ``findings``, the answer first."""
    with ThreadPoolExecutor(1) as apart:
        others = apart.submit(_find, findings, _APART)
        _find(findings, _HERE)
        others.result()
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


def _find(findings: Findings, names: Sequence[str]) -> None:
    for name in names:
        getattr(findings, name)


def title(findings: Findings) -> str:
    """Return the report's title: which inputs it is about, at most three by name."""
    names = [source.path.rpartition("/")[2] for source in findings.provenance.sources]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return "TDX SEAMCALL retries: " + ", ".join(names[:3]) + more
