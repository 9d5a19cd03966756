"""A curve of attempts as numbers, and what bounds it gives."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tdxtrace.intervals import CONFIDENCE, exact_interval, widening

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Curve:
    """One curve of ``attempts``, as columns, with what is wished of it."""

    unit: str
    within: Floats
    more: Floats
    n: Floats
    n_done: Floats
    n_censored: Floats
    effect: Floats
    size: float
    """Requests of a burst that tell as much as one."""
    target: float
    confidence: float

    def upper(self, confidence: float) -> Floats:
        """Upper bounds of P(needs more than each step), one-sided."""
        return exact_interval(self.more, self.n, 2 * confidence - 1)[1]

    def lower(self, confidence: float) -> Floats:
        """Lower bounds, one-sided."""
        return exact_interval(self.more, self.n, 2 * confidence - 1)[0]

    @property
    def needed(self) -> int:
        """Requests among which none beyond a limit would be enough: the rule of three."""
        return math.ceil(-math.log(1 - self.confidence) / self.target * self.size)

    def least(self, share: Floats, target: float | None = None) -> int | None:
        """The first step from which on a share stays within the target."""
        above = np.flatnonzero(share > (self.target if target is None else target))
        place = int(above[-1]) + 1 if len(above) else 0
        return place if place < len(share) else None


def curve_of(rows: pl.DataFrame, unit: str, told: dict[str, Any]) -> Curve:
    """Return a curve of ``attempts``; without rows it is that of requests never busy.

    Args:
        rows: Rows of one curve, by ``within``.
        unit: Its unit.
        told: n_requests, target and confidence.
    """
    n_requests = float(told["n_requests"])
    wished = (told["target"], told["confidence"])
    if rows.is_empty():
        one, none = np.ones(1), np.zeros(1)
        first = one if unit == "attempts" else none
        all_done = (one * n_requests, one * n_requests, none, one)
        return Curve(unit, first, none, *all_done, 1.0, *wished)
    return Curve(
        unit,
        rows["within"].to_numpy().astype(float),
        1 - rows["done_ratio"].to_numpy(),
        rows["n_effective"].to_numpy(),
        rows["n_done"].to_numpy().astype(float),
        rows["n_censored"].to_numpy().astype(float),
        rows["design_effect"].to_numpy(),
        _size(rows),
        *wished,
    )


def _size(rows: pl.DataFrame) -> float:
    """The design effect of being retried, without what few episodes add to it."""
    n_episodes = float(rows["n_episodes"][0])
    if not n_episodes:
        return 1.0
    few = float(widening(np.array([n_episodes]), CONFIDENCE)[0])
    return max(float(rows["design_effect"][0]) / few, 1.0)
