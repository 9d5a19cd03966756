"""Manual pages: every command and option of the help is in them, as man(7) wants it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer.main

from tdxtrace.cli import man
from tdxtrace.cli.main import app


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return man.pages()


def test_every_command_has_a_page_with_all_its_options(pages: dict[str, str]) -> None:
    program = typer.main.get_command(app)
    groups: list[tuple[tuple[str, ...], Any]] = [(("tdxtrace",), program)]
    n = 0
    for words, command in groups:
        page = pages["-".join(words) + ".1"].replace("\\-", "-")
        assert page.startswith(".TH ")
        assert "\n.SH EXIT STATUS\nExit status: 0 done, 1 bad input, 2 bad usage" in page
        for parameter in command.params:
            if parameter.param_type_name == "option" and not parameter.hidden:
                assert f"\\fB{parameter.opts[0]}\\fR" in page, (words, parameter.name)
        inner = getattr(command, "commands", {})
        assert all(f"\\fB{'-'.join((*words, name))}\\fR(1)" in page for name in inner)
        groups += [((*words, name), one) for name, one in inner.items()]
        n += 1
    assert n == len(pages)


def test_text_is_no_command_of_roff() -> None:
    assert man._text(".TH evil") == "\\&.TH evil"
    assert man._text("'br") == "\\&'br"
    assert man._text(r"a\fB-x") == r"a\efB\-x"


def test_the_command_writes_them(tmp_path: Path) -> None:
    assert man.main([str(tmp_path / "man1")]) == 0
    assert (tmp_path / "man1" / "tdxtrace-analyze.1").stat().st_size > 1000
    assert man.main([]) == 2
    assert man.main([str(tmp_path / "man1" / "tdxtrace.1" / "under")]) == 1


@pytest.mark.skipif(not shutil.which("mandoc"), reason="mandoc is not installed")
def test_mandoc_has_no_complaint(tmp_path: Path) -> None:
    man.write(tmp_path)
    _no_words("mandoc", "-Tlint", "-Wwarning", *map(str, tmp_path.iterdir()))


@pytest.mark.skipif(not shutil.which("groff"), reason="groff is not installed")
def test_groff_has_no_complaint(tmp_path: Path) -> None:
    man.write(tmp_path)
    _no_words("groff", "-man", "-ww", "-z", *map(str, tmp_path.iterdir()))


def _no_words(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout + done.stderr == ""
