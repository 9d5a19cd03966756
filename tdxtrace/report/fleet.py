"""Retry limits of a fleet, as text for a terminal and as sections of a report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import polars as pl
from rich.console import Group, RenderableType
from rich.text import Text

from tdxtrace.report.columns import TextTable
from tdxtrace.report.histogram_text import SHOWN_LIMITS
from tdxtrace.report.limits_text import BASIS_WORDS, percent
from tdxtrace.report.names import definition, leaf_label
from tdxtrace.report.section import Grid, Section, grid
from tdxtrace.report.units import count, duration, plural
from tdxtrace.tables.fleet import FLEET_HOSTS, FLEET_LIMITS
from tdxtrace.tables.histograms import FLEET_COUNTED
from tdxtrace.tables.text import one_line

_TITLES: Final = (
    *("group", "TDH.", "unit", "hosts", "requests", "retried", "limit", "as one", "by hosts"),
    *("without one host", "most of the tail", "basis"),
)
# Index of the group, which is shown only if there are several.
_GROUP: Final = 0
_MAX_HOSTS: Final = 10
_MAX_NAME_LENGTH: Final = 40


def fleet_text(
    limits: pl.DataFrame, hosts: pl.DataFrame, parts: pl.DataFrame, failures: pl.DataFrame
) -> RenderableType:
    """Return the limits of a fleet for a terminal: a line per leaf and unit, then the hosts.

    Args:
        limits: The ``fleet_limits`` table.
        hosts: The ``fleet_hosts`` table.
        parts: The ``fact_parts`` table from which the limits were computed.
        failures: The ``fact_failures`` table.
    """
    rows, has_groups = _limit_rows(limits)
    table = TextTable(
        [t for at, t in enumerate(_TITLES) if at != _GROUP or has_groups],
        right=range(3 if has_groups else 2, 9 if has_groups else 8),
    )
    for row in rows:
        table.add_row(*row)
    lines = [*_basis(parts, failures), *_on_hosts(hosts), *_reasons(limits)]
    return Group(Text(_headline(limits)), table, *map(Text, lines))


def sections(
    limits: pl.DataFrame,
    hosts: pl.DataFrame,
    parts: pl.DataFrame,
    failures: pl.DataFrame,
    shares: pl.DataFrame,
    rare: pl.DataFrame,
) -> list[Section]:
    """Return the sections of a fleet's report.

    Args:
        limits: The ``fleet_limits`` table.
        hosts: The ``fleet_hosts`` table.
        parts: The ``fact_parts`` table from which the limits were computed.
        failures: The ``fact_failures`` table.
        shares: The ``cause_shares`` tables of all parts.
        rare: The ``fact_rare`` tables of all parts.
    """
    return [
        Section("short", "Summary", "", list(_basis(parts, failures)), is_always_shown=True),
        *_on_limits(limits, hosts),
        _section("cause_shares", "Causes of busy answers", _causes(shares), "kind of busy answer"),
        _section(
            "fact_rare", "Verdicts, broken rules, zero-step episodes, losses", _rare(rare), "kind"
        ),
        _section("fact_parts", "What was counted", _counted(parts), "kind of host"),
        _section("fact_failures", "Traces that are left out", _failed(failures), "trace"),
    ]


def histogram_section(counted: pl.DataFrame) -> Section:
    """Return the section on requests that were counted in the kernel: ``fleet_counted`` rows."""
    n = counted["leaf"].n_unique()
    return Section(
        "fleet_counted",
        "Requests counted in the kernel",
        definition(FLEET_COUNTED),
        [f"{plural(n, 'leaf', 'leaves')}; hosts are the clusters of the one-sided intervals."],
        grids=[_histograms(counted)] if n else [],
    )


def _on_limits(limits: pl.DataFrame, hosts: pl.DataFrame) -> Iterator[Section]:
    rows, has_groups = _limit_rows(limits)
    yield Section(
        "fleet_limits",
        "Limits",
        definition(FLEET_LIMITS),
        [_headline(limits), *_reasons(limits)],
        is_always_shown=True,
        grids=[_limits_grid(rows, has_groups)] if rows else [],
    )
    yield Section(
        "fleet_hosts",
        "Hosts",
        definition(FLEET_HOSTS),
        list(_on_hosts(hosts)) or ["No host has more of a tail than others."],
        grids=list(_host_grids(hosts)),
    )


def _section(name: str, title: str, shown: Grid, of_row: str) -> Section:
    """Return a section that consists of a table and the number of its rows."""
    n = len(shown.rows)
    return Section(name, title, "", [f"{plural(n, of_row)}."], grids=[shown] if n else [])


def _headline(limits: pl.DataFrame) -> str:
    if limits.is_empty():
        return "no limits: no recording has requests"
    row = limits.row(0, named=True)
    return (
        f"limits that at most {percent(row['target'])} of requests exceed "
        f"({row['confidence']:.3g} confidence); the wider of: as one recording, hosts as clusters"
    )


def _limit_rows(limits: pl.DataFrame) -> tuple[list[tuple[str, ...]], bool]:
    has_groups = limits["group"].n_unique() > 1
    rows = []
    anyone = limits.filter(pl.col("made_by") == "anyone")
    shown = anyone.filter((pl.col("n_retried") > 0) | (pl.col("unit") == "attempts"))
    for row in shown.iter_rows(named=True):
        cells = _cells(row)
        rows.append(cells if has_groups else cells[1:])
    return rows, has_groups


def _limits_grid(rows: Sequence[Sequence[str]], has_groups: bool) -> Grid:
    first = _GROUP if has_groups else _GROUP + 1
    places = [place - first for place in (5, 3, 10, 9)]
    right = range(3 - first, 9 - first)
    return grid(_TITLES[first:], rows, right=right, droppable=places)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    low, high = row["without_low"], row["without_high"]
    without = "-" if low is None else _number(row["unit"], low)
    if high is not None and high != low:
        without += f" to {_number(row['unit'], high)}"
    if row["n_without_withheld"]:
        without += f" (none without {count(row['n_without_withheld'])} of {row['n_without']})"
    tail = "-"
    if row["tail_host"] is not None:
        tail = f"{one_line(row['tail_host'], _MAX_NAME_LENGTH)} {percent(row['tail_ratio'])}"
    return (
        one_line(row["group"], _MAX_NAME_LENGTH),
        leaf_label(row["leaf"]),
        row["unit"],
        count(row["n_hosts"]),
        count(row["n_requests"]),
        count(row["n_retried"]),
        *(_number(row["unit"], row[name]) for name in ("limit", "as_one_limit", "hosts_limit")),
        without,
        tail,
        BASIS_WORDS[row["basis"]],
    )


def _number(unit: str, limit: int | None) -> str:
    if limit is None:
        return "-"
    return count(limit) if unit == "attempts" else duration(limit)


def _basis(parts: pl.DataFrame, failures: pl.DataFrame) -> Iterator[str]:
    n_bytes = int(parts["n_bytes"].sum())
    yield (
        f"{plural(parts.height, 'trace')} of {plural(parts['host'].n_unique(), 'host')}, "
        f"{n_bytes / 1e6:,.1f} MB, {plural(parts['kernel'].n_unique(), 'kernel')}, "
        f"{plural(parts['module'].n_unique(), 'module release')}, "
        f"{plural(int(parts['n_losses'].sum()), 'loss', 'losses')} of data"
    )
    if failures.height:
        yield f"left out: {plural(failures.height, 'trace')} that could not be counted"


def _on_hosts(hosts: pl.DataFrame) -> Iterator[str]:
    outliers = hosts.filter(pl.col("is_outlier"), pl.col("unit") == "attempts")
    for (leaf,), rows in outliers.group_by("leaf", maintain_order=True):
        names = [one_line(host, _MAX_NAME_LENGTH) for host in rows["host"].head(_MAX_HOSTS)]
        more = f" and {count(rows.height - len(names))} more" if rows.height > len(names) else ""
        yield (
            f"outliers of {leaf_label(int(str(leaf)))}: {', '.join(names)}{more} "
            f"({percent(float(rows['tail_ratio'].sum()))} of the requests that needed more than "
            f"{plural(int(rows['tail_from'][0]), 'attempt')})"
        )


def _reasons(limits: pl.DataFrame) -> Iterator[str]:
    rows = limits.filter(pl.col("made_by") == "anyone", pl.col("reason").is_not_null())
    for (reason,), same in rows.group_by("reason", maintain_order=True):
        names = dict.fromkeys(leaf_label(leaf) for leaf in same["leaf"])
        yield f"{', '.join(names)}: {one_line(str(reason), 400)}"


def _host_grids(hosts: pl.DataFrame) -> Iterator[Grid]:
    rows = hosts.filter(pl.col("unit") == "attempts", pl.col("n_tail") > 0)
    shown = rows.group_by("leaf", maintain_order=True).head(_MAX_HOSTS)
    if shown.height:
        yield grid(
            ("TDH.", "host", "requests", "of the tail", "share of it", "p", "outlier"),
            [
                (
                    leaf_label(row["leaf"]),
                    row["host"],
                    count(row["n_requests"]),
                    count(row["n_tail"]),
                    f"{percent(row['tail_ratio'])}",
                    f"{row['p']:.2g}",
                    "yes" if row["is_outlier"] else "",
                )
                for row in shown.iter_rows(named=True)
            ],
            right=(2, 3, 4, 5),
            caption=f"The {_MAX_HOSTS} hosts with most requests of each leaf's tail.",
        )


def _histograms(counted: pl.DataFrame) -> Grid:
    """Return the shares of common limits, and of the first that no request exceeded."""
    is_shown = pl.col("max_attempts").is_in(SHOWN_LIMITS) | (pl.col("n_exceeding") == 0)
    return grid(
        ("TDH.", "limit", "hosts", "requests", "needed more", "share", "at most"),
        [
            (
                leaf_label(row["leaf"]),
                *(count(row[name]) for name in ("max_attempts", "n_hosts", "n_requests")),
                count(row["n_exceeding"]),
                percent(row["exceeding"]),
                "-" if row["exceeding_high"] is None else percent(row["exceeding_high"]),
            )
            for row in counted.filter(is_shown).iter_rows(named=True)
        ],
        right=range(1, 7),
    )


def _causes(shares: pl.DataFrame) -> Grid:
    keys = ["leaf", "resource", "cause"]
    sums = shares.group_by(keys).agg(pl.col("n_busy", "n_sure").sum())
    rows = sums.sort("n_busy", *keys, descending=[True, False, False, False])
    return grid(
        ("TDH.", "resource", "cause", "busy answers", "of these sure"),
        [
            (leaf_label(r["leaf"]), r["resource"] or "-", r["cause"], *_counts(r))
            for r in rows.iter_rows(named=True)
        ],
        right=(3, 4),
    )


def _counts(row: dict[str, Any]) -> tuple[str, str]:
    return count(row["n_busy"]), count(row["n_sure"])


def _rare(rare: pl.DataFrame) -> Grid:
    keys = ["what", "name", "detail", "leaf"]
    sums = rare.group_by(keys).agg(pl.col("n").sum()).sort(keys, nulls_last=True)
    return grid(
        ("what", "name", "detail", "TDH.", "times"),
        [
            (
                *(row["what"].replace("_", " "), row["name"], row["detail"]),
                "-" if row["leaf"] is None else leaf_label(row["leaf"]),
                count(row["n"]),
            )
            for row in sums.iter_rows(named=True)
        ],
        right=(4,),
    )


def _counted(parts: pl.DataFrame) -> Grid:
    keys = ["kernel", "module", "generation"]
    sums = parts.group_by(keys).agg(
        n_hosts=pl.col("host").n_unique(), n=pl.len(), n_losses=pl.col("n_losses").sum()
    )
    return grid(
        ("kernel", "module", "locks", "hosts", "traces", "losses of data"),
        [
            (*row[:3], *(count(number) for number in row[3:]))
            for row in sums.sort(keys).select(*keys, "n_hosts", "n", "n_losses").iter_rows()
        ],
        right=(3, 4, 5),
    )


def _failed(failures: pl.DataFrame) -> Grid:
    rows: Sequence[Any] = failures.sort("trace").select("trace", "reason").rows()
    return grid(("trace", "reason"), rows)
