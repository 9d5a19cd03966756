"""Signals end a command that writes without a half-written output or a temporary file."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from support.kills import SIGNALS, end_one, prepared, reference


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The tables of a command that nobody ended, and how long it took."""
    return reference("tables", tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("share", [0.5, 0.8])
def test_a_signal_leaves_nothing_half_written(
    number: signal.Signals, share: float, whole: tuple[Path, float], tmp_path: Path
) -> None:
    """By hand more often, and of all commands that write: python tests/bench/kills.py."""
    out, seconds = whole
    assert end_one("tables", prepared(tmp_path), out, number, share * seconds) in (
        "nothing",
        "whole",
    )
