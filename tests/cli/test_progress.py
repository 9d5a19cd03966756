"""Progress messages of commands, on stderr of a terminal only."""

from __future__ import annotations

import io
import sys
import threading
import time

import pytest

from tdxtrace.cli import progress
from tdxtrace.cli.progress import Steps, working

_PATIENCE_S = 60.0


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        """A terminal."""
        return True


def _terminal(monkeypatch: pytest.MonkeyPatch) -> _Terminal:
    """Take the place of stderr: within a test, since pytest sets it anew before each."""
    screen = _Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(progress, "_SHOWN_AFTER_S", 0.01)
    monkeypatch.setenv("TERM", "xterm")
    return screen


def _until_shown(terminal: _Terminal, words: str) -> None:
    """Wait until a line says this; the machine may be busy."""
    end = time.monotonic() + _PATIENCE_S
    while words not in terminal.getvalue():
        assert time.monotonic() < end, terminal.getvalue()
        time.sleep(0.01)


def test_the_innermost_step_that_takes_long_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = _terminal(monkeypatch)
    steps = Steps(quiet=False)
    with steps.step("verdicts", 12_000), steps.step("busy_causes", 12_000):
        _until_shown(terminal, "busy causes of 12,000 events")
    shown = len(terminal.getvalue())
    time.sleep(0.15)
    assert len(terminal.getvalue()) == shown


def test_what_is_quick_or_quiet_or_goes_to_no_terminal_is_not_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = _terminal(monkeypatch)
    with Steps(quiet=True).step("verdicts", 1):
        time.sleep(0.05)
    monkeypatch.setattr(progress, "_SHOWN_AFTER_S", 5)
    with Steps(quiet=False).step("verdicts", 1):
        pass
    monkeypatch.setattr(progress, "_SHOWN_AFTER_S", 0.01)
    monkeypatch.setattr(terminal, "isatty", lambda: False)
    with Steps(quiet=False).step("verdicts", 1):
        time.sleep(0.05)
    assert not terminal.getvalue()


def test_tasks_of_two_threads_are_one_line_that_goes_away_with_the_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = _terminal(monkeypatch)
    first, second = Steps(quiet=False), Steps(quiet=False)

    def other() -> None:
        with second.step("policies", 2):
            _until_shown(terminal, "policies of 2 events")

    thread = threading.Thread(target=other)
    with first.step("time_shares", 1):
        thread.start()
        time.sleep(0.05)
    thread.join()
    assert "policies of 2 events" in terminal.getvalue()
    shown = len(terminal.getvalue())
    time.sleep(0.15)
    assert len(terminal.getvalue()) == shown


def test_a_command_says_what_it_is_doing(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = _terminal(monkeypatch)
    doing = ["simulated 1 of 9 ms"]
    with working(False, lambda: doing[-1]):
        _until_shown(terminal, "simulated 1 of 9 ms")
        doing.append("wrote 3.0 MB")
        _until_shown(terminal, "wrote 3.0 MB")


def test_a_step_that_fails_ends_the_display(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = _terminal(monkeypatch)
    steps = Steps(quiet=False)
    with pytest.raises(ValueError, match="no"), steps.step("verdicts", 1):
        raise ValueError("no")
    with steps.step("limits", 1):
        _until_shown(terminal, "limits of 1 events")
