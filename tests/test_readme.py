"""The README: its commands and code run, its tables and links are current."""

from __future__ import annotations

import re
import shlex
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
from support.running import SAMPLES, tdxtrace

from tdxtrace.tables import reference

ROOT = SAMPLES.parent
README = (ROOT / "README.md").read_text("utf-8")
MORE = (ROOT / "tests" / "README.md").read_text("utf-8")
COMMANDS = list(
    dict.fromkeys(
        re.findall(r"^    ((?:sudo \.venv/bin/)?tdxtrace .*)$", README + MORE, re.MULTILINE)
    )
)
# Commands that change a host, or take minutes: that they exist, with these options, is tested.
ONLY_NAMED = ("sudo ", "tdxtrace validate --full")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(SAMPLES, folder / "sample_traces")
    for name in ("trace.txt", "monday.txt", "tuesday.txt"):
        shutil.copy(SAMPLES / "zerostep.txt", folder / name)
    line = "[    1.700000] virt/tdx: BIOS enabled: private KeyID range [16, 64)\n"
    (folder / "dmesg.txt").write_text(line)
    return folder


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_runs(line: str, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkout)
    # What a shell would do with the output is not tried.
    words = shlex.split(line.removeprefix("sudo ").partition(" > ")[0])[1:]
    if line.startswith(ONLY_NAMED):
        done = tdxtrace(*words, "--help", columns=120)
        options = [word for word in words if word.startswith("--")]
        assert done.status == 0
        assert [option for option in options if option not in done.text] == []
        return
    made = [
        Path(after)
        for option, after in pairwise(words)
        if option in ("-o", "--perfetto", "--truth")
    ]
    for path in made:
        path.unlink(missing_ok=True)
    for earlier in COMMANDS[: COMMANDS.index(line)]:
        # A command may read the output of an earlier one, which may run in another process.
        folder = re.search(r" (?:convert .* -o|map .* --to) (\S+)$", earlier)
        if folder is not None and folder[1] in words and not Path(folder[1]).exists():
            assert tdxtrace(*shlex.split(earlier)[1:]).status == 0
    done = tdxtrace(*words)
    assert done.status == 0, done.stderr
    assert all(path.exists() for path in made)


def test_the_readme_has_commands() -> None:
    assert len(COMMANDS) >= 15
    assert all("\t" not in line for line in COMMANDS)


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_its_python_runs(code: str, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkout)
    exec(compile(code, "README.md", "exec"), {})
    assert Path("timeline.html").stat().st_size > 1000


def test_the_list_of_tables_is_current() -> None:
    stale = "is stale: run python -m tdxtrace.tables.reference"
    assert reference.with_summary(README) == README, f"README.md {stale}"
    result = (ROOT / "schemas" / "README.md").read_text("utf-8")
    assert result == reference.reference(), f"schemas/README.md {stale}"


def test_the_first_hundred_lines_are_for_a_newcomer() -> None:
    first = "\n".join(README.splitlines()[:100])
    for needed in ("pip install", "analyze log", "report", "capture record", "## Verdicts"):
        assert needed in first
    assert "pip install 'tdxtrace" not in README, "no package index has it"


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#]+)", README))))
def test_every_link_has_a_target(target: str) -> None:
    assert (ROOT / target).exists()


def test_the_output_shown_is_that_of_the_command() -> None:
    shown = " ".join(tdxtrace("analyze", "log", SAMPLES / "zerostep.txt").text.split())
    block = README.split("analyze log sample_traces/zerostep.txt\n\n")[1].split("\n    …")[0]
    for line in block.splitlines():
        assert " ".join(line.removesuffix("…").split()) in shown
