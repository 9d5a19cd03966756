"""Shortened real traces for the commands."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.running import SAMPLES


def _head(name: str, n: int, folder: Path) -> Path:
    lines = (SAMPLES / name).read_text().splitlines(keepends=True)
    path = folder / name
    path.write_text("".join(lines[:n]))
    return path


@pytest.fixture(scope="session")
def chains(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The beginning of the contended sample."""
    return _head("contended.txt", 500, tmp_path_factory.mktemp("cut"))


@pytest.fixture(scope="session")
def steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The beginning of the zero-step sample, three episodes long."""
    return _head("zerostep.txt", 1320, tmp_path_factory.mktemp("cut"))
