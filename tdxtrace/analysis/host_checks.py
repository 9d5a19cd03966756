"""The ``host_checks`` table: known weaknesses of the TDX module reported in a kernel log."""

from __future__ import annotations

import re
from typing import Any

import polars as pl

from tdxtrace.analysis.causes.generation import module_release
from tdxtrace.tables.builds import HOST_CHECKS, WEAKNESSES
from tdxtrace.tables.events import KERNEL_MESSAGES
from tdxtrace.tables.trace import Trace
from tdxtrace.tdx.facts import records


def host_checks(trace: Trace) -> pl.DataFrame:
    """List for each kernel log which known weaknesses its TDX module has.

    A weakness is "unknown" if the source of the release was not read, or the log does not contain
    the full release, or the log contains two releases, as after a module update.

    Args:
        trace: The trace; only its kernel logs are used.

    Returns:
        The ``host_checks`` table: every weakness for each input with kernel messages.

    Source:
        The rows of ``module_weaknesses.csv``.
    """
    messages = KERNEL_MESSAGES.conform(trace.kernel_messages)
    facts = records("module_weaknesses")
    rows = []
    for source in messages["source"].unique().sort():
        release = module_release(messages.filter(pl.col("source") == source))
        version, generation = (None, None) if release is None else release
        for weakness in WEAKNESSES:
            own = [fact for fact in facts if fact["weakness"] == weakness]
            known = [fact for fact in own if version is not None and _covers(fact, version)]
            row: dict[str, Any] = {"source": source, "weakness": weakness}
            row |= {"module_version": version, "generation": generation}
            row |= {"meaning": own[0]["meaning"], "affected": "unknown"}
            row["basis"] = "; ".join(str(fact["source"]) for fact in known or own)
            row |= {"affected": known[0]["affected"]} if known else {}
            rows.append(row)
    return HOST_CHECKS.conform(pl.DataFrame(rows, schema=HOST_CHECKS.schema))


def _covers(fact: dict[str, str | None], version: str) -> bool:
    """Return whether a row of facts covers a release such as "1.5.16" or "1.5.05.46.698"."""
    found = re.match(r"(?<!\d)(\d++\.\d++)(?:\.(\d++))?", version)
    if found is None or fact["series"] != found[1]:
        return False
    if fact["first"] is None or fact["last"] is None:
        return True
    return found[2] is not None and int(fact["first"]) <= int(found[2]) <= int(fact["last"])
