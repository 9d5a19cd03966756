"""Sections of the comparison of two traces."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import polars as pl

from tdxtrace.report.charts.leaves import retried_before_and_after
from tdxtrace.report.names import definition, leaf_label
from tdxtrace.report.section import Figure, Grid, Section, grid
from tdxtrace.report.sections import quality, summary
from tdxtrace.report.units import count, duration, plural
from tdxtrace.tables.limits import COMPARISONS
from tdxtrace.tables.text import one_line
from tdxtrace.tables.trace import Findings

_CHANGES = {"more": "more than before", "fewer": "fewer than before", "not_told": "not significant"}


def sections(before: Findings, after: Findings, comparisons: pl.DataFrame) -> list[Section]:
    """Return the sections of a comparison, the summary first.

    Args:
        before: Findings of the first trace.
        after: Findings of the second trace.
        comparisons: The ``comparisons`` table of the two.
    """
    both = comparisons.filter(pl.col("difference").is_not_null())
    return [
        Section("short", "Summary", "", _summary(before, after, comparisons), is_always_shown=True),
        Section(
            "comparisons",
            "Significant differences",
            definition(COMPARISONS),
            _significant(both),
            is_always_shown=True,
            figures=[] if both.is_empty() else [_figure(both)],
            grids=[] if both.is_empty() else [_table(both)],
        ),
        _renamed(quality.section(before), "losses_before", "Data quality before"),
        _renamed(quality.section(after), "losses_after", "Data quality after"),
    ]


def title(before: Findings, after: Findings) -> str:
    """Return the title of the comparison, with the name of each trace's first input."""
    names = [
        one_line(found.provenance.sources[0].path.rpartition("/")[2]) for found in (before, after)
    ]
    return f"TDX SEAMCALL retries: {names[0]} and {names[1]}"


def _renamed(section: Section, name: str, title: str) -> Section:
    return dataclasses.replace(section, name=name, title=title, definition="")


def _summary(before: Findings, after: Findings, comparisons: pl.DataFrame) -> list[str]:
    sentences = [
        f"{when}: {summary.retried(found)[0]}"
        for when, found in (("Before", before), ("After", after))
    ]
    changes = comparisons.filter(pl.col("unit") == "attempts", pl.col("within") == 1)
    for change, words in (("more", "more often"), ("fewer", "less often")):
        names = [leaf_label(leaf) for leaf in changes.filter(pl.col("change") == change)["leaf"]]
        if names:
            sentences.append(f"Retried {words} than before: {', '.join(names)}.")
    only = changes.filter(pl.col("change").is_in(["only_before", "only_after"])).height
    if only:
        sentences.append(f"Recorded in one trace only: {plural(only, 'leaf', 'leaves')}.")
    if changes.filter(pl.col("change").is_in(["more", "fewer"])).is_empty():
        sentences.append("No leaf is retried significantly more or less often than before.")
    return sentences


def _significant(both: pl.DataFrame) -> Sequence[str]:
    if both.is_empty():
        return ["None: the traces have no leaf in common."]
    n = both.filter(pl.col("change") != "not_told").height
    return [
        f"{count(n)} of {plural(both.height, 'difference')}, each at the 95 % level: about one in "
        "twenty is significant by chance where nothing changed."
    ]


def _figure(both: pl.DataFrame) -> Figure:
    return Figure(
        "comparisons",
        "Requests that needed a second attempt, before and after",
        "Leaves that both traces have; the intervals are in the table.",
        lambda: retried_before_and_after(both),
    )


def _table(both: pl.DataFrame) -> Grid:
    return grid(
        ("TDH.", "more than", "before", "after", "difference", "95 % interval", "change"),
        [
            (
                leaf_label(row["leaf"]),
                _within(row["unit"], row["within"]),
                _percent(row["more_before"]),
                _percent(row["more_after"]),
                f"{_signed(row['difference'])} %",
                f"{_signed(row['difference_low'])} to {_signed(row['difference_high'])} %",
                _CHANGES[row["change"]],
            )
            for row in _significant_first(both).iter_rows(named=True)
        ],
        right=(2, 3, 4, 5),
        droppable=(4,),
        caption="Shares of requests that needed more; the interval is that of the difference "
        "(after - before), in percentage points. Rows with no such request are omitted.",
    )


def _significant_first(both: pl.DataFrame) -> pl.DataFrame:
    """Return the rows with a share above 0 in one of the traces, significant changes first."""
    nonzero = both.filter((pl.col("more_before") > 0) | (pl.col("more_after") > 0))
    return nonzero.sort(pl.col("change") == "not_told", maintain_order=True)


def _within(unit: str, within: int) -> str:
    return plural(within, "attempt") if unit == "attempts" else duration(within)


def _signed(difference: float) -> str:
    """Return a difference of shares in percentage points, with its sign.

    Example:
        >>> _signed(1.0), _signed(-0.0153), _signed(0.000021)
        ('+100', '-1.5', '+0.0021')
    """
    points = 100 * difference
    return f"{points:+.0f}" if abs(points) >= 10 else f"{points:+.2g}"


def _percent(ratio: float) -> str:
    return f"{100 * ratio:.3g} %"
