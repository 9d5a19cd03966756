"""Outline of the report: its sections in order, its title, and its charts by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from tdxtrace.report.charts.theme import WIDTH
from tdxtrace.report.origin import Origin
from tdxtrace.report.section import Figure, Section
from tdxtrace.report.sections import (
    builds,
    causes,
    costs,
    leaves,
    lifecycle,
    limits,
    outcomes,
    provenance,
    quality,
    summary,
    times,
    verdicts,
    zero_steps,
)
from tdxtrace.tables.text import escape, one_line
from tdxtrace.tables.trace import Findings

if TYPE_CHECKING:
    import altair as alt


_NO_ORIGIN: Final = Origin()
# Tables that both of the following groups need.
_FIRST: Final = ("busy_answers",)
# The slowest tables, in two independent groups of about the same duration that are computed in
# parallel.
_IN_BACKGROUND: Final = ("step_thresholds", "time_shares", "zero_step_causes", "progress_loops")
_IN_FOREGROUND: Final = ("attempts", "limits", "limit_statements", "policies", "latencies")


def sections(findings: Findings, made: Origin = _NO_ORIGIN) -> list[Section]:
    """Return the sections of the report on ``findings``.

    The order is: summary, problems, limits; retries by leaf, attempts, time and cause; zero-step
    episodes and abandoned requests; data quality and provenance; details, which the page folds.
    """
    _compute(findings, _FIRST)
    with ThreadPoolExecutor(1) as background:
        others = background.submit(_compute, findings, _IN_BACKGROUND)
        _compute(findings, _IN_FOREGROUND)
        others.result()
    shown = [
        summary.section(findings),
        verdicts.section(findings),
        limits.section(findings),
        leaves.section(findings),
        limits.attempts(findings),
        times.section(findings),
        causes.section(findings),
        zero_steps.section(findings),
        zero_steps.causes(findings),
        outcomes.abandoned(findings),
        quality.section(findings),
        provenance.section(findings, made),
    ]
    details = [
        limits.list_questions(findings),
        limits.replayed(findings),
        costs.latencies(findings),
        costs.time_shares(findings),
        causes.td_conflicts(findings),
        outcomes.loops(findings),
        zero_steps.thresholds(findings),
        zero_steps.vcpus(findings),
        builds.counters(findings),
        builds.measurement_log(findings),
        builds.host_checks(findings),
        *lifecycle.sections(findings),
    ]
    return [*shown, *(replace(section, is_detail=True) for section in details)]


def _compute(findings: Findings, names: Sequence[str]) -> None:
    for name in names:
        getattr(findings, name)


def title(findings: Findings) -> str:
    """Return the title of the report, with the names of at most three inputs."""
    names = [one_line(source.path.rpartition("/")[2]) for source in findings.provenance.sources]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return "TDX SEAMCALL retries: " + ", ".join(names[:3]) + more


class Charts(Mapping[str, "alt.Chart | alt.LayerChart"]):
    """Charts of findings by name; only those with data. A chart is drawn on access.

    Example:
        >>> import tdxtrace
        >>> trace = tdxtrace.read_trace("sample_traces/contended.txt")
        >>> "timeline" in tdxtrace.charts(tdxtrace.analyze(trace))
        True
    """

    def __init__(self, findings: Findings) -> None:
        self._figures: dict[str, Figure] = {
            figure.name: figure for section in sections(findings) for figure in section.figures
        }

    def __getitem__(self, name: str) -> alt.Chart | alt.LayerChart:
        figure = self._figures[name]
        drawn: alt.Chart | alt.LayerChart = figure.draw().properties(
            width=WIDTH, title=figure.title
        )
        return drawn

    def __iter__(self) -> Iterator[str]:
        return iter(self._figures)

    def __len__(self) -> int:
        return len(self._figures)

    def __repr__(self) -> str:
        width = max(map(len, self._figures), default=0) + 1
        lines = [f"  {name:<{width}} {figure.title}" for name, figure in self._figures.items()]
        return "\n".join(["Charts: charts[name] draws one", *lines])

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td><code>{escape(name)}</code></td>"
            f"<td style='text-align:left'>{escape(figure.title)}</td></tr>"
            for name, figure in self._figures.items()
        )
        return f"<p><b>Charts</b>: <code>charts[name]</code> draws one</p><table>{rows}</table>"


def charts(findings: Findings) -> Charts:
    """Return the charts of the report on ``findings``, for a notebook.

    Args:
        findings: Result of ``analyze``.
    """
    return Charts(findings)
