"""Findings as plain data: what ``--json`` prints and ``findings.json`` holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import polars as pl

from tdxtrace import __version__
from tdxtrace.report.sections import Section
from tdxtrace.report.text import worst_chains
from tdxtrace.tables.catalog import SCHEMA_VERSION
from tdxtrace.tables.trace import Findings
from tdxtrace.tdx.leaves import leaf_name

# Retry chains that are listed one by one; all of them are in retry_chains.parquet.
_N_WORST: Final = 100
# Rows of a table in a report: more belong into the Parquet of analyze --output.
_N_ROWS: Final = 1000


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


def report_facts(title: str, sections: Sequence[Section], findings: Findings) -> dict[str, Any]:
    """Return a report as JSON-ready data: its sentences, and the tables they rest on.

    Tables are whole and keep their contracts, but of ``retry_chains`` those with most attempts
    are listed, and of no table more than _N_ROWS rows: ``n_rows`` says how many there are.
    """
    tables = findings.tables() | {"retry_chains": worst_chains(findings.retry_chains, _N_WORST)}
    return {
        "schema_version": SCHEMA_VERSION,
        "tdxtrace": __version__,
        "title": title,
        "provenance": findings.provenance.to_dict(),
        "options": dict(findings.options),
        "sections": [
            {
                "name": section.name,
                "title": section.title,
                "definition": section.definition,
                "says": list(section.says),
            }
            for section in sections
        ],
        "n_rows": {name: rows.height for name, rows in findings.tables().items()},
        "tables": {name: rows.head(_N_ROWS).to_dicts() for name, rows in tables.items()},
    }
