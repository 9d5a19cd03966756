"""A notebook to start from: open a trace, look, ask, change a policy."""

from __future__ import annotations

import json
from typing import Any, Final

# A trace for those who have none: the simulator's, like a host under a zero-step attack.
_SIMULATED: Final = "simulated.txt"
_SIMULATE: Final = (
    "import sys\n\n"
    f"!{{sys.executable}} -m tdxtrace simulate zero_step_attack --seed 7 -o {_SIMULATED} --force"
)
_CELLS: Final = (
    (
        "markdown",
        "# How often is a SEAMCALL retried, and whose fault is it?\n\n"
        "Run the cells from top to bottom, then change them. Every table is a polars frame, "
        "every chart an Altair chart.",
    ),
    ("open", ""),
    (
        "markdown",
        "## What it means\n\n"
        "`analyze` joins the attempts at one request into retry chains and answers the "
        "questions; answers that take longer are found when they are first looked at.",
    ),
    ("code", "findings = tdxtrace.analyze(trace)\nfindings"),
    ("code", "findings.leaf_stats"),
    ("markdown", "## Whose fault it is\n\nEach verdict names the rows and the rule behind it."),
    ("code", 'findings.verdicts.select("verdict", "n_rows", "sentence", "evidence")'),
    ("markdown", "## The charts of the report"),
    (
        "code",
        "import altair as alt\n\n"
        "# Pictures, which need no network. Charts that answer to the mouse: "
        '"default".\n'
        'alt.renderers.enable("svg")\n'
        "charts = tdxtrace.charts(findings)\n"
        "charts",
    ),
    ("code", '"attempts" in charts and charts["attempts"]'),
    ("code", '"timeline" in charts and charts["timeline"]'),
    (
        "markdown",
        "## Ask with polars, or in SQL\n\n"
        "What was answered busy, and how often? Both say the same.",
    ),
    (
        "code",
        "import polars as pl\n\n"
        'busy = trace.seamcalls.filter(pl.col("status") != 0)\n'
        'busy.group_by("leaf", "status").len().sort("len", descending=True)',
    ),
    (
        "code",
        "trace.sql(\n"
        '    """\n'
        "    select name, status, count(*) as n\n"
        "    from seamcalls join leaves using (leaf)\n"
        "    where status != 0\n"
        "    group by name, status\n"
        "    order by n desc\n"
        '    """\n'
        ")",
    ),
    (
        "markdown",
        "## Change a policy\n\n"
        "What if the host gave up after 4 attempts, or after 100 us? The same requests, replayed.",
    ),
    (
        "code",
        "from tdxtrace.recommend.policy_definitions import policy_named\n"
        "from tdxtrace.recommend.replay import policies\n\n"
        'wanted = [policy_named(name, {}) for name in ("fixed-4", "budget-100us", "mainline")]\n'
        "replayed = policies(findings.retry_chains, findings.busy_answers, wanted)\n"
        'replayed.select("policy", "leaf", "n_requests", "n_exceeding", "exceeding_high")',
    ),
)


def notebook(trace: str | None) -> str:
    """Return a notebook (format 4.5) that begins with ``trace``, or with a simulated one.

    Args:
        trace: Path as it is to stand in the notebook; None: simulate one.
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
    told = {
        "cells": cells,
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(told, indent=1, ensure_ascii=True) + "\n"


def _open(trace: str | None) -> str:
    """The first cell of code; a path is written as Python writes text."""
    simulated = "" if trace is not None else _SIMULATE + "\n"
    first = f"import tdxtrace\n\ntrace = tdxtrace.read_trace({trace or _SIMULATED!r})\ntrace"
    return simulated + first
