"""Findings and reports as plain data for JSON: ``--json``, ``findings.json``, ``report.json``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import polars as pl

from tdxtrace import __version__
from tdxtrace.report.findings_text import worst_chains
from tdxtrace.report.section import Section
from tdxtrace.tables.catalog import SCHEMA_VERSION
from tdxtrace.tables.trace import Findings
from tdxtrace.tdx.leaves import leaf_name

# Retry chains that are listed; all of them are in retry_chains.parquet.
_N_WORST: Final = 100
# Maximum rows of a table in a report; analyze --output writes all of them as Parquet.
_N_ROWS: Final = 1000


def findings_data(findings: Findings) -> dict[str, Any]:
    """Return findings as JSON-ready data.

    Tables have all rows, in the table's order and with its column names, except that of
    ``retry_chains`` only the _N_WORST with the most attempts are listed, as ``worst_chains``.
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


def report_data(title: str, sections: Sequence[Section], findings: Findings) -> dict[str, Any]:
    """Return a report as JSON-ready data: its sentences, and the tables behind them.

    Rows satisfy the schemas of their tables.  ``retry_chains`` has the _N_WORST with the most
    attempts, other tables at most _N_ROWS rows; ``n_rows`` has the number of rows of each.
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
