"""``tdxtrace convert`` and ``--cache``, as a user types them."""

from pathlib import Path

import pytest
from support.recordings import SAMPLES
from typer.testing import CliRunner

from tdxtrace.cli.main import app

TRACE = str(SAMPLES / "lost.dat.xz")


def _printed(*words: str) -> str:
    result = CliRunner().invoke(app, list(words), catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


@pytest.mark.parametrize(
    "command",
    [["analyze"], ["events", "--format", "csv"], ["retry-chains"], ["zero-steps"]],
    ids=lambda words: words[0],
)
def test_every_command_takes_the_folder_in_place_of_the_trace(
    command: list[str], tmp_path: Path
) -> None:
    folder = str(tmp_path / "run")
    _printed("convert", TRACE, "-o", folder, "--quiet")
    # Advice names the trace as it was given: the folder is said in its place.
    assert _printed(*command, folder).replace(folder, TRACE) == _printed(*command, TRACE)


def test_the_cache_is_filled_once_and_used_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = _printed("events", TRACE, "--format", "csv", "--cache")
    (folder,) = (tmp_path / "tdxtrace").iterdir()
    assert (folder / "provenance.json").is_file()
    made = folder.stat().st_mtime_ns
    assert _printed("events", TRACE, "--format", "csv", "--cache") == first
    assert folder.stat().st_mtime_ns == made


def test_nothing_is_cached_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    _printed("events", TRACE, "--format", "csv")
    assert not list(tmp_path.iterdir())
