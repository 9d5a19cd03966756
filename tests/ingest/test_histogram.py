"""Reading of histograms: output of the script, and damage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdxtrace.errors import TdxtraceError
from tdxtrace.ingest.histogram import Histogram, is_histogram, read_histogram
from tdxtrace.tables.histograms import REQUEST_COUNTS

HEAD = ("printf", "tdxtrace histogram 1 6.18.2 1000\n")


def written(path: Path, *lines: tuple[str, object]) -> Path:
    path.write_text("".join(json.dumps({"type": k, "data": d}) + "\n" for k, d in lines))
    return path


def read(path: Path, *lines: tuple[str, object]) -> Histogram:
    found = read_histogram(written(path / "counts.json", *lines))
    REQUEST_COUNTS.check(found.requests)
    return found


def test_counts_of_an_interval_are_the_difference_of_two_prints(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        HEAD,
        ("printf", "at 2000\n"),
        ("map", {"@requests": {"7,6,0,1": 10, "7,6,0,2": 1}}),
        ("printf", "end 3500\n"),
        ("map", {"@requests": {"7,6,0,1": 15, "7,6,0,2": 1, "7,6,1,65": 2}, "@done": {"7,6": 20}}),
        ("map", {"@open": {"9,6,1,4096,0": [70, 3000, 3100, 4, 7]}}),
    )
    columns = ("interval", "start_ns", "end_ns", "outcome", "n_attempts", "n_requests")
    assert found.requests.select(columns).rows() == [
        (1, 1000, 2000, "succeeded", 1, 10),
        (1, 1000, 2000, "succeeded", 2, 1),
        (2, 2000, 3500, "succeeded", 1, 5),
        (2, 2000, 3500, "failed", 65, 2),
        (2, 2000, 3500, "open", 65, 1),
    ]
    assert (found.kernel, found.is_whole, found.n_not_kept) == ("6.18.2", True, 2)


def test_a_count_that_was_broken_off_is_not_whole(tmp_path: Path) -> None:
    found = read(tmp_path, HEAD, ("printf", "at 2000\n"), ("map", {"@requests": {"7,6,0,1": 3}}))
    assert not found.is_whole
    assert found.requests["n_requests"].to_list() == [3]


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        ((), "empty"),
        ((("map", {"@requests": {}}),), "not the start of a tdxtrace histogram"),
        ((("printf", "hello\n"),), "not a tdxtrace histogram"),
        ((("printf", "tdxtrace histogram 9 6.18 1\n"),), "version 9"),
        ((HEAD, ("map", {"@requests": {"7,6,0": 1}})), "not a key of 4 numbers"),
        ((HEAD, ("map", {"@requests": {"7,6,0,x": 1}})), "not a key"),
        ((HEAD, ("map", {"@requests": {"7,6,0,1": -1}})), "not a count"),
        ((HEAD, ("map", {"@requests": {"7,6,9,1": 1}})), "unknown outcome"),
        ((HEAD, ("map", {"@requests": [1]})), "not a map"),
        ((HEAD, ("map", {"@open": {"9,6,1,4096,0": [1]}})), "five numbers"),
    ],
)
def test_what_is_no_histogram_is_one_line(
    lines: tuple[tuple[str, object], ...], why: str, tmp_path: Path
) -> None:
    with pytest.raises(TdxtraceError, match=why) as error:
        read(tmp_path, *lines)
    assert "\n" not in str(error.value)


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = written(tmp_path / "counts.json", HEAD)
    path.write_text(path.read_text() + '{"type": "map", "data": {"@req')
    with pytest.raises(TdxtraceError, match="line 2: damaged"):
        read_histogram(path)


def test_a_histogram_is_detected_by_its_first_line(tmp_path: Path) -> None:
    path = written(tmp_path / "counts.json", HEAD)
    assert is_histogram(path)
    assert not is_histogram(tmp_path)
    assert not is_histogram(tmp_path / "none")
    path.write_text(" CPU 0/KVM-7 [001] 1.0: kvm_entry: vcpu 5\n")
    assert not is_histogram(path)


@given(data=st.binary(max_size=200), headed=st.booleans())
def test_any_bytes_are_a_histogram_or_one_clear_line(
    data: bytes, headed: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    head = (json.dumps({"type": HEAD[0], "data": HEAD[1]}) + "\n").encode() if headed else b""
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_bytes(head + data)
    try:
        read_histogram(path)
        said = ""
    except TdxtraceError as error:
        said = str(error)
    assert "\n" not in said
