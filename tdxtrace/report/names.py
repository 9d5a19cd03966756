"""Display names of leaves and threads, and definitions of tables."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Final

import polars as pl

from tdxtrace.tables.schema import Table
from tdxtrace.tables.text import one_line
from tdxtrace.tables.trace import Findings
from tdxtrace.tdx.leaves import leaf_table

VALID_FOR: Final = "valid only for this workload, module, vCPU count and policy"
"""Note on a recommended limit."""
Thread = tuple[int, int | None]
"""Source and thread ID."""


@cache
def _leaf_names() -> Mapping[int, str]:
    return dict(leaf_table().select("leaf", "name").rows())


def leaf_label(leaf: int) -> str:
    """Return a leaf's name without TDH., or its number.

    Example:
        >>> leaf_label(6), leaf_label(999)
        ('MEM.PAGE.AUG', 'leaf 999')
    """
    return _leaf_names().get(leaf, f"leaf {leaf}").removeprefix("TDH.")


def leaf_labels(leaf: pl.Expr) -> pl.Expr:
    """Return :func:`leaf_label` of a column."""
    return leaf.replace_strict(
        {number: leaf_label(number) for number in _leaf_names()},
        default=pl.lit("leaf ") + leaf.cast(pl.String),
        return_dtype=pl.String,
    )


class Threads:
    """Display names of threads, escaped for a terminal."""

    def __init__(self, findings: Findings) -> None:
        self._comms: dict[Thread, str] = {}
        for source, tid, comm in findings.threads.select("source", "tid", "comm").iter_rows():
            # A thread starts with its parent's name, so its last recorded name is its own.
            self._comms[source, tid] = one_line(comm, 24)
        self._vcpus = {
            (source, tid): vcpu
            for source, tid, vcpu in findings.vcpu_stats.select("source", "tid", "vcpu_id")
            .drop_nulls()
            .iter_rows()
        }
        self._has_several_sources = len(findings.provenance.sources) > 1

    def label(self, source: int, tid: int | None) -> str:
        """Return e.g. ``CPU 3/KVM-1234``, with the vCPU number if the name does not contain it."""
        if tid is None:
            return "thread not recorded"
        comm = self._comms.get((source, tid), "thread")
        vcpu = self._vcpus.get((source, tid))
        has_number = vcpu is None or comm.startswith(f"CPU {vcpu}/")
        where = f"{source}: " if self._has_several_sources else ""
        return where + ("" if has_number else f"vCPU {vcpu}: ") + f"{comm}-{tid}"


def definition(table: Table) -> str:
    """Return the definition of a table in one sentence: its meaning, else its grain."""
    return table.meaning or table.grain[0].upper() + table.grain[1:] + "."
