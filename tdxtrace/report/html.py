"""The report as one HTML file that needs no network: text, tables, charts that can be asked."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from typing import Any, Final

from tdxtrace import __version__
from tdxtrace.report.charts.theme import FONT, PALETTE, on_page
from tdxtrace.report.sections import Section

_PAGE: Final = files("tdxtrace.report") / "page"
# Names that Altair gives to what has none: a counter of the process at the end.
_NUMBERED: Final = re.compile(r'"((?:view|param)_\d+)"')


def html(title: str, sections: list[Section]) -> str:
    """Return the page; the same sections give the same bytes.

    Text is escaped by the template, data of the charts as JSON in which no tag can begin, and
    a policy in the page lets a browser run these scripts only and load nothing.

    Args:
        title: Of the page.
        sections: What is in it.
    """
    from jinja2 import Environment, StrictUndefined  # noqa: PLC0415 - slow to import
    from markupsafe import Markup  # noqa: PLC0415

    figures = [figure for section in sections for figure in section.figures]
    with ThreadPoolExecutor(1) as apart:
        # The library of the charts takes as long to pack as they take to draw.
        packed = apart.submit(_vega) if figures else None
        specs = [(figure.name, Markup(_json(spec_of(figure.draw())))) for figure in figures]
        vega = packed.result() if packed else ""
    script = _read("script.js")
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(
        _read("report.html.j2")
    )
    return (
        template.render(
            title=title,
            sections=sections,
            specs=specs,
            version=__version__,
            policy=_policy(*filter(None, (vega, script))),
            style=Markup(_style()),
            vega=Markup(vega),
            script=Markup(script),
        )
        + "\n"
    )


def spec_of(chart: Any) -> dict[str, Any]:  # noqa: ANN401 - any chart of Altair
    """Return a chart's specification for a page, the same each time.

    Altair numbers the views and parameters of a process; here they are numbered by chart.
    """
    spec: dict[str, Any] = chart.to_dict()
    text = json.dumps(spec)
    for place, name in enumerate(dict.fromkeys(_NUMBERED.findall(text))):
        text = text.replace(f'"{name}"', f'"{name.partition("_")[0]}_of_chart_{place}"')
    return on_page(json.loads(text))  # type: ignore[no-any-return]


def _json(spec: dict[str, Any]) -> str:
    text = json.dumps(spec, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _vega() -> str:
    import vl_convert  # noqa: PLC0415 - slow to import

    bundle: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return bundle.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _policy(*scripts: str) -> str:
    """A Content-Security-Policy (W3C, level 3): Vega compiles expressions, hence unsafe-eval."""
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
        for text in scripts
    )
    return (
        f"default-src 'none'; script-src {hashes} 'unsafe-eval'; style-src 'unsafe-inline'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


def _style() -> str:
    colours = [
        "".join(f" --{name}: {pair[place]};" for name, pair in PALETTE.items()) for place in (0, 1)
    ]
    text = _read("style.css").replace("FONT", FONT)
    return text.replace("LIGHT", colours[0]).replace("DARK", colours[1])


def _read(name: str) -> str:
    return (_PAGE / name).read_text("utf-8")
