"""The kernel's tracing, and the traced program."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support import testbed
from support.testbed import Tracing


@pytest.fixture
def tracing() -> Iterator[Tracing]:
    """Tracefs, as it was before when the test is over."""
    with testbed.tracing() as found:
        testbed.usable(found)
        before = found.state()
        yield found
        assert found.state() == before


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program that stands in for a TDX host."""
    return testbed.build(tmp_path_factory.mktemp("testbed"))
