"""The facts of one trace: counts that can be summed over traces, without private data.

TDs are numbered by their first request; threads, addresses and texts of a trace are left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from io import BytesIO
from typing import Any, Final

import numpy as np
import polars as pl

from tdxtrace import __version__
from tdxtrace.analysis.attempts import count_attempts
from tdxtrace.ingest.histogram import Histogram
from tdxtrace.recommend.limits import exposure_of, leaves_of, observed_seconds
from tdxtrace.recommend.recorded import recorded_policies
from tdxtrace.tables.causes import CAUSE_SHARES
from tdxtrace.tables.findings import VM_STATS
from tdxtrace.tables.fleet import (
    ATTEMPT_COUNTS,
    ATTEMPT_TOTALS,
    CELLS_PER_OCTAVE,
    DURATIONS,
    FACT_CELLS,
    FACT_LEAVES,
    FACT_RARE,
)
from tdxtrace.tables.histograms import FACT_REQUESTS
from tdxtrace.tables.pace import pace_ns
from tdxtrace.tables.schema import Table
from tdxtrace.tables.trace import Findings, Trace
from tdxtrace.tdx.releases import generation_of

# Increment when a column of a fact, or its definition, changes: facts of different formats cannot
# be summed.
FORMAT: Final = 1
PROVENANCE: Final = "provenance.json"
UNKNOWN: Final = "unknown"
# Format of a part that was counted in the kernel; recordings have the name of their reader.
HISTOGRAM: Final = "histogram"

# Files of a part, with the table of each. Limits need only counts and leaves; curves of TDs, which
# are most of the rows, are in separate files. A recording fills all but requests, a histogram only
# that one.
FILES: Final[Mapping[str, Table]] = {
    "counts": ATTEMPT_COUNTS,
    "leaves": FACT_LEAVES,
    "td_counts": ATTEMPT_COUNTS,
    "td_totals": ATTEMPT_TOTALS,
    "shares": CAUSE_SHARES,
    "vms": VM_STATS,
    "cells": FACT_CELLS,
    "rare": FACT_RARE,
    "requests": FACT_REQUESTS,
}


@dataclass(frozen=True, slots=True)
class Identity:
    """Host, date, kernel and module of a trace, from its path, its content or the user."""

    host: str = UNKNOWN
    date: str = UNKNOWN
    kernel: str = UNKNOWN
    module: str = UNKNOWN


@dataclass(frozen=True, slots=True)
class Part:
    """The facts of one trace."""

    provenance: dict[str, Any]
    """A row of ``fact_parts``."""
    tables: dict[str, pl.DataFrame]
    """Tables by the names in FILES."""

    def files(self) -> dict[str, bytes]:
        """Return the content of each file, deterministically; the provenance is last."""
        written = {}
        for name, rows in self.tables.items():
            buffer = BytesIO()
            table = FILES[name].conform(rows)
            # Many small files: LZ4 is read a third faster than zstd, and is not larger.
            table.write_parquet(buffer, statistics=False, compression="lz4")
            written[f"{name}.parquet"] = buffer.getvalue()
        known = {"rows": {name: rows.height for name, rows in self.tables.items()}}
        words = json.dumps(self.provenance | known, indent=1, sort_keys=True)
        return written | {PROVENANCE: f"{words}\n".encode()}


def part_of(trace: Trace, findings: Findings, identity: Identity, **known: str) -> Part:
    """Compute the facts of a trace.

    Args:
        trace: The trace, with one input.
        findings: Findings of the whole trace.
        identity: Host, date, kernel and module.
        known: part and origin of ``fact_parts``.
    """
    chains = findings.retry_chains
    counts = count_attempts(chains, findings.busy_answers, findings.scan("busy_causes"))
    seconds = observed_seconds(findings.provenance)
    exposure = exposure_of(chains, 0.0)
    source = findings.provenance.sources[0]
    number_of = _td_numbers(findings)
    is_td = pl.col("by") == "td"
    tables = {
        "counts": counts.steps.filter(~is_td),
        "leaves": _leaves(chains, counts.totals),
        "td_counts": _numbered(counts.steps.filter(is_td), number_of),
        "td_totals": _numbered(counts.totals.filter(pl.col("td_id").is_not_null()), number_of),
        "shares": findings.cause_shares,
        "vms": _numbered(findings.vm_stats, number_of),
        "cells": _cells(trace, findings),
        "rare": _rare(findings),
        "requests": FACT_REQUESTS.empty(),
    }
    lost = findings.losses.filter(pl.col("severity") == "data_loss").height
    return _part(
        tables,
        identity,
        **known,
        format=source.format,
        n_bytes=source.n_bytes,
        observed_ns=None if seconds is None else round(seconds * 1e9),
        vm_ns=round((exposure.vm_s or 0.0) * 1e9),
        n_pages=exposure.n_pages,
        n_losses=lost,
        tdxtrace=findings.provenance.tdxtrace,
    )


def part_of_histogram(found: Histogram, n_bytes: int, identity: Identity, **known: str) -> Part:
    """Compute the facts of a histogram that was counted in the kernel.

    Args:
        found: The histogram.
        n_bytes: Size of its file.
        identity: Host, date, kernel and module.
        known: part and origin of ``fact_parts``.
    """
    requests = found.requests.group_by(FACT_REQUESTS.key).agg(pl.col("n_requests").sum())
    tables = {name: table.empty() for name, table in FILES.items()} | {"requests": requests}
    return _part(
        tables,
        identity,
        **known,
        format=HISTOGRAM,
        n_bytes=n_bytes,
        observed_ns=found.last_ns - found.first_ns,
        vm_ns=0,
        n_pages=0,
        n_losses=found.n_not_kept + sum(found.cannot.values()),
        tdxtrace=__version__,
    )


def _part(
    tables: Mapping[str, pl.DataFrame],
    identity: Identity,
    **recorded: Any,  # noqa: ANN401 - the columns of fact_parts differ in type
) -> Part:
    """Return a part with its rows in the order of their keys."""
    generation = generation_of(identity.module) or UNKNOWN
    ordered = {n: rows.sort(FILES[n].key, nulls_last=True) for n, rows in tables.items()}
    return Part({**asdict(identity), "generation": generation, **recorded}, ordered)


def _leaves(chains: pl.DataFrame, totals: pl.DataFrame) -> pl.DataFrame:
    policies = recorded_policies(chains).drop("source", "n_retried")
    return FACT_LEAVES.conform(
        totals.filter(pl.col("td_id").is_null())
        .join(leaves_of(chains).drop("n_requests", "pace_ns"), on="leaf")
        .join(policies, on="leaf")
        .cast({"n_tds": pl.UInt64, "n_retried": pl.UInt64, "n_begin_lost": pl.UInt64})
        .cast({"n_given_up": pl.UInt32})
    )


def _td_numbers(findings: Findings) -> pl.DataFrame:
    """Return td_id and number of each TD, from 1 in the order of first requests."""
    tds = pl.concat(
        [findings.retry_chains.select("td_id"), findings.vm_stats.select("td_id")]
    ).drop_nulls()
    return tds.unique(maintain_order=True).with_row_index("number", offset=1)


def _numbered(rows: pl.DataFrame, number_of: pl.DataFrame) -> pl.DataFrame:
    """Replace the address of the TD in each row by its number."""
    numbered = rows.join(number_of, on="td_id", how="left", maintain_order="left")
    return numbered.with_columns(td_id=pl.col("number").cast(pl.UInt64)).drop("number")


def _cells(trace: Trace, findings: Findings) -> pl.DataFrame:
    """Return the ``fact_cells`` table: histograms of durations."""
    retried = findings.retry_chains.filter(pl.col("n_attempts") > 1)
    busy = trace.scan("seamcalls").join(
        findings.busy_answers.lazy().select("source", "seq"), on=("source", "seq"), how="semi"
    )
    durations = {
        "pace": retried.select("leaf", ns=pace_ns()),
        "request": retried.select("leaf", ns=pl.col("took_ns").cast(pl.Float64)),
        "busy": busy.select(
            "leaf", ns=(pl.col("end_ns") - pl.col("start_ns")).cast(pl.Float64)
        ).collect(),
    }
    parts = [
        rows.drop_nulls()
        .with_columns(cell=pl.Series(cell_of(rows.drop_nulls()["ns"].to_numpy())))
        .group_by("leaf", "cell")
        .agg(n=pl.len().cast(pl.UInt64))
        .with_columns(duration=pl.lit(name, pl.Enum(DURATIONS)))
        for name, rows in durations.items()
    ]
    return FACT_CELLS.conform(pl.concat(parts))


def cell_of(ns: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.uint16]]:
    """Return the cell of each duration in ns.

    Example:
        >>> cell_of(np.array([0.0, 1.0, 2.0, 1000.0])).tolist()
        [0, 0, 64, 637]
    """
    cells: np.ndarray[Any, np.dtype[np.uint16]]
    cells = np.floor(np.log2(np.maximum(ns, 1.0)) * CELLS_PER_OCTAVE).astype(np.uint16)
    return cells


def middle_of(cell: float) -> float:
    """Return the geometric middle of a cell in ns.

    Example:
        >>> round(middle_of(637))
        997
    """
    ns: float = 2 ** ((cell + 0.5) / CELLS_PER_OCTAVE)
    return ns


def _rare(findings: Findings) -> pl.DataFrame:
    """Return the ``fact_rare`` table; its names are tdxtrace's, never texts of the trace."""
    leaf = FACT_RARE.schema["leaf"]
    tables = {
        "zero_step": (findings.zero_steps, "form", "ended"),
        "broken_rule": (findings.broken_rules, "rule", "confidence"),
        "verdict": (findings.verdicts, "verdict", "rule"),
        "loss": (findings.losses, "kind", "severity"),
    }
    parts = []
    for what, (rows, name, detail) in tables.items():
        of_leaf = pl.col("leaf") if "leaf" in rows.columns else pl.lit(None, leaf)
        kept = rows.select(
            pl.lit(what, FACT_RARE.schema["what"]).alias("what"),
            pl.col(name).cast(pl.String).alias("name"),
            pl.col(detail).cast(pl.String).alias("detail"),
            of_leaf.alias("leaf"),
        )
        parts.append(kept)
    counted = pl.concat(parts).group_by("what", "name", "detail", "leaf")
    return FACT_RARE.conform(counted.agg(n=pl.len().cast(pl.UInt64)))
