"""Histograms that were counted in the kernel, as inputs of a fleet."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest
from support.fleet import facts_at, mapped
from support.running import SAMPLES, answered, tdxtrace

from tdxtrace.fleet.counted import fleet_counted
from tdxtrace.fleet.limits import fleet_limits
from tdxtrace.ingest.histogram import read_histogram
from tdxtrace.recommend.counted import counted_attempts

AUG = 6


def histogram(path: Path, *prints: dict[str, int], cannot: int = 0) -> Path:
    """Write a histogram; each print has the counts of requests up to its time."""
    lines: list[tuple[str, object]] = [("printf", "tdxtrace histogram 1 6.18.2 1000\n")]
    for number, requests in enumerate(prints, 1):
        lines.append(("printf", f"at {number * 10**9}\n"))
        lines.append(("map", {"@requests": requests}))
    if cannot:
        lines.append(("map", {"@cannot": {"6,1": cannot}}))
    lines.append(("printf", f"end {len(prints) * 10**9 + 1000}\n"))
    path.write_text("".join(json.dumps({"type": k, "data": d}) + "\n" for k, d in lines))
    return path


@pytest.fixture
def histograms(tmp_path: Path) -> list[Path]:
    """Two hosts: 100 of 1,000 requests retried, and 300 of 1,000, in two prints."""
    return [
        histogram(tmp_path / "a.json", {"7,6,0,1": 900, "7,6,0,3": 100}, cannot=4),
        histogram(
            tmp_path / "b.json",
            {"7,6,0,1": 300, "8,6,0,2": 100},
            {"7,6,0,1": 700, "8,6,0,2": 200, "8,6,0,65": 60, "8,6,3,2": 40},
        ),
    ]


def test_counts_of_hosts_are_those_of_all_their_histograms(
    histograms: list[Path], tmp_path: Path
) -> None:
    assert mapped(tmp_path / "facts", *histograms).n_done == 2
    facts = facts_at(tmp_path / "facts")
    rows = fleet_counted(facts.table_with_hosts("requests"))
    together = pl.concat(read_histogram(path).requests for path in histograms)
    names = ["leaf", "max_attempts", "n_requests", "n_exceeding", "n_unknown", "exceeding"]
    assert rows.select(names).equals(counted_attempts(together).select(names))
    assert rows["n_hosts"].unique().to_list() == [2]
    assert facts.parts.select("host", "kernel", "format", "n_losses").rows() == [
        ("a", "6.18.2", "histogram", 4),
        ("b", "6.18.2", "histogram", 0),
    ]


def test_hosts_that_differ_make_the_interval_wider(histograms: list[Path], tmp_path: Path) -> None:
    mapped(tmp_path / "facts", *histograms)
    (first,) = (
        fleet_counted(facts_at(tmp_path / "facts").table_with_hosts("requests"))
        .filter(max_attempts=1)
        .rows(named=True)
    )
    assert (first["n_requests"], first["n_exceeding"]) == (2000, 400)
    together = pl.concat(read_histogram(path).requests for path in histograms)
    independent = counted_attempts(together).filter(max_attempts=1)["exceeding_high"][0]
    assert independent < 0.22
    assert first["exceeding_high"] > 0.5


def test_hosts_that_are_alike_need_no_wide_interval(tmp_path: Path) -> None:
    paths = [
        histogram(tmp_path / f"h{n}.json", {f"{n},6,0,1": 900, f"{n},6,0,2": 100})
        for n in range(20)
    ]
    mapped(tmp_path / "facts", *paths)
    rows = fleet_counted(facts_at(tmp_path / "facts").table_with_hosts("requests"))
    assert rows["n_exceeding"].to_list() == [2000, 0]
    assert 0.1 < rows["exceeding_high"][0] < 0.105
    assert rows["exceeding_high"][1] == pytest.approx(3 / 20_000, rel=0.01)


def test_one_host_says_nothing_about_others(histograms: list[Path], tmp_path: Path) -> None:
    mapped(tmp_path / "facts", histograms[0])
    rows = fleet_counted(facts_at(tmp_path / "facts").table_with_hosts("requests"))
    assert rows["exceeding_high"].null_count() == rows.height > 0
    text = answered("fleet", "limits", tmp_path / "facts").text
    assert text.startswith("TDH.MEM.PAGE.AUG: no limit: 1,000 requests of one host, which say")


def test_recordings_are_not_mixed_with_histograms(histograms: list[Path], tmp_path: Path) -> None:
    trace = SAMPLES / "tracecmd-v7.dat"
    mapped(tmp_path / "alone", trace)
    mapped(tmp_path / "facts", trace, *histograms)
    alone, facts = facts_at(tmp_path / "alone"), facts_at(tmp_path / "facts")
    assert fleet_limits(facts).equals(fleet_limits(alone))
    done = tdxtrace("fleet", "limits", tmp_path / "facts", "--target", "0.1")
    assert done.status == 0
    assert "2 histograms are left out; for these, --where \"format = 'histogram'\"" in done.stderr
    chosen = ("--where", "format = 'histogram'", "--target", "0.9", "--format", "json")
    rows = json.loads(answered("fleet", "limits", tmp_path / "facts", *chosen).text)
    assert {(row["leaf"], row["n_hosts"]) for row in rows} == {(AUG, 2)}


def test_facts_without_the_table_of_histograms_are_read(tmp_path: Path) -> None:
    mapped(tmp_path / "facts", SAMPLES / "tracecmd-v7.dat")
    (mark,) = (tmp_path / "facts").rglob("provenance.json")
    words = json.loads(mark.read_text())
    del words["rows"]["requests"]
    mark.write_text(json.dumps(words))
    (mark.parent / "requests.parquet").unlink()
    facts = facts_at(tmp_path / "facts")
    assert facts.table("requests").is_empty()
    assert not fleet_limits(facts).is_empty()


def test_a_report_has_the_requests_of_histograms(histograms: list[Path], tmp_path: Path) -> None:
    mapped(tmp_path / "facts", *histograms)
    text = answered("fleet", "report", tmp_path / "facts").text
    assert "## Requests counted in the kernel" in text
    assert "| MEM.PAGE.AUG |     1 |     2 |    2,000 |         400 |" in text
    assert "no limits: no recording has requests" in text


def test_what_needs_recordings_is_refused(histograms: list[Path], tmp_path: Path) -> None:
    facts = tmp_path / "facts"
    mapped(facts, *histograms)
    for words in (
        ("limits", facts, "--by", "host"),
        ("limits", facts, "--hosts"),
        ("compare", facts, "--before", "host = 'a'", "--after", "host = 'b'"),
    ):
        done = tdxtrace("fleet", *words)
        assert done.status == 2
        assert "histograms" in done.stderr
        assert done.stderr.count("\n") == 1


def test_the_confidence_is_that_of_the_command(tmp_path: Path) -> None:
    counts = [{"7,6,0,1": 900 + n, "7,6,0,2": 100 - n} for n in range(5)]
    paths = [histogram(tmp_path / f"h{n}.json", one) for n, one in enumerate(counts)]
    mapped(tmp_path / "facts", *paths)
    requests = facts_at(tmp_path / "facts").table_with_hosts("requests")
    low, high = (fleet_counted(requests, c)["exceeding_high"][0] for c in (0.9, 0.99))
    assert low < high
    text = answered("fleet", "limits", tmp_path / "facts", "--confidence", "0.9").text
    assert text.splitlines()[-1].startswith("90 % one-sided, with hosts as clusters")
