"""Terminal output of ``capture doctor`` and ``capture record``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tdxtrace.capture.doctor import Verdict
from tdxtrace.capture.recorder import Outcome
from tdxtrace.tables.text import one_line

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

_COLOURS: Final = {
    "ok": "green",
    "limited": "yellow",
    "missing": "red",
    "unknown": "magenta",
    "note": "default",
}
_SUMMARY: Final = {
    "full": "This host can be captured in full: tdxtrace capture record -o trace.dat",
    "stock": "Only KVM's own events: tdxtrace capture record --level stock -o trace.dat",
    "program": "Only programs can be captured (--program), not this kernel's SEAMCALLs.",
    "nothing": "Nothing can be captured here.",
}


def verdict_table(verdict: Verdict) -> Table:
    """Return the checks as a table, with what is lost and the remedy where one fails."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 1))
    for check in verdict.checks:
        shown = [Text(one_line(check.found))]
        if check.state != "ok":
            named = (("lost", check.lost), ("to get it", check.remedy))
            shown += [Text(f"{label}: {one_line(text)}", "dim") for label, text in named if text]
        state = Text(check.state, _COLOURS[check.state])
        table.add_row(Text(check.name.replace("_", " ")), state, Text("\n").join(shown))
    return table


def verdict_line(verdict: Verdict) -> Text:
    """Return the overall verdict as one line."""
    from rich.text import Text

    return Text(f"\n{_SUMMARY[verdict.can]}\n({one_line(verdict.why)})")


def notify(text: str) -> None:
    """Print a line to stderr."""
    print(f"tdxtrace: {one_line(text, 2000)}", file=sys.stderr)


def summary(outcome: Outcome, output: Path) -> str:
    """Return what was recorded and lost as one line."""
    told = outcome.provenance
    lost = f"{told['lost_events']:,} lost" if told["lost_events"] else "none lost"
    return (
        f"{told['read_events']:,} events in {outcome.seconds:.1f} s, {lost}, "
        f"{outcome.n_bytes / 1e6:.1f} MB; wrote {output}"
    )
