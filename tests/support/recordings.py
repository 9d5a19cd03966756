"""Sample recordings, and the comparison of a binary recording with its text."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import polars as pl
import pytest
from polars.testing import assert_frame_equal

import tdxtrace

ROOT = Path(tdxtrace.__file__).parent.parent
SAMPLES = ROOT / "sample_traces"
SHARED = ROOT.parent / "shared" / "captures"

# Columns that count lines in text and records in binary files.
_PLACES = ("seq", "line_no", "n_lines")
_TIMES = ("start_ns", "end_ns", "ts_ns")


def shared(name: str) -> Path:
    """Path of a capture outside the repository; skips the test if it is missing."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"no {path}: captures that are not part of the repository")
    return path


@cache
def read(path: Path) -> tdxtrace.Trace:
    """Read a recording and check every table; cached for all tests."""
    trace = tdxtrace.read_trace(path)
    trace.check()
    return trace


def assert_same_events(
    binary: tdxtrace.Trace,
    text: tdxtrace.Trace,
    printed: Callable[[pl.Expr], pl.Expr],
    only_binary: tuple[str, ...] = (),
) -> None:
    """Compare the event tables of a recording with those of its text.

    Args:
        binary: Trace read from the recording.
        text: Trace read from the text that trace-cmd or perf printed.
        printed: How that tool rounds a time in ns.
        only_binary: Columns that the text does not contain.
    """
    for name, frame in binary.tables().items():
        if name == "losses":
            continue
        other = getattr(text, name).drop(_PLACES, strict=False)
        from_binary = frame.drop(_PLACES, strict=False)
        times = [column for column in _TIMES if column in from_binary.columns]
        from_binary = from_binary.with_columns(printed(pl.col(column)) for column in times)
        gone = [column for column in only_binary if column in from_binary.columns]
        assert all(other[column].is_null().all() for column in gone), f"{name}: {gone} is printed"
        assert_frame_equal(from_binary.drop(gone), other.drop(gone))


def as_ns(time: pl.Expr) -> pl.Expr:
    """Times as printed in nanoseconds."""
    return time


def rounded_to_us(time: pl.Expr) -> pl.Expr:
    """Times as printed by trace-cmd and the kernel: to the nearest microsecond."""
    return (time + 500) // 1000 * 1000


def cut_to_us(time: pl.Expr) -> pl.Expr:
    """Times as printed by perf: truncated to microseconds."""
    return time // 1000 * 1000
