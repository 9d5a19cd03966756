"""The ``verdicts`` table: BUG, EXPECTED, HOSTILE or UNDECIDED, per group of findings."""

from __future__ import annotations

from typing import Final

import polars as pl

from tdxtrace.analysis.verdicts.busy import on_broken_rules, on_busy
from tdxtrace.analysis.verdicts.outcomes import on_abandoned, on_loops, on_messages
from tdxtrace.analysis.verdicts.zero_steps import on_zero_steps
from tdxtrace.tables.trace import Findings, Trace
from tdxtrace.tables.verdicts import VERDICTS

_VERDICT_ORDER: Final = {"BUG": 0, "HOSTILE": 1, "UNDECIDED": 2, "EXPECTED": 3}


def verdicts(findings: Findings, trace: Trace, *, generation: str | None = None) -> pl.DataFrame:
    """Judge every busy answer, zero-step episode, abandoned request, loop and message.

    Findings with the same explanation form one group: the verdict, one sentence, up to five
    rows of evidence, the rule that decided and its source.  A false accusation is worse than
    none: BUG and HOSTILE require sure evidence; otherwise the verdict is UNDECIDED and says
    which capture would decide it.

    Args:
        findings: Causes of busy answers and zero-steps, abandoned requests, loops.
        trace: The events they were found in.
        generation: Lock generation of the module, where it is known.

    Returns:
        The ``verdicts`` table: BUG first, then HOSTILE, UNDECIDED, EXPECTED; within each the
        largest group first.

    Raises:
        TableError: If an argument lacks a column or has one of another type.
    """
    parts = [
        on_busy(findings.busy_causes, findings.broken_rules),
        on_broken_rules(findings.broken_rules, findings.busy_causes),
        on_zero_steps(findings.zero_steps, findings.zero_step_causes, trace, generation),
        on_abandoned(findings.abandoned_requests),
        on_loops(findings.progress_loops),
        on_messages(trace.kernel_messages),
    ]
    rank = pl.col("verdict").cast(pl.String).replace_strict(_VERDICT_ORDER, return_dtype=pl.Int8)
    found = pl.concat([VERDICTS.empty(), *parts])
    return VERDICTS.conform(
        found.sort(rank, -pl.col("n_rows").cast(pl.Int64), "source", "what", maintain_order=True)
    )
