"""Comparison of compiled and interpreted runs of loops.

Interpreted, an index out of range is an error; so a loop that passes here reads and writes
inside its arrays.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np

from tdxtrace.compiler import compiled, interpreted

F = TypeVar("F", bound=Callable[..., Any])


def _copied(value: object) -> object:
    """Copies of arrays, in tuples of tuples; arrays whose numbers overlap are only read."""
    if isinstance(value, tuple):
        copies = tuple(map(_copied, value))
        make = getattr(value, "_make", None)
        return copies if make is None else make(copies)
    if isinstance(value, np.ndarray) and value.flags.c_contiguous:
        return value.copy()
    return value


def _assert_same(one: object, other: object, where: str) -> None:
    if isinstance(one, tuple):
        assert isinstance(other, tuple), where
        assert len(one) == len(other), where
        for place, (a, b) in enumerate(zip(one, other, strict=True)):
            _assert_same(a, b, f"{where}[{place}]")
    elif isinstance(one, np.ndarray):
        assert isinstance(other, np.ndarray), where
        assert one.tobytes() == other.tobytes(), where
    else:
        assert one == other, where


def referee(loop: F) -> F:
    """Return a function that runs ``loop`` both ways and compares all that it gives and fills.

    It is a ``compiler.Runner``: readers take it as ``run``.
    """

    @functools.wraps(loop)
    def run(*args: object) -> object:
        copies = tuple(map(_copied, args))
        expected = interpreted(loop)(*args)
        _assert_same(compiled(loop)(*copies), expected, f"what {loop.__name__} returns")
        _assert_same(copies, args, f"argument of {loop.__name__}")
        return expected

    return cast("F", run)
