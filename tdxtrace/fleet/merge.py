"""Selection, sums and differences of the facts of many traces.

Counts are integers, so that sums do not depend on the order of traces.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from io import BytesIO
from typing import IO, Any, Final

import numpy as np
import polars as pl

from tdxtrace.analysis.attempts import AttemptCounts
from tdxtrace.errors import InputError, QueryError
from tdxtrace.fleet.facts import FILES, FORMAT, HISTOGRAM, PROVENANCE, middle_of
from tdxtrace.fleet.mapping import FAILURES
from tdxtrace.fleet.storage import Storage
from tdxtrace.recommend.limits import RecordedRequests
from tdxtrace.recommend.target import Exposure
from tdxtrace.tables.fleet import ATTEMPT_COUNTS, ATTEMPT_TOTALS, FACT_FAILURES, FACT_PARTS
from tdxtrace.tables.schema import Table
from tdxtrace.tables.sql import run_query
from tdxtrace.tables.text import one_line

# ``source`` has 16 bits in every table.
MAX_PARTS: Final = 1 << 16
# Number of files that are read together.
_AT_ONCE: Final = 500
_CURVE: Final = ("leaf", "by", "source", "td_id", "kind", "unit")
_STEP: Final = (*_CURVE, "settled", "step")
_COUNTED: Final = tuple(c for c in ATTEMPT_COUNTS.schema.names() if c not in _STEP)
_TOTAL: Final = ("leaf", "source", "td_id")
_HOST_CURVE: Final = ("host", "leaf", "by", "kind", "unit", "settled")


@dataclass(frozen=True, slots=True)
class Facts:
    """Parts of a fleet's facts; their tables are read on demand."""

    storage: Storage
    parts: pl.DataFrame
    """The ``fact_parts`` table with the column ``source``, the number of the part."""
    folders: tuple[str, ...]
    """Folder of each part."""
    n_rows: tuple[dict[str, int], ...]
    """Number of rows of each file of each part."""
    failures: pl.DataFrame
    """The ``fact_failures`` table."""
    n_copies: int
    """Number of duplicate parts left out: the same trace was counted from another path."""

    @property
    def digest(self) -> str:
        """Hash of the sorted names of the parts."""
        words = "\n".join(self.parts["part"].sort())
        return hashlib.blake2b(words.encode(), digest_size=8).hexdigest()

    @property
    def n_histograms(self) -> int:
        """Number of parts that are histograms, which have only the table ``requests``."""
        return int((self.parts["format"] == HISTOGRAM).sum())

    def where(self, condition: str | None) -> Facts:
        """Return the parts for which an SQL condition on columns of ``fact_parts`` holds.

        Raises:
            QueryError: If the condition cannot be parsed, or holds for no part.
        """
        if condition is None:
            return self
        rows = run_query(
            f"select part from fact_parts where {condition}",
            {FACT_PARTS.name: FACT_PARTS},
            lambda _: FACT_PARTS.conform(self.parts),
        )
        return self.only(self.parts["part"].is_in(rows["part"].implode()), condition)

    def only(self, chosen: pl.Series, condition: str = "") -> Facts:
        """Return the parts for which ``chosen`` is true; their numbers do not change.

        Raises:
            QueryError: If no part is chosen; the message contains ``condition``.
        """
        if not chosen.any():
            raise QueryError(f"no trace in the facts matches {one_line(condition, 60)}")
        places = chosen.arg_true()
        return replace(
            self,
            parts=self.parts.filter(chosen),
            folders=tuple(self.folders[at] for at in places),
            n_rows=tuple(self.n_rows[at] for at in places),
        )

    def tables(self, name: str) -> Iterator[pl.DataFrame]:
        """Yield a table of all parts, 500 parts at a time; ``_source`` is the number of the part.

        Raises:
            InputError: If a file is missing or damaged.
        """
        # Facts of an earlier release may lack a file of another kind of input.
        n_rows = np.array([rows.get(name, 0) for rows in self.n_rows])
        filled = np.flatnonzero(n_rows)
        numbers = self.parts["source"].to_numpy()
        for some in np.array_split(filled, max(1, -(-len(filled) // _AT_ONCE))):
            names = [f"{self.folders[at]}/{name}.parquet" for at in some]
            rows = _read(FILES[name], names, self.storage.read(names), n_rows[some])
            number = pl.Series(np.repeat(numbers[some], n_rows[some]), dtype=pl.UInt16)
            yield rows.with_columns(_source=number)

    def table(self, name: str) -> pl.DataFrame:
        """Return a table of all parts; ``source`` is the number of the part."""
        rows = pl.concat(self.tables(name)).with_columns(source="_source").drop("_source")
        return rows.select("source", *(c for c in rows.columns if c != "source"))

    def table_with_hosts(self, name: str) -> pl.DataFrame:
        """Return a table of all parts, with source and host."""
        hosts = self.parts.select("source", "host")
        return self.table(name).join(hosts, on="source", maintain_order="left")


def open_facts(storage: Storage) -> Facts:
    """Return all complete parts; of duplicates of a trace one is kept.

    Parts are numbered in the order of host, date and content hash.

    Raises:
        InputError: If no part is complete, or there are more than 65,536.
    """
    names = [name for name in storage.names(".json") if name.startswith(f"format={FORMAT}/")]
    marks = [name for name in names if name.endswith(f"/{PROVENANCE}")]
    if not marks:
        raise InputError(f"no facts of format {FORMAT} at {one_line(storage.url)}")
    rows = [json.loads(mark) for mark in storage.read(marks)]
    schema = FACT_PARTS.schema
    frame = pl.DataFrame([[row[name] for name in schema] for row in rows], schema, orient="row")
    frame = frame.with_columns(place=pl.int_range(pl.len()), folder=pl.Series(marks))
    parts = frame.sort("host", "date", "part", "folder").unique(
        "part", keep="first", maintain_order=True
    )
    if parts.height > MAX_PARTS:
        raise InputError(
            f"{parts.height:,} parts are more than {MAX_PARTS:,}; select some with --where"
        )
    numbers = pl.int_range(pl.len(), dtype=pl.UInt16)
    return Facts(
        storage,
        parts.drop("folder", "place").with_columns(source=numbers),
        tuple(mark.removesuffix(f"/{PROVENANCE}") for mark in parts["folder"]),
        tuple(rows[place]["rows"] for place in parts["place"]),
        _failures(storage, names),
        frame.height - parts.height,
    )


def _read(
    table: Table, names: list[str], contents: list[bytes], n_rows: np.ndarray[Any, Any]
) -> pl.DataFrame:
    """Return the concatenated rows of files.

    Raises:
        InputError: If a file is damaged, or does not have the number of rows in ``n_rows``.
    """
    if not names:
        return table.empty()
    try:
        files: list[IO[bytes]] = [BytesIO(content) for content in contents]
        rows = pl.read_parquet(files, glob=False)
        if rows.height == n_rows.sum():
            return table.conform(rows)
    except (pl.exceptions.PolarsError, OSError):
        pass
    for name, content, n in zip(names, contents, n_rows, strict=True):
        with suppress(pl.exceptions.PolarsError, OSError):
            if pl.read_parquet(BytesIO(content), glob=False).height == n:
                continue
        raise InputError(f"{one_line(name)} is damaged: remove its part, and count again")
    raise InputError(f"the tables {one_line(names[0])} and later do not fit together")


def _failures(storage: Storage, names: list[str]) -> pl.DataFrame:
    failed = [name for name in names if name.startswith(f"format={FORMAT}/{FAILURES}/")]
    rows = [json.loads(content) for content in storage.read(failed)]
    return FACT_FAILURES.conform(pl.DataFrame(rows, schema=FACT_FAILURES.schema))


@dataclass(frozen=True, slots=True)
class FleetCounts:
    """Counts of a fleet: the sum over all parts, and the contributions of hosts."""

    whole: AttemptCounts
    leaves: pl.DataFrame
    """The ``fact_leaves`` table of all parts, with source and host."""
    by_host: pl.DataFrame
    """Result of :func:`host_squares`, for curves of leaves and makers."""

    def of_hosts(self) -> AttemptCounts:
        """Return the counts with sums over hosts, for curves with hosts as clusters."""
        sizes = (
            _requests_of_hosts(self.leaves)
            .group_by("leaf")
            .agg(host_clusters=pl.len().cast(pl.Int64), host_sizes=(pl.col("n_all") ** 2).sum())
        )
        added = self.by_host.group_by(*_HOST_CURVE[1:], "step").agg(
            pl.col("host_squares", "host_products").sum()
        )
        # Sums over hosts are additional rows: the counts of a step are summed over its rows.
        steps = pl.concat([self.whole.steps, added], how="diagonal")
        numbers = pl.selectors.numeric() - pl.selectors.by_name("leaf", "source", "td_id", "step")
        return replace(
            self.whole,
            steps=steps.with_columns(numbers.fill_null(0)),
            totals=self.whole.totals.join(sizes, on="leaf", how="left", maintain_order="left"),
        )

    def without(self, host: str, own: AttemptCounts) -> FleetCounts:
        """Return the counts without those of a host, by subtraction."""
        is_other = pl.col("host") != host
        return FleetCounts(
            subtracted(self.whole, own), self.leaves.filter(is_other), self.by_host.filter(is_other)
        )


def _requests_of_hosts(leaves: pl.DataFrame) -> pl.DataFrame:
    """Return the number of requests, n_all, by host and leaf."""
    return leaves.group_by("host", "leaf").agg(pl.col("n_all").sum())


def host_squares(by_host: pl.DataFrame, sums: pl.DataFrame) -> pl.DataFrame:
    """Add the contribution of each host and step to the squares and products of hosts.

    Args:
        by_host: n_more by host, curve and step.
        sums: Number of requests, n_all, by host and leaf.

    Returns:
        ``by_host`` with the columns host_squares and host_products.
    """
    rows = by_host.sort(*_HOST_CURVE, "step").with_columns(
        more=pl.col("n_more").cum_sum(reverse=True).over(_HOST_CURVE)
    )
    later = pl.col("more") - pl.col("n_more")
    squares = pl.col("more") ** 2 - later**2
    return (
        rows.join(sums, on=["host", "leaf"])
        .with_columns(host_squares=squares, host_products=pl.col("n_more") * pl.col("n_all"))
        .drop("more", "n_all")
    )


def count_fleet(facts: Facts, *, with_tds: bool = False) -> FleetCounts:
    """Sum the counts of all parts.

    Args:
        facts: The parts.
        with_tds: Whether to read the curves of TDs, which are most of the data.
    """
    host_of = facts.parts.select("source", "host")
    sums, hosts = [], []
    for rows in facts.tables("counts"):
        sums.append(added(rows.drop("_source")))
        own = rows.lazy().filter(pl.col("by").is_in(["leaf", "maker"]), pl.col("n_more") > 0)
        own = own.drop("source").join(host_of.lazy(), left_on="_source", right_on="source")
        hosts.append(own.group_by(*_HOST_CURVE, "step").agg(pl.col("n_more").sum()).collect())
    leaves = facts.table_with_hosts("leaves")
    totals = leaves.with_columns(
        source=pl.lit(None, pl.UInt16), td_id=pl.lit(None, pl.UInt64)
    ).select(ATTEMPT_TOTALS.schema.names())
    if with_tds:
        sums.append(facts.table("td_counts").select(ATTEMPT_COUNTS.schema.names()))
        totals = pl.concat([totals, facts.table("td_totals").select(totals.columns)])
    whole = AttemptCounts(added(pl.concat(sums)), added_totals(totals), has_makers=True)
    by_host = _complete_both_ways(pl.concat(hosts))
    return FleetCounts(whole, leaves, host_squares(by_host, _requests_of_hosts(leaves)))


def _complete_both_ways(rows: pl.DataFrame) -> pl.DataFrame:
    """Make the curves of hosts complete for both ways to count settled requests, busy and done.

    Parts without settled requests have rows ``none``, which are the same for both ways: if another
    part of the host has settled requests, they are added to both of its curves.
    """
    curve = ["host", "leaf", "by", "kind", "unit"]
    has_both = (pl.col("settled") != "none").any().over(curve)
    rows = rows.with_columns(has_both=has_both)
    either = rows.filter("has_both", pl.col("settled") == "none")
    dtype = rows.schema["settled"]
    doubled = [either.with_columns(settled=pl.lit(way, dtype)) for way in ("busy", "done")]
    kept = rows.filter(~pl.col("has_both") | (pl.col("settled") != "none"))
    whole = pl.concat([kept, *doubled]).drop("has_both")
    return whole.group_by(*curve, "settled", "step").agg(pl.col("n_more").sum())


def added(steps: pl.DataFrame) -> pl.DataFrame:
    """Return the sum of rows of ``attempt_counts``."""
    sums = steps.group_by(_STEP).agg(pl.col(_COUNTED).sum())
    return ATTEMPT_COUNTS.conform(sums.sort(_STEP))


def added_totals(totals: pl.DataFrame) -> pl.DataFrame:
    """Return the sum of rows of ``attempt_totals``."""
    return ATTEMPT_TOTALS.conform(_sums_of_totals(totals))


def _sums_of_totals(totals: pl.DataFrame) -> pl.DataFrame:
    return totals.group_by(_TOTAL).agg(pl.exclude(_TOTAL).sum()).sort(_TOTAL)


def subtracted(whole: AttemptCounts, part: AttemptCounts) -> AttemptCounts:
    """Subtract counts of a part; rows whose counts all become 0 are removed."""
    negative = [
        rows.with_columns(
            -pl.col(c).cast(pl.Int64) if rows.schema[c].is_integer() else -pl.col(c)
            for c in rows.columns
            if c not in keys
        )
        for rows, keys in ((part.steps, _STEP), (part.totals, _TOTAL))
    ]
    signed = whole.totals.cast({"n_requests": pl.Int64})
    steps = added(pl.concat([whole.steps, negative[0]]))
    sums = _sums_of_totals(pl.concat([signed, negative[1]]))
    is_left = pl.any_horizontal(pl.col(name) != 0 for name in _COUNTED)
    left = sums.filter(pl.col("n_requests") > 0).cast({"n_requests": pl.UInt64})
    return replace(whole, steps=steps.filter(is_left), totals=ATTEMPT_TOTALS.conform(left))


def recorded_of(facts: Facts, leaves: pl.DataFrame, *, with_pace: bool = True) -> RecordedRequests:
    """Return the inputs of limits other than curves.

    Args:
        facts: The parts.
        leaves: ``fact_leaves`` of these parts, with source.
        with_pace: Whether to compute the median pace from its histogram.
    """
    counted = leaves.group_by("leaf").agg(
        pl.col("n_requests", "n_tds", "n_retried", "n_begin_lost").sum()
    )
    paces = _medians(facts.table("cells").filter(pl.col("duration") == "pace")) if with_pace else []
    pace = pl.DataFrame(paces, schema={"leaf": pl.UInt16, "pace_ns": pl.Float64}, orient="row")
    counted = counted.join(pace, on="leaf", how="left")
    policies = leaves.select(
        "source", "leaf", "n_retried", "calls", "n_given_up", "may_kick", "is_kicked"
    )
    parts = facts.parts
    known = not parts["observed_ns"].null_count()
    vm_s = float(parts["vm_ns"].sum()) / 1e9 if known and parts["vm_ns"].sum() else None
    seconds = int(parts["observed_ns"].sum()) / 1e9 if known else None
    return RecordedRequests(
        counted.sort("n_retried", "n_requests", "leaf", descending=[True, True, False]),
        policies.sort("source", "leaf"),
        Exposure(seconds, vm_s, int(parts["n_pages"].sum())),
        int(parts["n_losses"].sum()),
    )


def _medians(cells: pl.DataFrame) -> list[tuple[int, float]]:
    """Return the median duration of each leaf, with the resolution of a cell."""
    found = []
    for (leaf,), rows in cells.group_by("leaf"):
        sums = rows.group_by("cell").agg(pl.col("n").sum()).sort("cell")
        upto, n = sums["n"].cum_sum(), int(sums["n"].sum())
        # For an even number, the mean of the two middle values.
        middles = [
            middle_of(float(sums["cell"][int((upto > place).arg_max() or 0)]))
            for place in ((n - 1) // 2, n // 2)
        ]
        found.append((int(str(leaf)), sum(middles) / 2))
    return found
