"""The time to read grows at most in proportion to a recording."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.growth import FAMILIES, seconds

from tdxtrace import compiler

TIMES_AS_LARGE = 8
MAX_RATIO = 11
"""8 if linear, 64 if quadratic; what reading anything takes makes it less."""
N_TRIES = 8
"""The time is too long if it is each time: the machine may have been busy."""


@pytest.mark.parametrize("name", FAMILIES)
def test_time_grows_with_the_input(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler, "COMPILE_BYTES", 1 << 40)
    n, path = FAMILIES[name][0], tmp_path / "recording"
    ratios: list[float] = []
    while not ratios or (ratios[-1] > MAX_RATIO and len(ratios) < N_TRIES):
        once = seconds(name, n, path)
        ratios.append(seconds(name, TIMES_AS_LARGE * n, path) / once)
    assert min(ratios) <= MAX_RATIO, ratios
