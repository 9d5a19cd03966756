"""Signals end a command that writes without a half-written output or a temporary file."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest
from support.kills import SIGNALS, end_one, prepared, reference
from support.testbed import program
from support.texts import ONE_CALL


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The tables of a command that nobody ended, and how long it took."""
    return reference("tables", tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_leaves_nothing_half_written(
    number: signal.Signals, whole: tuple[Path, float], tmp_path: Path
) -> None:
    """By hand more often, and of all commands that write: python tests/bench/kills.py."""
    out, seconds = whole
    assert end_one("tables", prepared(tmp_path), out, number, 0.7 * seconds) in (
        "nothing",
        "whole",
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_what_is_being_written_is_removed_when_a_signal_comes(
    number: signal.Signals, tmp_path: Path
) -> None:
    """SIGTERM may come twice, as from timeout(1)."""
    words = program("convert", "-", "-o", tmp_path / "run1")
    with subprocess.Popen(words, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdin is not None
        process.stdin.write(ONE_CALL.encode())
        process.stdin.flush()
        while not list(tmp_path.glob(".tdxtrace-*")):
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(number)
        if number != signal.SIGINT:
            process.send_signal(number)
        assert process.wait(60) == 128 + number
    assert list(tmp_path.iterdir()) == []
