"""The tables of a histogram that was counted in the kernel: requests, and shares from them."""

from __future__ import annotations

from typing import Final

import polars as pl

from tdxtrace.tables.events import I64, LEAF, U32, U64
from tdxtrace.tables.schema import Column, Table

COUNTED_OUTCOMES: Final = ("succeeded", "failed", "resolved_elsewhere", "abandoned", "open")

COMPLETE: Final = ("succeeded", "failed")
"""Outcomes of completed requests: the number of attempts that they needed is known."""

REQUEST_COUNTS = Table(
    name="request_counts",
    grain="one row per interval, process, leaf, outcome and number of attempts",
    meaning="A histogram counts requests in the kernel, by the definition of retry chains; single "
    "calls are not kept.",
    key=("interval", "tgid", "leaf", "outcome", "n_attempts"),
    columns=(
        Column("interval", U32, "Number of the interval, from 1."),
        Column("start_ns", I64, "Beginning of the interval.", unit="ns"),
        Column("end_ns", I64, "End of the interval.", unit="ns"),
        Column("tgid", pl.Int32(), "Process that made the calls: one QEMU process is one VM."),
        LEAF,
        Column(
            "outcome",
            pl.Enum(COUNTED_OUTCOMES),
            "abandoned: its range was unblocked; open: not complete at the end.",
        ),
        Column(
            "n_attempts",
            U32,
            "Attempts: exact to 64; 65 means 65 to 127; from 128 on, a power of two means all "
            "numbers up to the next.",
        ),
        Column("n_requests", U64, "Requests that ended so in the interval."),
    ),
    rules={"a row counts something": pl.col("n_requests") >= 1},
)

COUNTED_ATTEMPTS = Table(
    name="counted_attempts",
    grain="one row per leaf and limit: requests that needed more attempts",
    meaning="The share of the requests of a histogram that a limit of max_attempts would have "
    "ended before they were complete.",
    key=("leaf", "max_attempts"),
    columns=(
        LEAF,
        Column("max_attempts", U32, "The limit."),
        Column("n_requests", U64, "Requests that are known to need more, or not to."),
        Column("n_exceeding", U64, "Of these, requests that needed more."),
        Column("n_unknown", U64, "Requests that ended, or were open, before they reached it."),
        Column("exceeding", pl.Float64(), "Share of requests that needed more, 0 to 1."),
        Column(
            "exceeding_high",
            pl.Float64(),
            "Upper end of its one-sided 95 % interval, if requests are independent: too low where "
            "busy answers come in bursts, which a histogram does not show.",
        ),
    ),
)

_OF_REQUESTS: Final = ("leaf", "outcome", "n_attempts", "n_requests")

FACT_REQUESTS = Table(
    name="fact_requests",
    grain="one row per leaf, outcome and number of attempts of a histogram",
    meaning="The requests of all intervals and processes of a histogram; counts of several "
    "histograms add. A recording has no rows: its requests are in attempt_counts.",
    key=_OF_REQUESTS[:3],
    columns=tuple(c for c in REQUEST_COUNTS.columns if c.name in _OF_REQUESTS),
)

_OF_LIMIT: Final = ("n_requests", "n_exceeding", "n_unknown", "exceeding")

FLEET_COUNTED = Table(
    name="fleet_counted",
    grain="one row per leaf and limit: requests in the histograms of a fleet that needed more",
    meaning="The share of the requests of all histograms that a limit of max_attempts would have "
    "ended before they were complete, with hosts as clusters.",
    key=("leaf", "max_attempts"),
    columns=(
        *(c for c in COUNTED_ATTEMPTS.columns if c.name in ("leaf", "max_attempts")),
        Column("n_hosts", U64, "Hosts with such requests."),
        *(c for c in COUNTED_ATTEMPTS.columns if c.name in _OF_LIMIT),
        Column(
            "exceeding_high",
            pl.Float64(),
            "Upper end of its one-sided interval (95 % by default), which allows for any "
            "dependence of the requests of one host; null: of one host, which says nothing about "
            "others.",
            nullable=True,
        ),
    ),
)

HISTOGRAM_TABLES: Final = (REQUEST_COUNTS, COUNTED_ATTEMPTS, FACT_REQUESTS, FLEET_COUNTED)
TEXT_OF_CANNOT: Final = {
    1: "returned, but the entry was not seen",
    2: "did not fit into the map of open requests",
    3: "belong to a thread that did not fit into the map of threads",
    4: "may continue a request that another thread made meanwhile",
}
"""Reasons why calls could not be joined to their request, by the code that the script prints."""
