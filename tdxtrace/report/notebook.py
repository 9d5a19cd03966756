"""Starter notebook: read a trace, display findings and charts, query, replay policies."""

from __future__ import annotations

import json
from typing import Any, Final

# File of the simulated trace (a host under a zero-step attack) used if no trace is given.
_SIMULATED: Final = "simulated.txt"
_SIMULATE: Final = (
    "import sys\n\n"
    f"!{{sys.executable}} -m tdxtrace simulate zero_step_attack --seed 7 -o {_SIMULATED} --force"
)
_CELLS: Final = (
    (
        "markdown",
        "# SEAMCALL retries: attempts, causes and verdicts\n\n"
        "Run the cells from top to bottom, then change them. Every table is a polars data frame, "
        "every chart an Altair chart.",
    ),
    ("open", ""),
    (
        "markdown",
        "## Findings\n\n"
        "`analyze` joins the attempts at one request into retry chains and computes the finding "
        "tables; those that take longer are computed on first access.",
    ),
    ("code", "findings = tdxtrace.analyze(trace)\nfindings"),
    (
        "code",
        "import polars as pl\n\n"
        "pl.Config.set_fmt_str_lengths(400)\n"
        "# named: leaves and statuses by name, not by number.\n"
        'findings.named("leaf_stats")',
    ),
    ("markdown", "## Verdicts\n\nEach verdict names its evidence rows and its rule."),
    ("code", 'findings.verdicts.select("verdict", "n_rows", "sentence", "evidence")'),
    ("markdown", "## The charts of the report"),
    (
        "code",
        "import altair as alt\n\n"
        "# Static images, which need no network. For interactive charts: "
        '"default".\n'
        'alt.renderers.enable("svg")\n'
        "charts = tdxtrace.charts(findings)\n"
        "charts",
    ),
    ("code", 'charts["attempts"] if "attempts" in charts else "no request was retried"'),
    ("code", 'charts["timeline"] if "timeline" in charts else "no request was retried"'),
    (
        "markdown",
        "## Life of the TDs\n\n"
        "Accepted memory, boot, guest calls, module updates and KVM's counters, as far as the "
        "trace shows them.",
    ),
    (
        "code",
        "names = (\n"
        '    *("accept_rates", "boot_phases", "measurement_log"),\n'
        '    *("tdvmcalls", "module_updates", "counters"),\n'
        ")\n"
        "lives = {name: findings.named(name) for name in names}\n"
        "for name, table in lives.items():\n"
        "    if not table.is_empty():\n"
        '        display(f"{name}: {table.height:,} rows", table.head(8))',
    ),
    (
        "markdown",
        "## Query with polars or SQL\n\nBusy answers by leaf; both queries give the same rows.",
    ),
    (
        "code",
        'findings.named("busy_answers").group_by("leaf").len("n").sort("n", descending=True)',
    ),
    (
        "code",
        "findings.sql(\n"
        '    """\n'
        "    select name as leaf, count(*) as n\n"
        "    from busy_answers join leaves using (leaf)\n"
        "    group by name\n"
        "    order by n desc\n"
        '    """\n'
        ")",
    ),
    (
        "markdown",
        "Tables support the Arrow PyCapsule interface: pyarrow, pandas, DuckDB and ibis read them "
        "directly. This cell skips packages that are not installed.",
    ),
    ("code", "import pyarrow as pa\n\npa.table(findings.retry_chains).schema"),
    (
        "code",
        "from importlib.util import find_spec\n\n"
        'chains = findings.named("retry_chains")\n'
        'if find_spec("duckdb"):\n'
        "    import duckdb\n\n"
        '    print(duckdb.sql("select leaf, outcome, count(*) n from chains group by all"))\n'
        'if find_spec("pandas"):\n'
        '    print(pa.table(chains).to_pandas()["took_ns"].describe())',
    ),
    (
        "markdown",
        "## Replay other policies\n\n"
        "The requests of the trace, replayed with limits of 4 attempts, 100 us, and as mainline.",
    ),
    (
        "code",
        'names = ("fixed-4", "budget-100us", "mainline")\n'
        "wanted = [tdxtrace.policy_named(name) for name in names]\n"
        "replayed = tdxtrace.policies(findings.retry_chains, findings.busy_answers, wanted)\n"
        'columns = ["policy", "leaf", "n_requests", "n_exceeding", "exceeding_high"]\n'
        "findings.named(replayed).select(columns)",
    ),
    (
        "markdown",
        "## Limits and the report\n\n"
        "The smallest limit that 99 % of requests keep, with 95 % confidence; then the HTML "
        "report.",
    ),
    (
        "code",
        "target = tdxtrace.parse_target(target=1e-2)\n"
        "limits = tdxtrace.limits(\n"
        "    findings.attempts, findings.retry_chains, findings.losses, target=target\n"
        ")\n"
        'findings.named(limits).select("leaf", "made_by", "unit", "limit", "reason")',
    ),
    ("code", 'tdxtrace.write_report(findings, "report.html", force=True)'),
)


def notebook(trace: str | None) -> str:
    """Return a notebook (nbformat 4.5) that reads ``trace``, or a simulated trace.

    Args:
        trace: Path as written into the notebook; None: simulate a trace.
    """
    cells = []
    for place, (kind, text) in enumerate(_CELLS):
        shown = _open(trace) if kind == "open" else text
        cell: dict[str, Any] = {
            "cell_type": "markdown" if kind == "markdown" else "code",
            "id": f"cell-{place}",
            "metadata": {},
            "source": shown.splitlines(keepends=True),
        }
        if kind != "markdown":
            cell |= {"execution_count": None, "outputs": []}
        cells.append(cell)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    book = {
        "cells": cells,
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(book, indent=1, ensure_ascii=True) + "\n"


def _open(trace: str | None) -> str:
    """Return the first code cell; the path is a Python literal."""
    simulated = "" if trace is not None else _SIMULATE + "\n"
    first = f"import tdxtrace\n\ntrace = tdxtrace.read_trace({trace or _SIMULATED!r})\ntrace"
    return simulated + first
