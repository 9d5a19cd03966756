"""Numbering of page levels in a capture."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl
import pytest
from support.story import story
from support.texts import aug, aug_ret, line, read_text

from tdxtrace.ingest.decode.decoder import LevelBaseDetector, normalize_levels


def base(text: str, given: int | None = None, *kernels: str | None) -> tuple[int, str]:
    return concluded(story(text).seamcalls, given, kernels)


def concluded(
    calls: pl.DataFrame, given: int | None, kernels: Sequence[str | None]
) -> tuple[int, str]:
    """What is concluded from batches of one call each."""
    detector = LevelBaseDetector()
    for row in calls.iter_slices(1):
        detector.observe(row)
    return detector.base(given, kernels)


@pytest.mark.parametrize(
    ("text", "expected", "why"),
    [
        ("S1^0 S2^1", 0, "level 0 occurs"),
        ("S512^1 S513^0", 0, "level 0 occurs"),
        # A 4K page called level 1: its address is not that of a 2M page.
        ("S1^1 S2^1", 1, "not aligned"),
        ("S512^1 S513^1", 1, "not aligned"),
        ("removeS512^2", 1, "not aligned"),
        # Aligned to 2M, and to 1G: as a module of 6.16 would say.
        ("S512^1", 0, "assumed"),
        ("S262144^2", 0, "assumed"),
        # SEPT.ADD names the level of the table, its address that of the fault.
        ("septS5^1", 0, "assumed"),
        ("septS5^1 S1^0", 0, "level 0 occurs"),
        ("trackS enterC", 0, "no levels"),
        ("", 0, "no levels"),
    ],
)
def test_the_base_is_detected_from_the_levels(text: str, expected: int, why: str) -> None:
    found, evidence = base(text)
    assert found == expected
    assert why in evidence


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [("6.16.1", 0), ("6.18.44-foo", 0), ("6.19.0", 0), ("7.1.3", 0), ("7.2.0-rc1", 1)],
)
def test_without_decisive_levels_the_kernel_version_determines_the_base(
    kernel: str, expected: int
) -> None:
    found, evidence = base("S512^1", None, kernel)
    assert found == expected
    assert kernel in evidence


def test_two_kernels_that_differ_do_not_determine_the_base() -> None:
    assert base("S512^1", None, "6.16", "7.2")[1].startswith("assumed")
    assert base("S512^1", None, None, "7.2")[0] == 1


def test_levels_take_precedence_over_the_version() -> None:
    assert base("S1^0", None, "7.2")[0] == 0
    assert base("S1^1", None, "6.16")[0] == 1


@pytest.mark.parametrize("given", [0, 1])
def test_the_base_given_by_the_user_takes_precedence(given: int) -> None:
    assert base("S1^0", given, "6.16") == (given, "given by the user")
    assert base("S1^1", given, "7.2") == (given, "given by the user")


def test_levels_are_normalized_to_the_modules_numbering() -> None:
    calls = story("S512^1 S1024^2 septS1^3 trackS").seamcalls
    assert normalize_levels(calls, 1)["level"].to_list() == [0, 1, 2, None]
    assert normalize_levels(calls, 0).equals(calls)


def test_registers_of_the_lower_layer_always_count_as_the_module() -> None:
    calls = story("S512^1 S1024^2").seamcalls
    probe = pl.Series("probe", ["seamcall", "wrapper"], calls.schema["probe"])
    mixed = calls.with_columns(probe)
    assert normalize_levels(mixed, 1)["level"].to_list() == [1, 1]
    assert concluded(mixed.head(1), None, [])[1].startswith("no levels")


def test_a_level_below_the_base_stays() -> None:
    assert normalize_levels(story("S1^0").seamcalls, 1)["level"].to_list() == [0]


def test_the_provenance_says_what_was_concluded() -> None:
    text = aug("1.000001", "td=0x1 gpa=0x80001000 level=1") + aug_ret("1.000002")
    trace = read_text(text)
    assert trace.provenance.level_base == 1
    assert "not aligned" in trace.provenance.level_base_evidence
    assert trace.seamcalls["level"].to_list() == [0]


def test_the_kernel_that_a_header_names_counts() -> None:
    text = aug("1.000001", "td=0x1 gpa=0x80000000 level=1") + aug_ret("1.000002")
    for head, expected in (("7.2.0", 1), ("7.1.0", 0), ("6.18.44", 0)):
        perf = f"# os release : {head}\n# perf version : 6.1\n" + text
        trace = read_text(perf)
        assert trace.provenance.sources[0].kernel == head
        assert trace.provenance.level_base == expected


def test_one_base_holds_for_all_sources() -> None:
    one = line("1.000001", "aug: (0x1) td=0x1 gpa=0x80001000 level=1")
    other = line("1.000001", "aug: (0x1) td=0x1 gpa=0x80200000 level=2")
    trace = read_text(one, other)
    assert trace.seamcalls["level"].to_list() == [0, 1]
