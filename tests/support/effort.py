"""Numbers of repetitions of random tests in a run of the suite."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, TypeVar

from hypothesis import settings

T = TypeVar("T")
THOROUGH: Final = "thorough"
# A choice, for the time of a run.
_PART: Final = 4


def times(n: int) -> int:
    """Repeats of ``n`` that this run makes: a part, or all with ``--hypothesis-profile thorough``.

    The damage of a test is the same in every run, so that the part finds again what it has found.
    """
    return n if _is_thorough() else n // _PART


def some_of(cases: Sequence[T]) -> Sequence[T]:
    """Cases that this run tries: of a long list every fourth, or all; see :func:`times`."""
    return cases if _is_thorough() else cases[::_PART]


def _is_thorough() -> bool:
    return settings.get_current_profile_name() == THOROUGH
