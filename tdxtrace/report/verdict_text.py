"""Verdicts as text for a terminal: sentence, evidence and rule of each."""

from __future__ import annotations

from typing import Any, Final

import polars as pl
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from tdxtrace.report.units import count, word
from tdxtrace.tables.text import one_line
from tdxtrace.tdx.leaves import leaf_name

_STYLE: Final = {
    "BUG": "bold red",
    "HOSTILE": "bold magenta",
    "UNDECIDED": "bold yellow",
    "EXPECTED": "bold green",
}
_NONE: Final = "no verdict: nothing was busy, refused, abandoned, repeated or printed"
_MAX_LINE: Final = 600


def verdict_text(verdicts: pl.DataFrame, limit: int) -> RenderableType:
    """Return the output of ``tdxtrace verdicts``.

    Args:
        verdicts: The ``verdicts`` table.
        limit: Maximum number of verdicts; 0: all.
    """
    if verdicts.is_empty():
        return Text(_NONE, style="green")
    shown = verdicts.head(limit) if limit else verdicts
    named = shown.with_columns(name=leaf_name(pl.col("leaf")))
    parts = [part for row in named.iter_rows(named=True) for part in _one(row)]
    counts = verdicts.group_by("verdict", maintain_order=True).len().rows()
    total = ", ".join(f"{count(n)} {verdict}" for verdict, n in counts)
    more = verdicts.height - shown.height
    rest = f"; {count(more)} more (--limit 0)" if more else ""
    return Group(*parts, Text(f"{total}{rest}"))


def _one(row: dict[str, Any]) -> list[RenderableType]:
    title = Text(row["verdict"], style=_STYLE[row["verdict"]])
    where = [row["subject"].replace("_", " "), row["name"]]
    where += [f"TD {word(row['td_id'])}"] if row["td_id"] is not None else []
    title.append("  " + ", ".join(filter(None, where)), style="not bold default")
    seqs = f"{row['evidence_table']} seq {row['evidence']}"
    lines = [
        row["sentence"],
        f"evidence: {seqs}{' …' if row['n_rows'] > len(row['evidence'].split()) else ''}",
        f"rule {row['rule']}: {row['rule_source']}",
    ]
    if row["decided_by"] is not None:
        lines.append(f"to decide it: {row['decided_by']}")
    return [title, *(Padding(Text(one_line(line, _MAX_LINE)), (0, 0, 0, 4)) for line in lines)]
