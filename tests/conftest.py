"""Hypothesis settings of this suite."""

from __future__ import annotations

import pytest
from hypothesis import settings
from support.effort import THOROUGH

from tdxtrace import compiler

# A deadline would measure whatever else runs on the machine. The examples are the same in each run,
# so that a test fails for what was changed, and not by chance.
settings.register_profile(
    "tdxtrace", deadline=None, print_blob=True, max_examples=30, derandomize=True
)
# Others at random, by hand, of one room: pytest tests/analysis --hypothesis-profile thorough
settings.register_profile(THOROUGH, deadline=None, print_blob=True, max_examples=2_000)
settings.load_profile("tdxtrace")


@pytest.fixture(autouse=True, scope="session")
def _compiling_was_told() -> None:
    """Print the notice on compiling before all tests: no test finds it in what it prints itself."""
    compiler._warn_once(compiler.COMPILING)
