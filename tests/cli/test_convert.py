"""``tdxtrace convert`` and ``--cache``, as a user types them."""

from pathlib import Path

import pytest
from support.recordings import SAMPLES
from support.running import answered, refused
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


def test_a_part_is_converted_by_its_time(tmp_path: Path) -> None:
    run, part = tmp_path / "run", tmp_path / "part"
    answered("convert", SAMPLES / "contended.txt", "-o", run, "-q")
    answered("convert", run, "-o", part, "-q", "--since", "+0.01", "--until", "+0.02")
    counted = ("query", "select count(*) from seamcalls", "--format", "csv")
    asked = ("--since", "+0.01", "--until", "+0.02")
    within = answered(counted[0], run, *counted[1:], *asked).text
    assert answered(counted[0], part, *counted[1:]).text == within
    assert within != answered(counted[0], run, *counted[1:]).text
    assert "overwrite the input" in refused(
        1, "convert", run, "-o", run, "--force", "--until", "+1"
    )


@pytest.mark.parametrize(
    "error", [MemoryError(), ImportError("libx.so: failed to map segment from shared object")]
)
def test_memory_that_runs_out_is_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("tdxtrace.ingest.read.read", fail)
    line = refused(1, "events", SAMPLES / "contended.txt")
    assert "not enough memory" in line


def test_memory_must_be_a_size() -> None:
    assert "not a size: 'much'" in refused(
        2, "events", SAMPLES / "contended.txt", "--memory", "much"
    )
