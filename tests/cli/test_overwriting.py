"""Nothing is removed before its replacement is complete, and no command overwrites its input."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.running import SAMPLES, answered, refused, tdxtrace

from tdxtrace.ingest.read import read_trace
from tdxtrace.report import render
from tdxtrace.simulate import scenario

_TEXT = "".join((SAMPLES / "contended.txt").read_text().splitlines(keepends=True)[:500])
_SCENARIO = scenario.named("quiet").with_(duration_ms=1).to_toml()
_LOG = "[    1.000000] Linux version 6.18.0\n"
_POLICY = "[policy.mine]\ncalls = 3\n"

Spelling = Callable[[Path, Path], Path]


@pytest.fixture(scope="module")
def converted(chains: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted trace, to be copied."""
    folder = tmp_path_factory.mktemp("converted") / "run1"
    answered("convert", chains, "-o", folder, "--quiet")
    return folder


@pytest.fixture
def store(converted: Path, tmp_path: Path) -> Path:
    """A converted trace of the test's own."""
    return shutil.copytree(converted, tmp_path / "run1")


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """A trace of the user's own."""
    path = tmp_path / "trace.txt"
    path.write_text(_TEXT)
    return path


def _contents(folder: Path) -> dict[str, bytes]:
    """Every file in a folder, hidden ones as well."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _by_link(path: Path, folder: Path) -> Path:
    link = folder / "link"
    link.symlink_to(path)
    return link


def _by_hard_link(path: Path, folder: Path) -> Path:
    link = folder / "hard"
    link.hardlink_to(path)
    return link


def _by_linked_folder(path: Path, folder: Path) -> Path:
    (folder / "elsewhere").symlink_to(path.parent)
    return folder / "elsewhere" / path.name


def _relative(path: Path, folder: Path) -> Path:
    del folder
    return Path(os.path.relpath(path))


def _roundabout(path: Path, folder: Path) -> Path:
    (folder / "sub").mkdir()
    return folder / "sub" / ".." / path.name


_SPELLINGS = [_relative, _roundabout, _by_link, _by_linked_folder, _by_hard_link]
_EVENTS = ("events", "{read}", "--format", "csv", "-o", "{written}")


@pytest.mark.parametrize(
    "words",
    [
        ("convert", "{run}", "-o", "{run}", "--force"),
        ("convert", "{run}/", "-o", "{run}/.", "--force"),
        ("convert", "{run}/seamcalls.parquet", "-o", "{run}", "--force"),
        ("convert", "no-such-trace.dat", "-o", "{run}", "--force"),
        ("convert", "{trace}", "--dmesg", "no-such-log", "-o", "{run}", "--force"),
        ("convert", "{trace}", "--formats", "{run}", "-o", "{run}", "--force"),
        ("events", "{run}", "--format", "csv", "-o", "{run}/seamcalls.parquet", "--force"),
        ("events", "{run}", "-o", "{run}/provenance.json", "--force"),
        ("analyze", "{run}", "-o", "{run}"),
        ("analyze", "{trace}", "-o", "{run}"),
        ("report", "{run}", "--format", "md", "-o", "{run}/threads.parquet", "--force"),
        ("compare", "{trace}", "{run}", "--format", "md", "-o", "{run}/losses.parquet", "--force"),
        ("notebook", "{run}", "-o", "{run}/provenance.json", "--force"),
        ("export", "{run}", "--perfetto", "{run}/vm_entries.parquet", "--force"),
    ],
    ids=lambda words: " ".join(map(str, words[:3])).replace("/", ":"),
)
def test_a_store_is_not_lost(words: tuple[str, ...], store: Path, chains: Path) -> None:
    before = _contents(store.parent)
    refused(1, *(word.format(run=store, trace=chains) for word in words))
    assert _contents(store.parent) == before


@pytest.mark.parametrize("spelling", [_relative, _roundabout, _by_link, _by_linked_folder])
def test_a_store_is_not_replaced_by_itself_however_it_is_spelt(
    spelling: Spelling, store: Path, tmp_path: Path
) -> None:
    other = spelling(store, tmp_path)
    for words in ((store, "-o", other), (other, "-o", store)):
        said = refused(1, "convert", *words, "--force")
        assert "would overwrite the input" in said
    assert read_trace(store).seamcalls.height > 0


def test_a_trace_inside_the_store_it_would_replace_is_kept(store: Path, tmp_path: Path) -> None:
    inside = store / "trace.txt"
    inside.write_text(_TEXT)
    link = tmp_path / "link.txt"
    link.symlink_to(inside)
    for path in (inside, link):
        assert "would overwrite the input" in refused(1, "convert", path, "-o", store, "--force")
    assert inside.read_text() == _TEXT


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (_EVENTS, _TEXT),
        (("events", "{trace}", "--dmesg", "{read}", "-o", "{written}"), _LOG),
        (("query", "{read}", "select leaf from seamcalls", "-o", "{written}"), _TEXT),
        (("verdicts", "{read}", "-o", "{written}"), _TEXT),
        (("report", "{read}", "--format", "md", "-o", "{written}"), _TEXT),
        (("compare", "{trace}", "{read}", "--format", "md", "-o", "{written}"), _TEXT),
        (("notebook", "{read}", "-o", "{written}"), _TEXT),
        (("export", "{read}", "--perfetto", "{written}"), _TEXT),
        (("policies", "{trace}", "--policies", "{read}", "-o", "{written}"), _POLICY),
        (
            ("policies", "{trace}", "--policies", "{read}", "--format", "csv", "-o", "{written}"),
            _POLICY,
        ),
        (("simulate", "{read}", "-o", "{written}"), _SCENARIO),
    ],
    ids=[
        *("events", "dmesg", "query", "verdicts", "report", "compare", "notebook", "export"),
        *("policies", "policies csv", "simulate"),
    ],
)
def test_no_command_writes_over_what_it_reads(
    words: tuple[str, ...], text: str, chains: Path, tmp_path: Path
) -> None:
    read = tmp_path / "mine.toml"
    read.write_text(text)
    for written in (read, _by_link(read, tmp_path)):
        names = {"read": read, "written": written, "trace": chains}
        said = refused(1, *(word.format(**names) for word in words), "--force")
        assert "would overwrite the input" in said
        assert read.read_text() == text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "mine.toml"]


@pytest.mark.parametrize("spelling", _SPELLINGS)
def test_an_input_is_known_however_it_is_spelt(
    spelling: Spelling, trace: Path, tmp_path: Path
) -> None:
    other = spelling(trace, tmp_path)
    before = _contents(tmp_path)
    for names in ({"read": trace, "written": other}, {"read": other, "written": trace}):
        said = refused(1, *(word.format(**names) for word in _EVENTS), "--force")
        assert "would overwrite the input" in said
    assert _contents(tmp_path) == before


def test_what_is_read_from_standard_input_is_not_written_over(trace: Path) -> None:
    words = [sys.executable, "-m", "tdxtrace", "events", "-", "-o", str(trace), "--force"]
    with trace.open("rb") as file:
        done = subprocess.run(words, stdin=file, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "would overwrite the input" in done.stderr
    assert trace.read_text() == _TEXT


def test_a_scenario_beside_its_truth_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "scenario.toml"
    path.write_text(_SCENARIO)
    out = tmp_path / "trace.txt"
    said = refused(1, "simulate", path, "-o", out, "--truth", tmp_path, "--force")
    assert "would overwrite the input" in said
    assert [path.name for path in tmp_path.iterdir()] == ["scenario.toml"]


def test_a_trace_named_like_a_picture_is_kept(
    chains: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Only their names matter here.
    monkeypatch.setattr(render, "picture", lambda *_: b"a picture")
    words = ("report", chains, "--quiet", "-o", tmp_path / "1.md")
    answered(*words, "--svg", tmp_path)
    name = min(tmp_path.glob("*.svg"))
    for kind in ("png", "svg"):
        picture = name.with_suffix(f".{kind}")
        picture.write_text(_TEXT)
        words = ("report", picture, "--quiet", "-o", tmp_path / "2.md")
        said = refused(1, *words, f"--{kind}", tmp_path, "--force")
        assert "would overwrite the input" in said
        assert picture.read_text() == _TEXT


def test_what_lies_beside_an_input_may_be_written(trace: Path, tmp_path: Path) -> None:
    assert tdxtrace("analyze", trace, "-o", tmp_path).status == 0
    assert tdxtrace("analyze", trace, "-o", tmp_path).status == 0
    answered("report", trace, "--quiet", "-o", tmp_path / "report.html")
    answered("report", trace, "--quiet", "-o", tmp_path / "report.html", "--force")
    answered("convert", trace, "--quiet", "-o", tmp_path / "run1")
    answered("convert", trace, "--quiet", "-o", tmp_path / "run1", "--force")


def test_a_store_is_replaced_by_another_trace(store: Path) -> None:
    assert "use --force" in refused(1, "convert", SAMPLES / "lost.dat.xz", "-o", store)
    answered("convert", SAMPLES / "lost.dat.xz", "-o", store, "--force", "--quiet")
    assert read_trace(store).provenance.sources[0].path == str(SAMPLES / "lost.dat.xz")
    assert [path.name for path in store.parent.iterdir()] == ["run1"]


def test_a_store_is_replaced_through_a_link(store: Path, tmp_path: Path) -> None:
    link = tmp_path / "latest"
    link.symlink_to(store)
    answered("convert", SAMPLES / "lost.dat.xz", "-o", link, "--force", "--quiet")
    assert link.is_symlink()
    assert read_trace(store).provenance.sources[0].path == str(SAMPLES / "lost.dat.xz")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "run1"]


@pytest.mark.parametrize("after_s", [0.4, 0.8, 1.2])
def test_a_store_outlives_the_end_of_what_replaces_it(
    after_s: float, store: Path, trace: Path
) -> None:
    before = _contents(store)
    words = [sys.executable, "-m", "tdxtrace", "convert", "-", "-o", str(store), "--force"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as running:
        assert running.stdin is not None
        running.stdin.write(trace.read_bytes())
        running.stdin.flush()
        time.sleep(after_s)
        running.kill()
    assert _contents(store) == before
