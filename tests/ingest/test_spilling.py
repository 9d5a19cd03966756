"""Recordings larger than memory: tables go to a temporary store while they are read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from polars.testing import assert_frame_equal
from support.recordings import SAMPLES
from support.recordings import read as read_whole

import tdxtrace
from tdxtrace import pipeline
from tdxtrace.errors import InputError
from tdxtrace.ingest.read import ReadOptions, read


@pytest.fixture(autouse=True)
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(("name", "level_base"), [("contended.txt", 1), ("lost.dat.xz", None)])
def test_a_trace_on_disk_is_the_one_in_memory(
    name: str, level_base: int | None, disk: Path
) -> None:
    path = SAMPLES / name
    trace = read([path], ReadOptions(memory=1, level_base=level_base))
    assert len(list(disk.iterdir())) == 1
    whole = tdxtrace.read_trace(path, level_base=level_base)
    assert trace.provenance == whole.provenance
    for table, rows in whole.tables().items():
        assert_frame_equal(getattr(trace, table), rows)
    del trace
    assert not list(disk.iterdir())


def test_an_input_that_cannot_be_read_leaves_nothing(disk: Path) -> None:
    with pytest.raises(InputError, match=r"none\.txt"):
        read([SAMPLES / "contended.txt", disk / "none.txt"], ReadOptions(memory=1))
    assert not list(disk.iterdir())


def test_a_disk_that_would_become_full_is_reported_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result((1, 1, 9, 9, 9, 9, 9, 9, 0, 9)))
    with pytest.raises(InputError, match="is almost full: 0 MiB left, 1 MiB needed next"):
        read([SAMPLES / "contended.txt"], ReadOptions(memory=1))


def test_an_analysis_that_does_not_fit_is_refused_with_advice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trace = read_whole(SAMPLES / "contended.txt")
    monkeypatch.setattr(pipeline, "_UNCHECKED_BYTES", 0)
    with pytest.raises(InputError, match=r"retry_chains of 2,011 SEAMCALLs .* convert TRACE"):
        tdxtrace.analyze(trace, memory=1 << 10)
    found = tdxtrace.analyze(trace, memory=600 << 10)
    with pytest.raises(InputError, match=r"busy_causes of 2,011 SEAMCALLs take about"):
        found.busy_causes.clear()
    assert tdxtrace.analyze(trace).busy_causes.height
