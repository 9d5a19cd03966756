"""Findings as plain data: what ``--json`` prints and ``findings.json`` holds."""

from __future__ import annotations

from typing import Any, Final

import polars as pl

from tdxtrace.report.text import worst_chains
from tdxtrace.tables.catalog import SCHEMA_VERSION
from tdxtrace.tables.trace import Findings
from tdxtrace.tdx.leaves import leaf_name

# Retry chains that are listed one by one; all of them are in retry_chains.parquet.
_N_WORST: Final = 100


def facts(findings: Findings) -> dict[str, Any]:
    """Return findings as JSON-ready data.

    Every table but ``retry_chains`` and ``threads`` is whole, rows in the table's
    order with the column names of its schema; of the retry chains those with most
    attempts are listed.
    """
    names = pl.col("leaf").pipe(leaf_name).alias("leaf_name")
    return {
        "schema_version": SCHEMA_VERSION,
        "provenance": findings.provenance.to_dict(),
        "options": dict(findings.options),
        "n_seamcalls": int(findings.leaf_stats["n_seamcalls"].sum()),
        "n_requests": findings.retry_chains.height,
        "retried_seamcalls": int(findings.leaf_stats["retried_seamcalls"].sum()),
        "leaf_stats": findings.leaf_stats.with_columns(names).to_dicts(),
        "vm_stats": findings.vm_stats.to_dicts(),
        "vcpu_stats": findings.vcpu_stats.to_dicts(),
        "zero_steps": findings.zero_steps.to_dicts(),
        "worst_chains": worst_chains(findings.retry_chains, _N_WORST)
        .with_columns(names)
        .to_dicts(),
        "losses": findings.losses.to_dicts(),
    }
