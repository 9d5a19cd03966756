"""Target of a limit: the ratio of requests that may exceed it, and the confidence."""

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
    r"^(?P<n>\d+(?:\.\d+)?)\s+(?P<what>[a-z]+)\s+(?P<per>[a-z]+)\s+(?P<period>[a-z]+)",
    re.IGNORECASE,
)
_SUBJECTS: Final = ("vm", "vms")


@dataclass(frozen=True, slots=True)
class Target:
    """Ratio of requests that may need more than the limit, and its confidence.

    The defaults, 1e-6 and 95 %, are those of the project's task; none was ever agreed on.
    """

    ratio: float = 1e-6
    confidence: float = 0.95
    per_second: float | None = None
    """Requests per second that may exceed their limit, on the whole host; instead of ``ratio``."""

    def __post_init__(self) -> None:
        """Validate the numbers.

        Raises:
            QueryError: If a number is not between 0 and 1.
        """
        if not 0 < self.ratio < 1:
            raise QueryError(
                f"--target {self.ratio:g} is no chance that can be kept; "
                "choose one above 0 and below 1, such as 1e-6"
            )
        if not 0.5 <= self.confidence < 1:
            raise QueryError(
                f"--confidence {self.confidence:g} is none; "
                "choose one from 0.5 to below 1, such as 0.95"
            )

    def for_leaf(self, n_requests: int, n_leaves: int, seconds: float | None) -> float | None:
        """Return the ratio for a leaf; None if it is a rate and the recorded time is not known.

        A rate for the host is divided evenly among its leaves: if each keeps its part, the
        host keeps the whole.
        """
        if self.per_second is None:
            return self.ratio
        if not seconds:
            return None
        return min(self.per_second / n_leaves * seconds / n_requests, 0.5)


def parse_target(
    *, target: float | None = None, confidence: float = 0.95, at_most: str | None = None
) -> Target:
    """Parse the options for a target.

    Args:
        target: Ratio of requests that may need more; 1e-6 by default.
        confidence: Confidence of the limit.
        at_most: A rate such as "1 VM per year", instead of ``target``.

    Raises:
        QueryError: If both are given, or one of them is malformed.
    """
    if target is not None and at_most is not None:
        raise QueryError("--target and --at-most are two ways to say the same; choose one")
    rate = parse_rate(at_most) if at_most is not None else None
    return Target(1e-6 if target is None else target, confidence, rate)


def parse_rate(text: str) -> float:
    """Parse a rate such as "1 VM per year", and return it per second.

    Raises:
        QueryError: If it is malformed; names the nearest right word.

    Example:
        >>> round(1 / parse_rate("1 VM per hour"))
        3600
    """
    found = _RATE.fullmatch(text.strip())
    shown = one_line(text, 60)
    if found is None:
        raise QueryError(f'not a rate: {shown!r}; write it as in "1 VM per year"')
    for group, words in (("what", _SUBJECTS), ("per", ("per",)), ("period", tuple(_PERIODS))):
        word = found[group].lower()
        if word not in words:
            near = difflib.get_close_matches(word, words, n=1, cutoff=0)[0]
            near = "VM" if group == "what" else near
            raise QueryError(f"unknown word {word!r} in {shown!r}; nearest: {near}")
    n = float(found["n"])
    if not n > 0 or not math.isfinite(n):
        raise QueryError(f"{shown!r} can never be kept; allow more than 0")
    return n / _PERIODS[found["period"].lower()]
