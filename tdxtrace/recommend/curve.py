"""One curve of ``attempts`` as numpy columns, and the limits that it supports."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from tdxtrace.intervals import CONFIDENCE, Floats, exact_interval, few_clusters_factor


@dataclass(frozen=True, slots=True)
class Curve:
    """One curve of ``attempts``, as columns, with target and confidence."""

    unit: str
    within: Floats
    exceedance: Floats
    n: Floats
    n_done: Floats
    n_censored: Floats
    effect: Floats
    burst_size: float
    """Number of requests of a burst that count as one independent request."""
    target: float
    confidence: float

    def upper(self, confidence: float) -> Floats:
        """One-sided upper bounds of P(needs more than each step)."""
        return exact_interval(self.exceedance, self.n, 2 * confidence - 1)[1]

    def lower(self, confidence: float) -> Floats:
        """One-sided lower bounds of P(needs more than each step)."""
        return exact_interval(self.exceedance, self.n, 2 * confidence - 1)[0]

    @property
    def needed(self) -> int:
        """Number of requests without an excess that would suffice: the rule of three."""
        return math.ceil(-math.log(1 - self.confidence) / self.target * self.burst_size)

    def first_within(self, share: Floats, target: float | None = None) -> int | None:
        """Index of the first step from which on a share stays within the target."""
        above = np.flatnonzero(share > (self.target if target is None else target))
        place = int(above[-1]) + 1 if len(above) else 0
        return place if place < len(share) else None


def curve_of(rows: pl.DataFrame, unit: str, given: dict[str, Any]) -> Curve:
    """Return a curve of ``attempts``; without rows, that of requests that were never busy.

    Args:
        rows: Rows of one curve, by ``within``.
        unit: Its unit.
        given: n_requests, target and confidence.
    """
    n_requests = float(given["n_requests"])
    wanted = (given["target"], given["confidence"])
    if rows.is_empty():
        one, none = np.ones(1), np.zeros(1)
        first = one if unit == "attempts" else none
        all_done = (one * n_requests, one * n_requests, none, one)
        return Curve(unit, first, none, *all_done, 1.0, *wanted)
    return Curve(
        unit,
        rows["within"].to_numpy().astype(float),
        1 - rows["done_ratio"].to_numpy(),
        rows["n_effective"].to_numpy(),
        rows["n_done"].to_numpy().astype(float),
        rows["n_censored"].to_numpy().astype(float),
        rows["design_effect"].to_numpy(),
        _burst_size(rows),
        *wanted,
    )


def _burst_size(rows: pl.DataFrame) -> float:
    """The design effect at the first step, without the factor for few episodes."""
    n_episodes = float(rows["n_episodes"][0])
    if not n_episodes:
        return 1.0
    few = float(few_clusters_factor(np.array([n_episodes]), CONFIDENCE)[0])
    return max(float(rows["design_effect"][0]) / few, 1.0)
