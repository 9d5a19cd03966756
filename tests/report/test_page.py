"""The report in a browser: charts are drawn without errors, untrusted names are not executed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.browser import CHROMIUM, Page, browser
from support.hostile import hostile
from support.running import SAMPLES

from tdxtrace.ingest.read import read_trace
from tdxtrace.pipeline import analyze
from tdxtrace.report.render import report
from tdxtrace.tables.trace import Trace

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt install chromium")


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("profile")) as shown:
        yield shown


@pytest.fixture
def page(window: Page) -> Page:
    window.complaints.clear()
    window.requests.clear()
    return window


def written(trace: Trace, folder: Path) -> Path:
    path = folder / "report.html"
    path.write_bytes(report(analyze(trace), "html"))
    return path


@pytest.mark.parametrize("name", ["zerostep.txt", "lost.txt.xz"])
def test_every_chart_is_drawn_without_errors(name: str, page: Page, tmp_path: Path) -> None:
    path = written(read_trace(SAMPLES / name), tmp_path)
    for width, scheme in ((1280, "light"), (400, "dark")):
        page.look(width, scheme)
        page.open(path)
        assert page.ask("document.documentElement.dataset.failed") is None
        drawn = page.ask("document.querySelectorAll('.chart svg').length")
        assert drawn == page.ask("document.querySelectorAll('.chart').length")
        marks = "[...document.querySelectorAll('.chart')].every(c => c.querySelector('.mark-group "
        assert page.ask(marks + "path[fill], .mark-group path[stroke]') !== null)") is True
        # Nothing is wider than the page, except tables that scroll.
        assert page.ask("document.documentElement.scrollWidth") == width
    assert page.complaints == []
    assert set(page.requests) <= {path.as_uri(), "data:,"}


def test_tables_that_end_in_sentences_are_lists_on_a_narrow_page(
    page: Page, tmp_path: Path
) -> None:
    path = written(read_trace(SAMPLES / "contended.txt"), tmp_path)
    tables = "[...document.querySelectorAll('table.sentences')]"
    for width, shown in ((400, "block"), (1280, "table-row")):
        page.look(width)
        page.open(path)
        names = page.ask(f"{tables}.map(t => t.closest('section').id).join()")
        assert {"verdicts", "limits"} <= set(str(names).split(","))
        page.ask("document.querySelectorAll('details').forEach(d => { d.open = true; })")
        assert (
            page.ask(f"{tables}.every(t => t.scrollWidth <= t.parentElement.clientWidth)") is True
        )
        rows = "document.querySelector('#verdicts tbody tr')"
        assert page.ask(f"getComputedStyle({rows}).display") == shown
    assert page.ask("document.querySelector('#verdicts td:nth-child(3)').dataset.title") == (
        "findings"
    )


def test_charts_change_colours_with_the_page(page: Page, tmp_path: Path) -> None:
    path = written(read_trace(SAMPLES / "zerostep.txt"), tmp_path)
    seen = []
    for scheme in ("light", "dark"):
        page.look(800, scheme)
        page.open(path)
        seen.append(
            page.ask("getComputedStyle(document.querySelector('.role-axis-label text')).fill")
        )
    page.ask("document.getElementById('theme').click()")
    seen.append(page.ask("getComputedStyle(document.querySelector('.role-axis-label text')).fill"))
    assert seen == ["rgb(27, 31, 36)", "rgb(230, 233, 237)", "rgb(27, 31, 36)"]


def test_untrusted_names_are_not_executed(page: Page, tmp_path: Path) -> None:
    page.look(1280)
    page.open(written(hostile(), tmp_path))
    assert page.complaints == []
    assert page.ask("document.querySelectorAll('script').length") == page.ask(
        "document.querySelectorAll('.chart').length + 2"
    )
    assert page.ask("document.querySelectorAll('img, main script, main style').length") == 0
    text = page.ask("document.querySelector('#retry_chains').innerText")
    assert isinstance(text, str)
    assert "<script>alert(1)</scrip" in text


def test_tooltips_show_names_as_text(page: Page, tmp_path: Path) -> None:
    page.look(1280)
    page.open(written(hostile(), tmp_path))
    mark = "document.querySelector('#chart-timeline .mark-rect path')"
    for event in ("pointerover", "pointermove", "mouseover", "mousemove"):
        page.ask(f"{mark}.dispatchEvent(new MouseEvent('{event}', {{bubbles: true}}))")
    tip = "document.querySelector('#vg-tooltip-element')"
    assert "<script>alert(1)</scrip" in str(page.ask(f"{tip}.innerText"))
    assert page.ask(f"{tip}.querySelectorAll(':not(table, tbody, tr, td)').length") == 0
    assert page.complaints == []


def test_an_empty_trace_has_a_page(page: Page, tmp_path: Path) -> None:
    from support.story import story

    page.look(400)
    page.open(written(story("").trace, tmp_path))
    assert page.complaints == []
    assert page.ask("document.querySelectorAll('.chart').length") == 0
    assert "No SEAMCALL was captured" in str(page.ask("document.body.innerText"))
