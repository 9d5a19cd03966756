"""The report in a browser: charts are drawn without errors, untrusted names are not executed."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from functools import cache
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


HOSTILE = "hostile"


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("profile")) as shown:
        yield shown


@pytest.fixture
def page(window: Page) -> Page:
    window.complaints.clear()
    window.requests.clear()
    return window


def written(trace: Trace | str, folder: Path) -> Path:
    """The report on a trace, or on a sample, in a file."""
    path = folder / "report.html"
    made = of_sample(trace) if isinstance(trace, str) else report(analyze(trace), "html")
    path.write_bytes(made)
    return path


@cache
def of_sample(name: str) -> bytes:
    """The report on a sample, or on a trace with odd names."""
    trace = hostile() if name == HOSTILE else read_trace(SAMPLES / name)
    return report(analyze(trace), "html")


@pytest.mark.parametrize("name", ["zerostep.txt", "lost.txt.xz"])
def test_every_chart_is_drawn_without_errors(name: str, page: Page, tmp_path: Path) -> None:
    path = written(name, tmp_path)
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
    path = written("contended.txt", tmp_path)
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
    path = written("zerostep.txt", tmp_path)
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
    page.open(written(HOSTILE, tmp_path))
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
    page.open(written(HOSTILE, tmp_path))
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


_LEAVES = "document.querySelector('#leaf_stats table')"


def test_a_click_on_a_heading_sorts_numbers_as_numbers(page: Page, tmp_path: Path) -> None:
    page.look(1280)
    page.open(written("contended.txt", tmp_path))
    column = page.ask(
        f"[...{_LEAVES}.tHead.rows[0].cells].findIndex(h => h.textContent === 'requests')"
    )
    numbers = (
        f"[...{_LEAVES}.tBodies[0].rows].map(r => "
        f"Number(r.cells[{column}].textContent.replace(',', ''))).join()"
    )
    heading = f"{_LEAVES}.tHead.rows[0].cells[{column}]"
    shown = [int(n) for n in str(page.ask(numbers)).split(",")]
    for fall in (True, False):
        page.ask(f"{heading}.querySelector('button').click()")
        sorted_ = [int(n) for n in str(page.ask(numbers)).split(",")]
        assert sorted_ == sorted(shown, reverse=fall)
        assert page.ask(f"{heading}.getAttribute('aria-sort')") == (
            "descending" if fall else "ascending"
        )


def test_words_filter_the_rows_of_a_table(page: Page, tmp_path: Path) -> None:
    page.look(1280)
    page.open(written("contended.txt", tmp_path))
    table = "document.querySelector('#retry_chains table')"
    field = f"{table}.closest('.table').querySelector('input')"
    rows = f"[...{table}.tBodies[0].rows].filter(r => r.offsetParent !== null)"
    n = page.ask(f"{rows}.length")
    assert isinstance(n, int)
    page.ask(f"{field}.value = 'abandoned aug'; {field}.dispatchEvent(new Event('input'))")
    texts = str(page.ask(f"{rows}.map(r => r.textContent.toLowerCase()).join('\\n')")).splitlines()
    assert 0 < len(texts) < n
    assert all("abandoned" in text and "aug" in text for text in texts)
    page.ask(f"{field}.value = 'no such row'; {field}.dispatchEvent(new Event('input'))")
    assert page.ask(f"{rows}.length") == 0
    page.ask(f"{field}.value = ''; {field}.dispatchEvent(new Event('input'))")
    assert page.ask(f"{rows}.length") == n
    # A table of names and values has neither.
    values = "document.querySelector('#provenance .table')"
    assert page.ask(f"{values}.querySelectorAll('input, button').length") == 0


@pytest.mark.parametrize("name", ["contended.txt", "zerostep.txt"])
def test_no_printed_page_is_empty(name: str, page: Page, tmp_path: Path) -> None:
    page.look(1280)
    page.open(written(name, tmp_path))
    page.pdf(tmp_path / "report.pdf")
    sizes = page_sizes((tmp_path / "report.pdf").read_bytes())
    assert len(sizes) > 3
    # A line or two alone have fewer.
    assert min(sizes) > 50, sizes
    assert page.complaints == []


@pytest.mark.parametrize("name", ["zerostep.txt", "contended.txt"])
def test_every_mark_of_every_chart_is_printed(name: str, page: Page, tmp_path: Path) -> None:
    """Vega names groups in its drawings: no rule of the page for print may hide one of them."""
    page.look(1280, media="print")
    page.open(written(name, tmp_path))
    groups = "[...document.querySelectorAll('figure svg [class*=role-mark]')]"
    assert page.ask(f"{groups}.length > 10")
    assert page.ask(f"{groups}.filter(g => getComputedStyle(g).display === 'none').length") == 0


def page_sizes(pdf: bytes) -> list[int]:
    """Number of operators that show text, in each page of a PDF of Chromium."""
    objects = {
        int(number): body
        for number, body in re.findall(rb"(?s)(?:^|\n)(\d+) 0 obj\n(.*?)\nendobj", pdf)
    }
    sizes = []
    for body in objects.values():
        if not re.search(rb"/Type\s*/Page\b(?!s)", body):
            continue
        (reference,) = re.findall(rb"/Contents (\d+) 0 R", body)
        _, _, stream = objects[int(reference)].partition(b"stream\n")
        content = zlib.decompress(stream.removesuffix(b"\nendstream"))
        sizes.append(len(re.findall(rb"\bT[jJ]\b", content)))
    return sizes
