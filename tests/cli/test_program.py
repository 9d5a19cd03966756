"""The program as a process: start, help, pipes, exit status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.running import SAMPLES, answered, tdxtrace

import tdxtrace as package
from tdxtrace.cli.help import READING_HELP

COMMANDS = ("analyze", "events", "retry-chains", "zero-steps", "decode")
ENVIRONMENT = os.environ | {"COLUMNS": "80", "LINES": "24", "PYTHONWARNINGS": "error"}


def program(*words: str | Path, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "tdxtrace", *map(str, words)]
    return subprocess.run(
        command, capture_output=True, timeout=60, check=False, env=ENVIRONMENT, input=stdin
    )


def test_the_version_is_the_packages() -> None:
    assert answered("--version").text == f"tdxtrace {package.__version__}\n"


@pytest.mark.parametrize("words", [("--help",), ("-h",)])
def test_help_names_every_command_and_fits(words: tuple[str, ...]) -> None:
    done = answered(*words)
    assert all(f"  {name}" in done.text for name in COMMANDS)
    assert max(map(len, done.lines)) <= 80
    assert "tdxtrace analyze log TRACE" in done.text
    assert "Exit status: 0 done, 1 bad input" in done.text
    # A sentence is whole.
    assert all(line.endswith((".", "?")) for line in done.lines if line.startswith("  re"))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example_that_starts_so(command: str) -> None:
    text = answered(command, "--help").text
    assert "Usage: tdxtrace" in text
    assert f"Example: tdxtrace {command}" in text


@pytest.mark.parametrize("command", ["events", "retry-chains", "zero-steps"])
@pytest.mark.parametrize(
    "option",
    [
        *("--format", "--output", "--force", "--vm", "--leaf", "--since", "--until"),
        *("--input-format", "--map", "--level-base", "--quiet", "--color", "--limit"),
    ],
)
def test_every_command_that_prints_a_table_takes_the_same_options(
    command: str, option: str
) -> None:
    own = answered(command, "--help").text
    assert option in own or (READING_HELP in own and option in answered(READING_HELP).text)


@pytest.mark.parametrize(("name", "own"), [("stat", "analyze"), ("script", "events")])
def test_names_of_perf_work(name: str, own: str, chains: Path) -> None:
    assert answered(name, "-i", chains) == answered(own, chains)


def test_record_is_capture_record_and_its_command_keeps_its_options(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert answered("record", "--help") == answered("capture", "record", "--help")
    given = []
    monkeypatch.setattr(
        "tdxtrace.capture.choose.plan_recording", lambda _host, options, _say: given.append(options)
    )
    monkeypatch.setattr("tdxtrace.capture.recorder.record", lambda *_: None)
    with pytest.raises(TypeError):
        tdxtrace("record", "--", "cc", "-i", "file")
    assert given[0].command == ["cc", "-i", "file"]


def test_a_file_named_log_is_a_trace(chains: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(chains.parent)
    one = answered("analyze", "log", chains.name).text
    (chains.parent / "log").write_bytes(chains.read_bytes())
    assert "\n0 log: ftrace" in answered("analyze", "log", chains.name).text
    (chains.parent / "log").unlink()
    assert answered("analyze", "log", chains.name).text == one


def test_without_words_it_shows_help() -> None:
    done = tdxtrace()
    assert "Usage: tdxtrace" in done.text + done.stderr


def test_an_unknown_command_is_exit_status_2() -> None:
    done = tdxtrace("analyse", "x")
    assert done.status == 2
    assert "Traceback" not in done.stderr


def test_it_runs_as_a_module_and_reads_a_pipe() -> None:
    data = (SAMPLES / "qemu.perf.txt.xz").read_bytes()
    done = program("analyze", "log", "-", "--json", stdin=data)
    assert (done.returncode, done.stderr) == (0, b"")
    assert json.loads(done.stdout)["n_seamcalls"] == 810


def test_an_error_of_the_input_is_one_line_of_a_process(tmp_path: Path) -> None:
    done = program("analyze", "log", tmp_path / "nothing")
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.startswith(b"tdxtrace: no such trace")
    assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize(
    "words",
    [
        ("events", SAMPLES / "contended.txt", "--format", "csv"),
        ("retry-chains", SAMPLES / "contended.txt", "--limit", "0"),
        ("analyze", SAMPLES / "contended.txt", "--json"),
    ],
)
def test_a_reader_that_has_enough_is_no_error_message(words: tuple[str | Path, ...]) -> None:
    command = [sys.executable, "-m", "tdxtrace", *map(str, words)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
        process.wait(60)


def loaded(*words: str) -> set[str]:
    """Modules that a run of the program has imported when it ends."""
    code = (
        "import json, sys\n"
        f"sys.argv = ['tdxtrace', *{list(words)!r}]\n"
        "from tdxtrace.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print(json.dumps(sorted(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, timeout=60, check=True, env=ENVIRONMENT
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


SLOW = ("polars", "pyarrow", "numpy", "zstandard", "rich.table", "rich.console", "rich.progress")


@pytest.mark.parametrize("words", [("--help",), ("--version",), ("analyze", "--help")])
def test_help_and_version_load_nothing_slow(words: tuple[str, ...]) -> None:
    assert loaded(*words).isdisjoint({*SLOW, "tdxtrace.cli.simulate"} if len(words) > 1 else SLOW)


@pytest.mark.parametrize(
    ("words", "also"),
    [
        # Intervals and limits are scipy's.
        (("analyze",), set[str]()),
        (("analyze", "-q"), {"scipy"}),
        (("busy-causes",), {"scipy"}),
        (("retry-chains",), {"scipy"}),
        (("verdicts",), {"scipy"}),
        (("zero-steps",), {"scipy"}),
    ],
)
def test_a_command_on_a_small_trace_loads_nothing_that_it_does_not_need(
    words: tuple[str, ...], also: set[str]
) -> None:
    modules = loaded(*words, str(SAMPLES / "zerostep.txt"))
    assert "polars" in modules
    # scipy takes 0.3 s to load.
    slow = {"pyarrow", "zstandard", "numba", "altair", "tdxtrace.report.json_data"}
    assert modules.isdisjoint(slow | also)


def test_verbose_says_what_was_read_and_how_long_each_step_took(chains: Path) -> None:
    done = tdxtrace("verdicts", chains, "-v")
    assert done.status == 0
    lines = done.stderr.splitlines()
    assert all(line.startswith("tdxtrace: ") for line in lines)
    assert lines[0].startswith(f"tdxtrace: {chains.name}: ftrace, ")
    assert any(line.endswith(" tdh_mem_page_aug_enter") for line in lines), lines
    assert any(line.startswith("tdxtrace: verdicts of ") for line in lines)
    assert done.text == answered("verdicts", chains).text
