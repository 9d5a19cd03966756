"""The looks of every chart: one palette for light, dark and print, told apart by all eyes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import altair as alt

# Name: (on white, on black).  The hues are those of Okabe and Ito, "Color Universal Design"
# (2008), which people with any common colour blindness can tell apart, darkened or lightened
# until each has a contrast of 3:1 or more with its paper (WCAG 2.1, 1.4.11).
PALETTE: Final[Mapping[str, tuple[str, str]]] = {
    "paper": ("#ffffff", "#14181d"),
    "ink": ("#1b1f24", "#e6e9ed"),
    "muted": ("#57606a", "#9aa4b0"),
    "line": ("#d5dbe1", "#363e48"),
    "blue": ("#0072b2", "#5fb0e6"),
    "vermilion": ("#d55e00", "#ff8f45"),
    "green": ("#00825e", "#35c99b"),
    "purple": ("#a8407f", "#e796c4"),
    "yellow": ("#8f6f00", "#e3c53f"),
    "grey": ("#6e7781", "#8c96a1"),
}
HUES: Final = ("blue", "vermilion", "green", "purple", "yellow", "grey")
FONT: Final = "system-ui, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
WIDTH: Final = 720
"""Pixels of a picture; in a page a chart is as wide as the page."""


def light(name: str) -> str:
    """Return a colour of the palette, on white."""
    return PALETTE[name][0]


def on_page(spec: Any) -> Any:  # noqa: ANN401 - whatever JSON holds
    """Return a chart's specification with colours that follow the page: ``var(--blue)``.

    The page is light or dark, or printed, and may change while it is open.
    """
    if isinstance(spec, dict):
        return {key: on_page(value) for key, value in spec.items()}
    if isinstance(spec, list):
        return [on_page(value) for value in spec]
    return _VARIABLES.get(spec, spec) if isinstance(spec, str) else spec


_VARIABLES: Final = {on_white: f"var(--{name})" for name, (on_white, _) in PALETTE.items()}


def themed(chart: alt.Chart | alt.LayerChart, height: int) -> alt.Chart | alt.LayerChart:
    """Return ``chart`` as wide as its place, in the colours of the palette."""
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
        # One below the other where there is no room beside each other.
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
        range={"category": [light(name) for name in HUES]},
        autosize={"type": "fit-x", "contains": "padding"},
    )
    return made
