"""``--python``: the printed code gives the same results as the command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest
import typer.main
from support.running import SAMPLES, answered, refused

from tdxtrace.cli.main import app
from tdxtrace.report import render

CHOSEN = [
    *("--leaf", "TDH.MEM.TRACK", "--leaf", "TDH.VP.ENTER"),
    *("--since", "+0.001", "--until", "+0.03"),
]
# Every option that changes the rows of a command, at least once; None: the options are those of
# all commands.
TABLE_COMMANDS: dict[str, list[list[str]]] = {
    "events": [["--table", table] for table in ("vm_entries", "losses", "threads", "seamcalls")],
    "retry-chains": [["--outcome", "succeeded"], ["--all"]],
    "zero-steps": [[]],
    "counters": [[]],
    "measurement-log": [[]],
    **{key: [[]] for key in ("accept-rates", "boot-phases", "tdvmcalls", "module-updates")},
    "host-check": [[]],
    "zero-step-causes": [[]],
    "step-thresholds": [[]],
    "abandoned-requests": [[], ["--vm", "0x5581d90748e0"]],
    "progress-loops": [[]],
    "td-conflicts": [[]],
    "time-shares": [[]],
    "verdicts": [["--module", "1.5.16"], ["--generation", "C"]],
    "busy-causes": [
        *([["--about", about] for about in ("attempts", "shares", "rules", "locks", "entries")]),
        ["--cause", "host_conflict", "--candidates"],
        ["--module", "1.5.16", "--about", "shares"],
    ],
    "attempts": [["--unit", "ns"], ["--by", "cause"], ["--latencies"]],
    "query": [["select leaf, count(*) as n from retry_chains group by leaf order by leaf"]],
    "policies": [[], ["--policy", "fixed-5", "--policy", "mainline", "--policy", "fixed-5"]],
    "recommend": [
        *([], ["--target", "1e-3"], ["--confidence", "0.9"]),
        ["--at-most", "2 VMs per day", "--confidence", "0.8", "--pace", "850ns"],
    ],
}
CASES = [
    (command, [*options, *more])
    for command, variants in TABLE_COMMANDS.items()
    for place, options in enumerate(variants)
    for more in [[] if place else CHOSEN]
]
OTHERS = {"analyze", "report", "export", "explain"}


def ran(code: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile(code, "printed", "exec"), names)
    return names


def same(command: str, *words: str | Path) -> str:
    """Hold the rows that printed code makes against those of the command; the code."""
    code = answered(command, *words, "--python").text
    rows = ran(code)["rows"]
    printed = pl.read_parquet(answered(command, *words, "--format", "parquet").stdout)
    assert rows.equals(printed)
    return code


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sample, converted: it is read four times in each test, and a store is read faster."""
    path = tmp_path_factory.mktemp("whole") / "zerostep"
    answered("convert", SAMPLES / "zerostep.txt", "-q", "-o", path)
    return path


@pytest.fixture(scope="module")
def beginning(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first lines of a sample, converted: most tables have rows of them."""
    folder = tmp_path_factory.mktemp("trace")
    lines = (SAMPLES / "zerostep.txt").read_text().splitlines(keepends=True)
    (folder / "zerostep.txt").write_text("".join(lines[:1500]))
    answered("convert", folder / "zerostep.txt", "-q", "-o", folder / "zerostep")
    return folder / "zerostep"


@pytest.mark.parametrize(("command", "options"), CASES, ids=[" ".join([c, *o]) for c, o in CASES])
def test_the_calls_give_the_rows_of_the_command(
    command: str, options: list[str], beginning: Path, whole: Path
) -> None:
    # The first abandoned request is further on.
    same(command, whole if command == "abandoned-requests" else beginning, *options)


def test_policies_of_a_file_are_replayed_by_the_calls(chains: Path, tmp_path: Path) -> None:
    file = tmp_path / "it's mine.toml"
    file.write_text("[policy.mine]\ncalls = 3\n")
    for more in ([], ["--policy", "mine"], ["--policy", "mainline", "--policy", "mine"]):
        code = same("policies", chains, "--policies", file, *more)
        assert "read_policies(Path(" in code


def test_how_traces_are_read_is_part_of_the_calls(chains: Path, tmp_path: Path) -> None:
    log = tmp_path / "it's dmesg.txt"
    log.write_text("[    1.5] SEAMCALL TDH_MEM_PAGE_REMOVE failed: 0x8000020000000001\n")
    words = ["--map", "my_probe=tdh_mem_page_aug", "--level-base", "0", "--input-format", "ftrace"]
    for command in ("events", "verdicts"):
        assert "dmesg=" in same(command, chains, "--dmesg", log)
        assert "level_base=0" in same(command, chains, *words)


def test_contradictory_targets_are_refused() -> None:
    words = ("--target", "1e-3", "--at-most", "1 VM per day", "--python")
    assert "choose one" in refused(2, "recommend", SAMPLES / "contended.txt", *words)


@pytest.mark.parametrize("words", [[], ["log"]])
def test_what_analyze_found_is_found(words: list[str]) -> None:
    code = answered("analyze", *words, SAMPLES / "contended.txt", "--python").text
    assert ran(code)["findings"].retry_chains.height == 503


def test_an_attempt_is_explained_by_its_calls(
    beginning: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for more in ([], ["--chain"], ["--source", "0", "--generation", "B"]):
        words: list[str | Path] = ["explain", beginning, "--seq", "684", *more]
        code = answered(*words, "--python").text
        ran(code)
        assert capsys.readouterr().out == answered(*words).text


@pytest.mark.parametrize("more", [[], CHOSEN])
def test_perfetto_is_written_by_its_calls(more: list[str], beginning: Path, tmp_path: Path) -> None:
    path, other = tmp_path / "a.pftrace", tmp_path / "b.pftrace"
    ran(answered("export", beginning, "--perfetto", path, *more, "--python").text)
    answered("export", beginning, "--perfetto", other, *more, "--quiet")
    assert path.read_bytes() == other.read_bytes()


def test_charts_of_a_report_are_saved_by_its_calls(
    chains: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # That a picture shows its chart is the subject of tests/report.
    monkeypatch.setattr(render, "picture", lambda *_: b"a picture")
    words: list[str | Path] = ["report", chains, "-o", tmp_path / "r.html"]
    charts: list[str | Path] = ["--svg", tmp_path / "a", "--leaf", "TDH.MEM.PAGE.AUG"]
    ran(answered(*words, *charts, "--python").text)
    written = (tmp_path / "r.html").read_bytes()
    # The command says in the section on provenance how it was called.
    before = b'id="provenance"'
    other = answered(*words[:2], *charts[2:], "--format", "html").stdout
    assert written.split(before)[0].endswith(other.split(before)[0][-1000:])
    assert [path.suffix for path in (tmp_path / "a").iterdir()][:1] == [".svg"]


def test_a_report_is_written_by_its_calls(chains: Path, tmp_path: Path) -> None:
    path = tmp_path / "it's.md"
    code = answered("report", chains, "-o", path, "--python").text
    assert not path.exists()
    ran(code)
    assert path.read_text().startswith("# TDX SEAMCALL retries: contended.txt")


def test_every_command_that_has_the_option_is_tested() -> None:
    commands: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    have = {
        name
        for name, command in commands.items()
        if any("--python" in option.opts for option in command.params)
    }
    assert have == TABLE_COMMANDS.keys() | OTHERS
