"""The table about two traces: whether requests needed more, or less, than before."""

from __future__ import annotations

from typing import Final

import polars as pl

from tdxtrace.tables.events import I64, LEAF, U64
from tdxtrace.tables.limits import F64, UNITS
from tdxtrace.tables.schema import Column, Table

CHANGES: Final = ("more", "fewer", "not_told", "only_before", "only_after")

COMPARISONS = Table(
    name="comparisons",
    grain="one row per leaf and number of attempts, or time: how many requests needed more",
    meaning="A difference between two traces is told only if its 95 % interval, which respects "
    "that busy answers come in bursts, leaves out zero.",
    key=("leaf", "unit", "within"),
    columns=(
        LEAF,
        Column("unit", pl.Enum(UNITS), "What is counted: attempts, or ns spent retrying."),
        Column("within", I64, "So many attempts (the last included), or ns."),
        Column("n_before", U64, "Requests before; null: the leaf was not seen.", nullable=True),
        Column("n_after", U64, "Requests after; null: the leaf was not seen.", nullable=True),
        Column("more_before", F64, "Share that needed more, before.", nullable=True),
        Column("more_after", F64, "Share that needed more, after.", nullable=True),
        Column("difference", F64, "After less before.", nullable=True),
        Column("difference_low", F64, "Lower end of its 95 % interval.", nullable=True),
        Column("difference_high", F64, "Upper end.", nullable=True),
        Column("change", pl.Enum(CHANGES), "What the data supports; not_told: neither."),
    ),
    rules={
        "a difference lies in its interval": pl.col("difference").is_between(
            "difference_low", "difference_high"
        ),
    },
)
