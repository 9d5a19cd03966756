"""Every chart of the report, for a notebook: by name, drawn when it is looked at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from tdxtrace.report.charts.theme import WIDTH
from tdxtrace.report.sections import Figure
from tdxtrace.report.story import sections
from tdxtrace.tables.text import escape
from tdxtrace.tables.trace import Findings

if TYPE_CHECKING:
    import altair as alt


class Charts(Mapping[str, "alt.Chart | alt.LayerChart"]):
    """The charts of findings that have something to show, by the name of their picture.

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
        drawn: alt.Chart | alt.LayerChart = self._figures[name].draw().properties(width=WIDTH)
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
        findings: What ``analyze`` found.
    """
    return Charts(findings)
