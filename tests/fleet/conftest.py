"""Small traces of several hosts."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.running import SAMPLES

_SAMPLES = ("tracecmd-v7.dat", "qemu.perf.txt.xz", "tracecmd-v6.txt.xz", "qemu.perf.data.xz")


@pytest.fixture(scope="session")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small trace of each of four hosts."""
    folder = tmp_path_factory.mktemp("traces")
    for number, name in enumerate(_SAMPLES):
        _, _, suffix = name.partition(".")
        shutil.copy(SAMPLES / name, folder / f"host{number}.{suffix}")
    return folder
