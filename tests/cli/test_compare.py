"""``tdxtrace compare``."""

from __future__ import annotations

import json
from pathlib import Path

from support.contracts import breaches
from support.running import SAMPLES, answered, refused, tdxtrace

from tdxtrace.tables.limits import COMPARISONS

BEFORE, AFTER = SAMPLES / "contended.txt", SAMPLES / "lost.txt.xz"


def test_the_answer_comes_first() -> None:
    text = answered("compare", BEFORE, AFTER).text
    assert "- Before: 2,011 SEAMCALLs served 503 requests; retried: 129 (26 %)." in text
    assert "- Retried less often than before: VP.ENTER." in text
    assert "fewer than before" in text
    assert "## Data quality after" in text
    assert max(map(len, text.splitlines())) <= 96


def test_a_trace_is_as_it_was() -> None:
    text = answered("compare", BEFORE, BEFORE).text
    assert "No leaf is retried significantly more or less often than before" in text
    assert "0 of 49 differences," in text


def test_it_is_written_as_a_report(tmp_path: Path) -> None:
    path = tmp_path / "c.html"
    assert tdxtrace("compare", BEFORE, AFTER, "-o", path).status == 0
    assert 'id="chart-comparisons"' in path.read_text()
    assert "exists" in refused(1, "compare", BEFORE, AFTER, "-o", path)
    rows = json.loads(answered("compare", BEFORE, AFTER, "--format", "json").text)
    assert breaches(COMPARISONS, rows) == []
    assert "no such trace" in refused(1, "compare", BEFORE, "nothing")
