"""Two traces beside each other: what changed, and what the data cannot tell."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from tdxtrace.report.charts import compared
from tdxtrace.report.names import definition, leaf_label
from tdxtrace.report.questions import quality, short
from tdxtrace.report.sections import Figure, Grid, Section, grid
from tdxtrace.report.units import count, duration, plural
from tdxtrace.tables.limits import COMPARISONS
from tdxtrace.tables.trace import Findings

_WORDS = {"more": "more than before", "fewer": "fewer than before", "not_told": "not told"}


def sections(before: Findings, after: Findings, comparisons: pl.DataFrame) -> list[Section]:
    """Return the sections of a comparison, the answer first.

    Args:
        before: What was found in the one trace.
        after: In the other.
        comparisons: The table of that name, made of the two.
    """
    both = comparisons.filter(pl.col("difference").is_not_null())
    return [
        Section("short", "In short", "", _says(before, after, comparisons)),
        Section(
            "comparisons",
            "Which differences does the data support?",
            definition(COMPARISONS),
            _supported(both),
            figures=[] if both.is_empty() else [_figure(both)],
            grids=[] if both.is_empty() else [_table(both)],
        ),
        _renamed(quality.section(before), "losses_before", "Data quality before"),
        _renamed(quality.section(after), "losses_after", "Data quality after"),
    ]


def title(before: Findings, after: Findings) -> str:
    """Return the comparison's title: the first input of each by name."""
    names = [found.provenance.sources[0].path.rpartition("/")[2] for found in (before, after)]
    return f"TDX SEAMCALL retries: {names[0]} and {names[1]}"


def _renamed(section: Section, name: str, shown: str) -> Section:
    return Section(name, shown, "", section.says, section.figures, section.grids)


def _says(before: Findings, after: Findings, comparisons: pl.DataFrame) -> list[str]:
    said = [
        f"{when}: {short.section(found).says[0]}"
        for when, found in (("Before", before), ("After", after))
    ]
    changes = comparisons.filter(pl.col("unit") == "attempts", pl.col("within") == 1)
    for change, words in (("more", "more often"), ("fewer", "less often")):
        names = [leaf_label(leaf) for leaf in changes.filter(pl.col("change") == change)["leaf"]]
        if names:
            said.append(f"Retried {words} than before: {', '.join(names)}.")
    only = changes.filter(pl.col("change").is_in(["only_before", "only_after"])).height
    if only:
        said.append(f"Seen in one of the two only: {plural(only, 'leaf', 'leaves')}.")
    if changes.filter(pl.col("change").is_in(["more", "fewer"])).is_empty():
        said.append("No leaf is retried more, or less, often than before, as far as can be told.")
    return said


def _supported(both: pl.DataFrame) -> Sequence[str]:
    if both.is_empty():
        return ["None: there is no leaf that both traces have."]
    told = both.filter(pl.col("change") != "not_told").height
    return [
        f"{count(told)} of {plural(both.height, 'difference')}. Each is told at 95 %: about one in "
        "twenty would seem to be one where nothing changed."
    ]


def _figure(both: pl.DataFrame) -> Figure:
    return Figure(
        "comparisons",
        "Requests that needed a second attempt, before and after",
        "Of the leaves that both traces have; the intervals are in the table.",
        lambda: compared.retried_before_and_after(both),
    )


def _table(both: pl.DataFrame) -> Grid:
    return grid(
        ("TDH.", "more than", "before", "after", "difference", "95 % interval", "so"),
        [
            (
                leaf_label(row["leaf"]),
                _within(row["unit"], row["within"]),
                _percent(row["more_before"]),
                _percent(row["more_after"]),
                f"{100 * row['difference']:+.2g} %",
                f"{100 * row['difference_low']:+.2g} to {100 * row['difference_high']:+.2g} %",
                _WORDS[row["change"]],
            )
            for row in _told_first(both).iter_rows(named=True)
        ],
        right=(2, 3, 4, 5),
        spare=(4,),
        caption="Shares of requests that needed more than so much; the interval is of after less "
        "before, in percentage points. Where neither needed more is left out.",
    )


def _told_first(both: pl.DataFrame) -> pl.DataFrame:
    """What changed before what did not, without what never happened in either."""
    happened = both.filter((pl.col("more_before") > 0) | (pl.col("more_after") > 0))
    return happened.sort(pl.col("change") == "not_told", maintain_order=True)


def _within(unit: str, within: int) -> str:
    return plural(within, "attempt") if unit == "attempts" else duration(within)


def _percent(ratio: float) -> str:
    return f"{100 * ratio:.3g} %"
