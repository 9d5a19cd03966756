"""Releases of the module, against Intel's release pages and lines that kernels print."""

from __future__ import annotations

import polars as pl
import pytest

from tdxtrace.tdx.facts import facts
from tdxtrace.tdx.releases import (
    generation_of,
    generations_of_series,
    named_by_build,
    same_release,
)


@pytest.mark.parametrize(
    ("version", "generation"),
    [
        ("1.0.03", "A"),
        ("1.0.01.01", "A"),
        ("1.5.01", "B"),
        ("1.5.05.46.698", "B"),
        ("1.5.16", "B"),
        ("1.5.17", None),
        ("1.5.20", "C"),
        ("TDX_1.5.34", "C"),
        ("1.5.35", None),
        ("1.5.36", None),
        ("1.5", None),
        ("1.5 build 700", None),
        ("1.0 build 457", "A"),
        ("2.0.01", None),
        ("2.0.02", "B"),
        ("2.0.04", "B"),
        ("2.0.08", "B"),
        ("2.0.10", None),
        ("2.0.12", "C"),
        ("2.0.18", "C"),
        ("2.5.01", None),
        ("11.0", None),
        ("unknown", None),
        ("", None),
    ],
)
def test_releases_belong_to_a_generation_or_to_none(version: str, generation: str | None) -> None:
    assert generation_of(version) == generation


@pytest.mark.parametrize(
    ("build", "date", "release", "generation"),
    [
        (595, "20231008", "1.5.01", "B"),
        (698, "20240129", "1.5.05", "B"),
        (744, "20240407", "1.5.06", "B"),
        (869, "20250221", "1.5.16", "B"),
        (920, "20250531", "1.5.20", "C"),
        (989, "20251126", "1.5.28", "C"),
        (698, None, "1.5.05", "B"),
    ],
)
def test_a_published_build_is_a_release(
    build: int, date: str | None, release: str, generation: str
) -> None:
    assert named_by_build(1, 5, date, build) == release
    assert generation_of(release) == generation


@pytest.mark.parametrize(
    ("build", "date", "release", "generation"),
    [
        (786, "20240814", "2.0.02", "B"),
        (859, "20250116", "2.0.04", "B"),
        (924, "20250605", "2.0.12", "C"),
        (947, "20250425", "2.0.14", "C"),  # its page has another date, by mistake
        (947, "20260425", "2.0.14", "C"),
    ],
)
def test_builds_of_both_series_are_counted_together(
    build: int, date: str, release: str, generation: str
) -> None:
    assert named_by_build(2, 0, date, build) == release
    assert generation_of(release) == generation
    assert named_by_build(1, 5, date, build) == f"1.5 build {build}"


@pytest.mark.parametrize(
    ("date", "build", "named"),
    [
        ("20230323", 481, "1.5 build 481"),  # before the first release
        ("20240301", 700, "1.5 build 700"),  # between two releases, of a branch that nobody knows
        ("20240130", 698, "1.5 build 698"),  # of another day than the release of that number
        (None, None, "1.5"),
    ],
)
def test_a_build_that_is_not_published_is_no_release(
    date: str | None, build: int | None, named: str
) -> None:
    """The nearest release is not taken for it: it may have other locks."""
    assert named_by_build(1, 5, date, build) == named
    assert generation_of(named) is None


@pytest.mark.parametrize(
    ("names", "release"),
    [
        (["1.5.06"], "1.5.06"),
        (["1.5.06", "1.5.06.00"], "1.5.06.00"),
        (["1.5.05.46.698", "1.5.05"], "1.5.05.46.698"),
        (["1.5.06", "1.5.08"], None),
        (["1.5.06", "1.5"], None),
        (["1.5.06", "1.5.060"], None),
        (["1.5 build 700"], "1.5 build 700"),
        (["1.5 build 700", "1.5 build 701"], None),
        ([], None),
    ],
)
def test_names_of_one_release(names: list[str], release: str | None) -> None:
    assert same_release(names) == release
    assert same_release(reversed(names)) == release


@pytest.mark.parametrize(
    ("version", "left"),
    [
        ("1.5", ("B", "C")),
        ("1.5 build 481", ("B", "C")),
        ("1.0", ("A",)),
        ("2.0.10", ("B", "C")),
        ("2.5.01", ()),
        ("", ()),
    ],
)
def test_a_series_leaves_generations_open(version: str, left: tuple[str, ...]) -> None:
    assert generations_of_series(version) == left


def test_every_published_build_has_a_generation() -> None:
    builds = facts("builds", build_num=pl.UInt32)
    assert builds["build_num"].is_unique().all()
    assert builds["version"].is_unique().all()
    assert {generation_of(version) for version in builds["version"]} == {"B", "C"}
    for number, version in builds.select("build_num", "version").iter_rows():
        major, minor, _ = version.split(".")
        assert named_by_build(major, minor, None, number) == version
