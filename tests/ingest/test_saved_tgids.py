"""Process IDs that ``tdxtrace capture`` saves in a file with a trace.dat."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tdxtrace.ingest.tracedat.reader import read_saved_tgids


def test_processes_of_threads(tmp_path: Path) -> None:
    result = {"tgids": {"7": 5, "8": 5, "9": -1, "0": 3, "99999999": 1, "10": "5"}}
    (tmp_path / "x.dat.capture.json").write_text(json.dumps(result))
    assert read_saved_tgids(str(tmp_path / "x.dat")) == {7: 5, 8: 5}


@pytest.mark.parametrize(
    "text", ["", "nonsense", "[]", "{}", '{"tgids": 3}', '{"tgids": {"a": 1}}']
)
def test_damaged_capture_files_are_ignored(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.dat.capture.json").write_text(text)
    assert read_saved_tgids(str(tmp_path / "x.dat")) == {}


def test_a_missing_capture_file_is_ignored(tmp_path: Path) -> None:
    assert read_saved_tgids(str(tmp_path / "x.dat")) == {}
    assert read_saved_tgids("-") == {}
