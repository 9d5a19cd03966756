"""Rendering of reports and comparisons as HTML, Markdown or JSON, and of charts as images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tdxtrace.errors import InputError
from tdxtrace.report.outline import sections, title
from tdxtrace.report.section import Section
from tdxtrace.tables.files import whole_file
from tdxtrace.tables.text import one_line
from tdxtrace.tables.trace import Findings

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import altair as alt
    import polars as pl

_SCALE: Final = 2
"""Pixels of a PNG per pixel of the page, for high-density screens."""


def report(findings: Findings, form: str) -> bytes:
    """Return the report on ``findings`` as ``html``, ``md`` or ``json``."""
    from tdxtrace.report.json_data import report_data  # noqa: PLC0415

    name, parts = title(findings), sections(findings)
    return _render(name, parts, form, lambda: report_data(name, parts, findings))


def comparison(name: str, parts: list[Section], form: str, rows: pl.DataFrame) -> bytes:
    """Return a comparison as ``html``, ``md`` or ``json``; JSON has the rows of the table."""
    return _render(name, parts, form, rows.to_dicts)


def _render(name: str, parts: list[Section], form: str, data: Callable[[], object]) -> bytes:
    if form == "html":
        from tdxtrace.report.html import html  # noqa: PLC0415 - slow to import

        return html(name, parts).encode()
    if form == "md":
        from tdxtrace.report.markdown import markdown  # noqa: PLC0415

        return markdown(name, parts).encode()
    return (json.dumps(data(), indent=2) + "\n").encode()


def save_charts(
    findings: Findings,
    folder: Path,
    kind: str,
    force: bool,
    inputs: Sequence[str | Path | None] = (),
) -> int:
    """Save every chart of the report as an image on white; return the number of charts.

    Args:
        findings: The findings.
        folder: Folder of the images; it is created if missing.
        kind: ``png`` or ``svg``.
        force: Whether to overwrite existing images.
        inputs: Inputs of ``findings``, which are never overwritten.

    Raises:
        InputError: If an image exists and may not be overwritten, is one of ``inputs``, or
            cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        shown = one_line(str(folder))
        raise InputError(f"cannot make the folder {shown}: {error.strerror}") from None
    figures = [figure for section in sections(findings) for figure in section.figures]
    for figure in figures:
        with whole_file(folder / f"{figure.name}.{kind}", force=force, inputs=inputs) as file:
            file.write(picture(figure.draw(), kind))
    return len(figures)


def picture(chart: alt.Chart | alt.LayerChart, kind: str) -> bytes:
    """Return a chart as PNG or SVG, on white."""
    import vl_convert  # noqa: PLC0415 - slow to import

    from tdxtrace.report.charts.theme import WIDTH, light  # noqa: PLC0415

    spec = chart.to_dict() | {"width": WIDTH}
    spec["config"] = spec["config"] | {"background": light("paper"), "padding": 12}
    if kind == "png":
        return bytes(vl_convert.vegalite_to_png(spec, scale=_SCALE))
    return str(vl_convert.vegalite_to_svg(spec)).encode()
