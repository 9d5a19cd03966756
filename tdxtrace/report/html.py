"""The report as one self-contained HTML file with text, tables and interactive charts."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.resources import files
from typing import Any, Final

from tdxtrace import __version__
from tdxtrace.report.charts.theme import FONT, MEANINGS, PALETTE, on_page
from tdxtrace.report.section import Section, left_out

_PAGE: Final = files("tdxtrace.report") / "page"
# Names that Altair generates, which end in a counter of the process.
_NUMBERED: Final = re.compile(r'"((?:view|param)_\d+)"')


def html(title: str, sections: list[Section], facts: Sequence[str] = ()) -> str:
    """Return the page; the same sections give the same bytes.

    Text is escaped by the template, data of the charts is JSON without ``<``, ``>`` and ``&``,
    and a Content-Security-Policy allows only the scripts of the page and no network access.

    Args:
        title: Title of the page.
        sections: Sections of the page, in order; those without content are only named.
        facts: Numbers below the title.
    """
    from jinja2 import Environment, StrictUndefined  # noqa: PLC0415 - slow to import
    from markupsafe import Markup  # noqa: PLC0415

    parts = [section for section in sections if section.has_content]
    figures = [figure for section in parts for figure in section.figures]
    with ThreadPoolExecutor(1) as background:
        # Bundling the chart library takes as long as drawing the charts.
        bundle = background.submit(_vega) if figures else None
        specs = [(figure.name, Markup(_json(spec_of(figure.draw())))) for figure in figures]
        vega = bundle.result() if bundle else ""
    script = _read("script.js")
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(
        _read("report.html.j2")
    )
    return (
        template.render(
            title=title,
            facts=facts,
            shown=[section for section in parts if not section.is_detail],
            details=[section for section in parts if section.is_detail],
            left_out=left_out(sections),
            has_problems=any(section.problems for section in parts),
            key=_key(parts, " ".join(spec for _, spec in specs)),
            specs=specs,
            version=__version__,
            policy=_policy(*filter(None, (vega, script))),
            style=Markup(_style()),
            vega=Markup(vega),
            script=Markup(script),
            licenses=_read("licenses.txt"),
        )
        + "\n"
    )


def spec_of(chart: Any) -> dict[str, Any]:  # noqa: ANN401 - any chart of Altair
    """Return a chart's Vega-Lite specification for a page, the same each time.

    Altair numbers views and parameters by process; here they are renumbered by chart.
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


@cache
def _vega() -> str:
    """Return the chart library as a script; bundling it takes seconds."""
    import vl_convert  # noqa: PLC0415 - slow to import

    bundle: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return bundle.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _policy(*scripts: str) -> str:
    """Return a Content-Security-Policy (W3C, level 3); Vega needs unsafe-eval for expressions."""
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
        for text in scripts
    )
    return (
        f"default-src 'none'; script-src {hashes} 'unsafe-eval'; style-src 'unsafe-inline'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


def _key(parts: Sequence[Section], specs: str) -> list[tuple[str, str]]:
    """Return the colours that the page uses, by name, with what they mean."""
    has_verdicts = any(section.name == "verdicts" for section in parts)
    used = {name for name in MEANINGS if f"var(--{name})" in specs}
    used |= {"wrong", "done", "unknown"} if has_verdicts else set()
    return [(name, meaning) for name, meaning in MEANINGS.items() if name in used]


def _style() -> str:
    colours = [
        "".join(f" --{name}: {pair[place]};" for name, pair in PALETTE.items()) for place in (0, 1)
    ]
    key = "\n".join(f".key .{name}::before {{ color: var(--{name}); }}" for name in MEANINGS)
    text = _read("style.css").replace("FONT", FONT).replace("KEY", key)
    return text.replace("LIGHT", colours[0]).replace("DARK", colours[1])


def _read(name: str) -> str:
    return (_PAGE / name).read_text("utf-8")
