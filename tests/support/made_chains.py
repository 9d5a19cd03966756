"""Retry chains made from numbers of busy answers."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from tdxtrace.tables.findings import RETRY_CHAINS


def chains_of(n_busy: list[int] | np.ndarray[Any, Any], source: int = 0) -> pl.DataFrame:
    """Chains of one thread that were busy so often and then succeeded, 1 us a call."""
    busy = np.asarray(n_busy, np.uint32)
    seq = np.arange(1, len(busy) + 1)
    start = seq * 1_000_000
    known = {"first_seq": seq, "last_seq": seq, "n_busy": busy, "n_attempts": busy + 1}
    chains = pl.DataFrame(known | {"start_ns": start, "end_ns": start}).with_columns(
        source=source, leaf=6, n_segments=1, identity=pl.lit("request"), outcome=pl.lit("succeeded")
    )
    missing = [name for name in RETRY_CHAINS.schema if name not in chains.columns]
    chains = chains.with_columns(pl.lit(None).alias(name) for name in missing)
    return chains.select(RETRY_CHAINS.schema.names()).cast(RETRY_CHAINS.schema)


def spaced_chains(numbers: list[int], clean: int) -> list[int]:
    """Busy requests with so many clean ones between them, not evenly."""
    chance = np.random.default_rng(7)
    gaps = chance.multinomial(clean, np.full(len(numbers), 1 / len(numbers)))
    mixed = chance.permutation(numbers).tolist()
    return [n for gap, busy in zip(gaps, mixed, strict=True) for n in (*[0] * gap, busy)]
