"""Theme of the charts: palette for light, dark and print, and common axes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import altair as alt


# Name: (on white, on black).  After paper, ink, muted and line each colour is named by the one
# thing that it means on a page.  The hues are those of Okabe and Ito, "Color Universal Design"
# (2008), which people with any common colour blindness can distinguish, with a crimson and a
# brown that differ from them in lightness, darkened or lightened until each has a contrast of 3:1
# or more with its background (WCAG 2.1, 1.4.11).
PALETTE: Final[Mapping[str, tuple[str, str]]] = {
    "paper": ("#ffffff", "#14181d"),
    "ink": ("#1b1f24", "#e6e9ed"),
    "muted": ("#57606a", "#9aa4b0"),
    "line": ("#d5dbe1", "#363e48"),
    "done": ("#0072b2", "#5fb0e6"),
    "busy": ("#d55e00", "#ff8f45"),
    "waiting": ("#7a4a1e", "#c79a6b"),
    "zero_step": ("#a8407f", "#e796c4"),
    "guest": ("#00825e", "#35c99b"),
    "host": ("#8f6f00", "#e3c53f"),
    "wrong": ("#b00d2e", "#ff6f86"),
    "unknown": ("#6e7781", "#8c96a1"),
}
MEANINGS: Final[Mapping[str, str]] = {
    "wrong": "BUG, HOSTILE, not completed",
    "busy": "answered busy, retried",
    "waiting": "between attempts",
    "done": "completed, expected",
    "host": "another SEAMCALL of the host",
    "guest": "the guest",
    "zero_step": "zero-step mitigation",
    "unknown": "not known, cut",
}
"""What each colour of a chart or a verdict means, for the key of a page."""
FONT: Final = "system-ui, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
WIDTH: Final = 720
"""Width of an image in pixels; in a page a chart is as wide as the page."""


def light(name: str) -> str:
    """Return a colour of the palette for a light background."""
    return PALETTE[name][0]


def on_page(spec: Any) -> Any:  # noqa: ANN401 - whatever JSON holds
    """Return a chart's specification with colours as CSS variables, such as ``var(--blue)``.

    So they follow the page, which may switch between light, dark and print.
    """
    if isinstance(spec, dict):
        return {key: on_page(value) for key, value in spec.items()}
    if isinstance(spec, list):
        return [on_page(value) for value in spec]
    return _VARIABLES.get(spec, spec) if isinstance(spec, str) else spec


_VARIABLES: Final = {on_white: f"var(--{name})" for name, (on_white, _) in PALETTE.items()}


_TITLE: Final = {
    "anchor": "start",
    "frame": "group",
    "color": light("ink"),
    "fontSize": 14,
    "offset": 10,
    "subtitleColor": light("muted"),
    "subtitleFontSize": 12,
}


def themed(chart: alt.Chart | alt.LayerChart, height: int) -> alt.Chart | alt.LayerChart:
    """Return ``chart`` in the colours of the palette, as wide as its container."""
    axis = {
        "domainColor": light("line"),
        "gridColor": light("line"),
        "tickColor": light("line"),
        "labelColor": light("ink"),
        "titleColor": light("muted"),
        "labelFontSize": 12,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "labelLimit": 170,
        "titleAnchor": "start",
    }
    legend = {
        "orient": "top",
        # One column on a narrow page.
        "columns": {"expr": "width < 420 ? 1 : 4"},
        "labelColor": light("ink"),
        "titleColor": light("muted"),
        "labelFontSize": 12,
        "title": None,
        "symbolStrokeWidth": 3,
        "symbolOpacity": 1,
    }
    made: alt.Chart | alt.LayerChart = chart.properties(width="container", height=height).configure(
        background="transparent",
        font=FONT,
        view={"stroke": None},
        axis=axis,
        legend=legend,
        title=_TITLE,
        autosize={"type": "fit-x", "contains": "padding"},
    )
    return made


# Labels of an axis of nanoseconds; "u" for micro, as in the tables.
_DURATION_LABELS: Final = (
    "datum.value < 1e3 ? format(datum.value, '~g') + ' ns' : "
    "datum.value < 1e6 ? format(datum.value / 1e3, '~g') + ' us' : "
    "datum.value < 1e9 ? format(datum.value / 1e6, '~g') + ' ms' : "
    "format(datum.value / 1e9, '~g') + ' s'"
)


def duration_axis(low: float, high: float, **more: Any) -> dict[str, Any]:  # noqa: ANN401
    """Return an axis of nanoseconds on a logarithmic scale, with a label at each power of ten."""
    return {
        "values": powers(low, high),
        "labelExpr": _DURATION_LABELS,
        "labelOverlap": "greedy",
        **more,
    }


# Labels of an axis of seconds: 5ms, 1.2s; "u" for micro.
_SECONDS_LABELS: Final = "replace(format(datum.value, '~s'), 'µ', 'u') + 's'"


def time_axis() -> dict[str, Any]:
    """Return an axis of seconds, with as many labels as fit."""
    return {
        "labelExpr": _SECONDS_LABELS,
        "tickCount": {"expr": "width / 90"},
        "labelOverlap": "greedy",
    }


def count_ticks(high: float) -> list[int]:
    """Return ticks 1, 2, 5, 10, 20, ... to above ``high``, for a logarithmic axis of counts."""
    return [step * power for power in powers(1, high) for step in (1, 2, 5)]


def powers(low: float, high: float) -> list[int]:
    """Return the powers of ten from below ``low`` to above ``high``."""
    powers_: list[int] = [1]
    while powers_[-1] < high:
        powers_.append(powers_[-1] * 10)
    return [p for p in powers_ if p * 10 > low]
