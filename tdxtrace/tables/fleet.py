"""The tables of facts: counts of one trace that add over traces, hosts and days."""

from __future__ import annotations

from typing import Final

import polars as pl

from tdxtrace.tables.enums import Counted, names
from tdxtrace.tables.events import I64, LEAF, TEXT, U16, U64
from tdxtrace.tables.limits import F64, UNITS, VIEWS
from tdxtrace.tables.schema import Column, Table

# Units of dependence whose clusters hold clean requests too; a burst is of retried ones.
CLUSTERED_BY: Final = ("period", "td", "source")

_INPUT = Column("source", U16, "Input of the TD; null unless by is td.", nullable=True)
_TD = Column("td_id", U64, "The TD; null unless by is td.", nullable=True)

ATTEMPT_COUNTS = Table(
    name="attempt_counts",
    grain="one row per curve of attempts and step: what its requests add to the sums there",
    meaning="What the curves of attempts are functions of: whole numbers, which add over inputs.",
    key=("leaf", "by", "source", "td_id", "kind", "unit", "settled", "step"),
    columns=(
        LEAF,
        Column("by", pl.Enum(VIEWS), "Part of the requests or busy answers, as in attempts."),
        _INPUT,
        _TD,
        Column("kind", TEXT, "The resource, cause or maker, as in attempts.", nullable=True),
        Column("unit", pl.Enum(UNITS), "Attempts, or ns spent retrying."),
        Column(
            "settled",
            pl.Enum(names(Counted)),
            "What requests that another thread settled count as: last seen busy (busy), done at "
            "their last attempt (done), or there are none (none).",
        ),
        Column("step", I64, "Attempts, or place in the fixed list of times of attempts."),
        Column("n_done", I64, "Retried requests that were done at this step."),
        Column("n_censored", I64, "Requests last observed busy at this step."),
        Column("n_more", I64, "Requests whose last step that they needed more than is this."),
        Column("squares", I64, "What these add to the sum of the squares of bursts."),
        Column("n_episodes", I64, "Bursts whose deepest request is among them."),
        *(
            Column(f"{unit}_{what}", I64, f"What these add to the sum of {text} of each {unit}.")
            for unit in CLUSTERED_BY
            for what, text in (
                ("squares", "the squares"),
                ("products", "the products with all requests"),
            )
        ),
        Column("trend", F64, "Sum over them of the period, from the middle of the input."),
    ),
)

ATTEMPT_TOTALS = Table(
    name="attempt_totals",
    grain="one row per leaf, and per TD of a leaf: its requests, and how they are in clusters",
    meaning="Requests of all steps of the curves in attempt_counts: whole numbers, which add.",
    key=("leaf", "source", "td_id"),
    columns=(
        LEAF,
        Column("source", U16, "Input of the TD; null: the whole leaf.", nullable=True),
        Column("td_id", U64, "The TD; null: the whole leaf.", nullable=True),
        Column("n_requests", U64, "Retry chains."),
        Column("n_done", I64, "Those with an answer other than busy, begun in sight."),
        Column("n_all", I64, "Requests that curves are about."),
        *(
            column
            for unit in CLUSTERED_BY
            for column in (
                Column(f"{unit}_clusters", I64, f"Clusters ({unit}s) with a request."),
                Column(f"{unit}_known", I64, "Those of which it is known which they are."),
                Column(f"{unit}_sizes", I64, "Sum of the squares of their requests."),
            )
        ),
        Column("trend_mean", F64, "Sum over requests of the period, from the middle."),
        Column("trend_square", F64, "Sum over periods of the square of that."),
    ),
)
