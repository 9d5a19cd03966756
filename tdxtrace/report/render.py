"""Rendering of reports and comparisons as HTML, Markdown or JSON, and of charts as images."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tdxtrace.errors import QueryError
from tdxtrace.report.counts import facts
from tdxtrace.report.origin import Origin
from tdxtrace.report.outline import sections, title
from tdxtrace.report.section import Section
from tdxtrace.tables.files import atomic_file, atomic_folder
from tdxtrace.tables.text import encoded, one_line
from tdxtrace.tables.trace import Findings

if TYPE_CHECKING:
    from collections.abc import Sequence

    import altair as alt
    import polars as pl

_SCALE: Final = 2
"""Pixels of a PNG per pixel of the page, for high-density screens."""
_BY_SUFFIX: Final = {
    **dict.fromkeys((".html", ".htm"), "html"),
    **dict.fromkeys((".md", ".markdown"), "md"),
    ".json": "json",
}
_CAPTION: Final = 110
"""Characters of a line of a caption in an image."""


def report(findings: Findings, form: str, made: Origin | None = None) -> bytes:
    """Return the report on ``findings``.

    Args:
        findings: Result of ``analyze``.
        form: ``html``, ``md``, ``brief`` (Markdown of at most 40 lines) or ``json``.
        made: Origin of the report; see :func:`tdxtrace.report.origin.origin`.
    """
    made = Origin() if made is None else made
    name = title(findings)
    if form == "brief":
        from tdxtrace.report.brief import brief  # noqa: PLC0415

        return encoded(brief(name, findings, made))
    parts = sections(findings, made)
    if form == "json":
        from tdxtrace.report.json_data import report_json  # noqa: PLC0415

        return report_json(name, parts, findings, made)
    return _render(name, parts, form, facts(findings))


def write_report(
    findings: Findings, path: str | Path, form: str | None = None, *, force: bool = False
) -> None:
    """Write the report on ``findings`` to a file.

    Args:
        findings: Result of ``analyze``.
        path: The file; its suffix, .html, .md or .json, determines the format.
        form: Format, instead of the suffix: ``html``, ``md``, ``brief`` or ``json``.
        force: Whether to overwrite an existing file.

    Raises:
        QueryError: If the suffix is not one of these and ``form`` is not given.
        InputError: If the file exists and may not be overwritten, or cannot be written.

    Example:
        >>> import tdxtrace
        >>> findings = tdxtrace.analyze(tdxtrace.read_trace("sample_traces/contended.txt"))
        >>> tdxtrace.write_report(findings, "/dev/null", "brief")
    """
    inputs = [source.path for source in findings.provenance.sources]
    data = report(findings, form or form_of(Path(path)))
    with atomic_file(Path(path), force=force, inputs=inputs) as file:
        file.write(data)


def form_of(path: Path) -> str:
    """Return the format that a file's name implies: html, md or json.

    Raises:
        QueryError: If the suffix is unknown.
    """
    found = _BY_SUFFIX.get(path.suffix.lower())
    if found is None:
        raise QueryError(
            f"unknown suffix: {one_line(path.name)}: name the file .html, .md or .json, or use "
            "--format"
        )
    return found


def comparison(name: str, parts: list[Section], form: str, rows: pl.DataFrame) -> bytes:
    """Return a comparison as ``html``, ``md`` or ``json``; JSON has the rows of the table."""
    if form == "json":
        return (json.dumps(rows.to_dicts(), indent=2) + "\n").encode()
    return _render(name, parts, form, ())


def _render(name: str, parts: list[Section], form: str, numbers: Sequence[str]) -> bytes:
    if form == "html":
        from tdxtrace.report.html import html  # noqa: PLC0415 - slow to import

        return encoded(html(name, parts, numbers))
    from tdxtrace.report.markdown import markdown  # noqa: PLC0415

    return encoded(markdown(name, parts))


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
    figures = [figure for section in sections(findings) for figure in section.figures]
    with atomic_folder(folder, force=force, inputs=inputs) as made:
        for figure in figures:
            drawn = picture(figure.draw(), kind, figure.title, figure.caption)
            (made / f"{figure.name}.{kind}").write_bytes(drawn)
    return len(figures)


def picture(
    chart: alt.Chart | alt.LayerChart, kind: str, title: str = "", caption: str = ""
) -> bytes:
    """Return a chart as PNG or SVG, on white, with its title and caption above it."""
    import vl_convert  # noqa: PLC0415 - slow to import

    from tdxtrace.report.charts.theme import WIDTH, light  # noqa: PLC0415

    spec = chart.to_dict() | {"width": WIDTH}
    spec["config"] = spec["config"] | {"background": light("paper"), "padding": 12}
    if title:
        spec["title"] = {"text": title, "subtitle": textwrap.wrap(caption, _CAPTION)}
    if kind == "png":
        return bytes(vl_convert.vegalite_to_png(spec, scale=_SCALE))
    return str(vl_convert.vegalite_to_svg(spec)).encode()
