"""The tables for people: a line for each in the README, every column in schemas/README.md."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tdxtrace.tables.catalog import TABLES
from tdxtrace.tables.comparisons import COMPARISONS
from tdxtrace.tables.events import EVENT_TABLES
from tdxtrace.tables.findings import FINDING_TABLES
from tdxtrace.tables.schema import Column, Table

BEGIN: Final = "<!-- tables: python -m tdxtrace.tables.reference -->"
END: Final = "<!-- end of tables -->"
_GROUPS: Final[tuple[tuple[str, Sequence[Table]], ...]] = (
    ("What happened", EVENT_TABLES),
    ("What it means", FINDING_TABLES),
    ("Two traces compared", (COMPARISONS,)),
)


def summary() -> str:
    """Return what a row of each table is, as Markdown."""
    lines = []
    for title, tables in _GROUPS:
        lines += [f"| {title} | |", "|---|---|"]
        lines += [
            f"| [`{t.name}`](schemas/README.md#{t.name}) | {_safe(t.grain)} |" for t in tables
        ]
        lines.append("")
    return "\n".join(lines)


def reference() -> str:
    """Return every column of every table, as Markdown."""
    lines = [
        "# Tables",
        "",
        "Made by `python -m tdxtrace.tables.reference` from the declarations in tdxtrace/tables.",
        "Null means: not observed. Machines read the same in schemas/*.json.",
    ]
    for table in TABLES:
        lines += ["", f"## {table.name}", "", table.grain[0].upper() + table.grain[1:] + "."]
        if table.meaning:
            lines.append(table.meaning)
        lines += ["", f"Key: {', '.join(f'`{name}`' for name in table.key)}.", ""]
        lines += ["| column | type | meaning |", "|---|---|---|"]
        lines += [_row(column) for column in table.columns]
    return "\n".join(lines) + "\n"


def _row(column: Column) -> str:
    kind = str(column.dtype).partition("(")[0]
    unit = f", {column.unit}" if column.unit else ""
    null = " or null" if column.nullable else ""
    return f"| `{column.name}` | {kind}{unit}{null} | {_safe(column.doc)} |"


def _safe(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;")


def filled(readme: str) -> str:
    """Return the README with the list of tables as it is now."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{summary()}\n{END}{after}"


def write(root: Path) -> None:
    """Bring README.md and schemas/README.md in ``root`` up to date."""
    readme = root / "README.md"
    readme.write_text(filled(readme.read_text("utf-8")), "utf-8")
    (root / "schemas" / "README.md").write_text(reference(), "utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
