"""Analysis of SEAMCALL retries on Intel TDX hosts, from ftrace and perf recordings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tdxtrace.analysis.selection import Selection as Selection
    from tdxtrace.errors import TdxtraceError as TdxtraceError
    from tdxtrace.ingest.read import read_trace as read_trace
    from tdxtrace.pipeline import analyze as analyze
    from tdxtrace.pipeline import compare as compare
    from tdxtrace.pipeline import query as query
    from tdxtrace.recommend.limits import limits as limits
    from tdxtrace.recommend.policy_definitions import policy_named as policy_named
    from tdxtrace.recommend.replay import policies as policies
    from tdxtrace.recommend.target import parse_target as parse_target
    from tdxtrace.report.outline import charts as charts
    from tdxtrace.report.render import write_report as write_report
    from tdxtrace.tables.trace import Findings as Findings
    from tdxtrace.tables.trace import Trace as Trace

__version__ = "0.1.0"

_HOMES = {
    "Findings": "tdxtrace.tables.trace",
    "Selection": "tdxtrace.analysis.selection",
    "TdxtraceError": "tdxtrace.errors",
    "Trace": "tdxtrace.tables.trace",
    "analyze": "tdxtrace.pipeline",
    "charts": "tdxtrace.report.outline",
    "compare": "tdxtrace.pipeline",
    "limits": "tdxtrace.recommend.limits",
    "parse_target": "tdxtrace.recommend.target",
    "policies": "tdxtrace.recommend.replay",
    "policy_named": "tdxtrace.recommend.policy_definitions",
    "query": "tdxtrace.pipeline",
    "read_trace": "tdxtrace.ingest.read",
    "write_report": "tdxtrace.report.render",
}
__all__ = [
    "Findings",
    "Selection",
    "TdxtraceError",
    "Trace",
    "__version__",
    "analyze",
    "charts",
    "compare",
    "limits",
    "parse_target",
    "policies",
    "policy_named",
    "query",
    "read_trace",
    "write_report",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401
    """Import a public name on first access, as polars is slow to import."""
    if name not in _HOMES:
        raise AttributeError(f"module 'tdxtrace' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
