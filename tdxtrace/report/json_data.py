"""Findings and reports as plain data for JSON: ``--json``, ``findings.json``, ``report.json``."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Any, Final

import polars as pl

from tdxtrace import __version__
from tdxtrace.report.findings_text import worst_chains
from tdxtrace.report.origin import Origin
from tdxtrace.report.section import Section
from tdxtrace.tables.catalog import SCHEMA_VERSION
from tdxtrace.tables.trace import Findings
from tdxtrace.tdx.leaves import leaf_name

# Maximum number of retry chains listed; retry_chains.parquet has all of them.
_N_WORST: Final = 100

# Non-ASCII characters are escaped: some, such as those for text direction, control terminals.
_NOT_ASCII: Final = re.compile(r"[^\x00-\x7f]")


def findings_data(findings: Findings) -> dict[str, Any]:
    """Return findings as JSON-ready data.

    Tables are complete, in the table's order and with its column names, except ``retry_chains``:
    only the _N_WORST chains with the most attempts are listed, as ``worst_chains``.
    """
    names = pl.col("leaf").pipe(leaf_name).alias("leaf_name")
    return {
        "schema_version": SCHEMA_VERSION,
        "provenance": findings.provenance.to_dict(),
        "options": dict(findings.options),
        "n_seamcalls": int(findings.leaf_stats["n_seamcalls"].sum()),
        "n_requests": int(findings.leaf_stats["n_requests"].sum()),
        "retried_seamcalls": int(findings.leaf_stats["retried_seamcalls"].sum()),
        "leaf_stats": findings.leaf_stats.with_columns(names).to_dicts(),
        "vm_stats": findings.vm_stats.to_dicts(),
        "vcpu_stats": findings.vcpu_stats.to_dicts(),
        "zero_steps": findings.zero_steps.to_dicts(),
        "worst_chains": worst_chains(findings.scan("retry_chains"), _N_WORST)
        .with_columns(names)
        .to_dicts(),
        "losses": findings.losses.to_dicts(),
    }


def report_json(title: str, sections: Sequence[Section], findings: Findings, made: Origin) -> bytes:
    """Return a report as JSON: its sentences, and all rows of the finding tables.

    Rows satisfy the schemas of their tables and keep the order of the table.
    """
    tables = findings.tables()
    head = {
        "schema_version": SCHEMA_VERSION,
        "tdxtrace": __version__,
        "title": title,
        "made": dataclasses.asdict(made),
        "provenance": findings.provenance.to_dict(),
        "options": dict(findings.options),
        "sections": [
            {
                "name": section.name,
                "title": section.title,
                "definition": section.definition,
                "says": list(section.says),
                "problems": [dataclasses.asdict(problem) for problem in section.problems],
            }
            for section in sections
        ],
        "n_rows": {name: rows.height for name, rows in tables.items()},
    }
    # Write rows as text, without a Python object per row: tables may have millions of rows.
    rows = ",\n".join(
        f"    {json.dumps(name)}: [\n{_rows_json(rows)}]" for name, rows in tables.items()
    )
    opened = json.dumps(head, indent=2).removesuffix("\n}")
    return f'{opened},\n  "tables": {{\n{rows}\n  }}\n}}\n'.encode()


def _rows_json(rows: pl.DataFrame) -> str:
    """Return the rows of a table as JSON objects, one per line."""
    lines = rows.write_ndjson().rstrip("\n")
    if not lines.isascii():
        lines = _NOT_ASCII.sub(lambda found: json.dumps(found[0])[1:-1], lines)
    return lines.replace("\n", ",\n") + ("\n" if lines else "")
