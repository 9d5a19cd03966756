"""Defaults of options from a file."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.running import answered, refused, tdxtrace

from tdxtrace.cli.config import defaults


def test_the_nearest_file_counts(tmp_path: Path) -> None:
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    (tmp_path / "tdxtrace.toml").write_text("target = 1e-3\n")
    assert defaults(inner, ["recommend"]) == {"recommend": {"target": "0.001"}}
    (tmp_path / "a" / "pyproject.toml").write_text("[tool.tdxtrace]\nfail-on = ['cut>9']\n")
    assert defaults(inner, ["analyze"]) == {"analyze": {"fail_on": ["cut>9"]}}
    (inner / "pyproject.toml").write_text("[project]\n")
    assert defaults(inner, ["analyze"]) == {"analyze": {"fail_on": ["cut>9"]}}


def test_settings_hold_where_a_command_has_the_option(
    chains: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tdxtrace.toml").write_text("limit = 3\nmodule = '1.5.16'\n")
    assert len(answered("retry-chains", chains).lines) == 5
    assert len(answered("retry-chains", chains, "-n", "1").lines) == 3
    (tmp_path / "tdxtrace.toml").write_text("fail-on = ['max-attempts>2']\n")
    assert tdxtrace("analyze", chains, "-q").status == 3


@pytest.mark.parametrize(
    ("text", "said"),
    [("modul = '1'", "no setting 'modul'; nearest: module"), ("target =", "is not TOML")],
)
def test_a_wrong_file_gets_one_line(
    text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tdxtrace.toml").write_text(text)
    assert said in refused(2, "events", "x")
