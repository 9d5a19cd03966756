"""What a user wants of a limit: how rare, and how surely."""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass
from typing import Final

from tdxtrace.errors import QueryError
from tdxtrace.tables.text import one_line

_YEAR_S: Final = 365.25 * 86_400.0
_PERIODS: Final = {
    "hour": 3_600.0,
    "day": 86_400.0,
    "week": 7 * 86_400.0,
    "month": _YEAR_S / 12,
    "year": _YEAR_S,
}
_RATE: Final = re.compile(
    r"(?P<n>\d+(?:\.\d+)?)\s+(?P<what>[a-z]+)\s+(?P<per>[a-z]+)\s+(?P<period>[a-z]+)", re.IGNORECASE
)
_WHAT: Final = ("vm", "vms")


@dataclass(frozen=True, slots=True)
class Wish:
    """The chance that a request needs more than the limit, and how sure that is to be.

    A millionth and 95 % are what the project's task names; no number was ever agreed on.
    """

    target: float = 1e-6
    confidence: float = 0.95
    per_second: float | None = None
    """Requests that may exceed their limit, on the whole host; instead of ``target``."""

    def __post_init__(self) -> None:
        """Refuse what no limit can keep.

        Raises:
            QueryError: If a number is not between 0 and 1.
        """
        if not 0 < self.target < 1:
            raise QueryError(
                f"--target {self.target:g} is no chance that can be kept; "
                "choose one above 0 and below 1, such as 1e-6"
            )
        if not 0.5 <= self.confidence < 1:
            raise QueryError(
                f"--confidence {self.confidence:g} is none; "
                "choose one from 0.5 to below 1, such as 0.95"
            )

    def target_of(self, n_requests: int, n_leaves: int, seconds: float | None) -> float | None:
        """The chance for a leaf, None if a rate was wished for and time is not known.

        A wish for the host is shared out evenly among its leaves: if each keeps its part,
        all keep the whole.
        """
        if self.per_second is None:
            return self.target
        if not seconds:
            return None
        return min(self.per_second / n_leaves * seconds / n_requests, 0.5)


def wish_of(
    *, target: float | None = None, confidence: float = 0.95, at_most: str | None = None
) -> Wish:
    """Return what is wished for, in the words of a user.

    Args:
        target: Chance that a request needs more; a millionth if nothing is said.
        confidence: How sure that is to be.
        at_most: A rate such as "1 VM per year", instead of ``target``.

    Raises:
        QueryError: If both are said, or one of them is not understood.
    """
    if target is not None and at_most is not None:
        raise QueryError("--target and --at-most are two ways to say the same; choose one")
    rate = parse_rate(at_most) if at_most is not None else None
    return Wish(1e-6 if target is None else target, confidence, rate)


def parse_rate(text: str) -> float:
    """Return a rate such as "1 VM per year" per second.

    Raises:
        QueryError: If it is not understood; names the nearest right word.

    Example:
        >>> round(1 / parse_rate("1 VM per hour"))
        3600
    """
    found = _RATE.fullmatch(text.strip())
    shown = one_line(text, 60)
    if found is None:
        raise QueryError(f'not a rate: {shown!r}; write it as in "1 VM per year"')
    for group, words in (("what", _WHAT), ("per", ("per",)), ("period", tuple(_PERIODS))):
        word = found[group].lower()
        if word not in words:
            near = difflib.get_close_matches(word, words, n=1, cutoff=0)[0]
            near = "VM" if group == "what" else near
            raise QueryError(f"unknown word {word!r} in {shown!r}; nearest: {near}")
    n = float(found["n"])
    if not n > 0 or not math.isfinite(n):
        raise QueryError(f"{shown!r} can never be kept; allow more than 0")
    return n / _PERIODS[found["period"].lower()]
