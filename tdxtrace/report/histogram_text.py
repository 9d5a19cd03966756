"""Text about a histogram of attempts that was counted in the kernel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import polars as pl

from tdxtrace.report.units import plural, short_duration
from tdxtrace.tables.attempt_cells import EXACT
from tdxtrace.tables.histograms import COMPLETE, TEXT_OF_CANNOT
from tdxtrace.tables.text import one_line
from tdxtrace.tdx.leaves import leaf_name

NEEDS_CALLS: Final = (
    "not in a histogram: causes and verdicts, zero-step episodes, bursts, times of single calls, "
    "and the replay of policies with kicks or delays; record for these (tdxtrace capture record)"
)
# Limits proposed for KVM in September 2024 (1, 2, 5, 16, 1024), and the last with its own cell.
SHOWN_LIMITS: Final = (1, 2, 5, 16, 64, 1023)


def histogram_text(requests: pl.DataFrame, attempts: pl.DataFrame, about: HistogramFacts) -> str:
    """Return requests by leaf, the requests above common limits, and calls not counted.

    Args:
        requests: The ``request_counts`` table.
        attempts: The ``counted_attempts`` table.
        about: Metadata of the histogram.
    """
    head = [
        f"Linux {one_line(about.kernel, 40)}, {short_duration(about.length_ns)}, "
        f"{plural(requests['tgid'].n_unique(), 'process', 'processes')}, "
        f"{plural(int(requests['n_requests'].sum()), 'request')}"
    ]
    lines = [*head, *_leaves(requests, attempts), *_warnings(about), NEEDS_CALLS]
    return "".join(f"{line}\n" for line in lines)


@dataclass(frozen=True, slots=True)
class HistogramFacts:
    """Metadata of a histogram."""

    kernel: str
    """Release of the kernel."""
    length_ns: int
    """Duration of counting."""
    cannot: Mapping[tuple[int, ...], int]
    """Number of calls that could not be assigned to a request, by leaf and reason."""
    n_not_kept: int
    """Number of requests that did not fit into the map of counts."""
    is_whole: bool
    """Whether counting ended normally, so that open requests were written."""


_INDEPENDENT: Final = (
    "one-sided, for independent requests only: a histogram does not show bursts, in which "
    "requests give less information; record single calls before you set a limit"
)
_OF_HOSTS: Final = (
    "one-sided, with hosts as clusters, so that bursts need not be known; counted in the kernel of "
    "each host"
)


def limit_lines(attempts: pl.DataFrame, share: float, confidence: float = 0.95) -> str:
    """Return, per leaf, the smallest limit that at most ``share`` of requests exceeds.

    Args:
        attempts: The ``counted_attempts`` or ``fleet_counted`` table.
        share: Upper bound of the share of requests above the limit, greater than 0.
        confidence: One-sided confidence of the table's intervals.
    """
    named = attempts.with_columns(name=leaf_name(pl.col("leaf")))
    lines = [
        f"{name[0]}: {_limit_of(rows, share)}"
        for name, rows in named.group_by("name", maintain_order=True)
    ]
    kind = _OF_HOSTS if "n_hosts" in attempts.columns else _INDEPENDENT
    note = f"{100 * confidence:.4g} % {kind}"
    return "".join(f"{line}\n" for line in [*lines, note])


def _limit_of(rows: pl.DataFrame, share: float) -> str:
    """Return the smallest limit of one leaf, or why there is none."""
    known = rows.drop_nulls("exceeding_high")
    if known.is_empty():
        n = plural(int(rows["n_requests"][0]), "request")
        return f"no limit: {n} of one host, which say nothing about other hosts"
    enough = known.filter(pl.col("exceeding_high") <= share)
    if enough.is_empty():
        best = known.sort("exceeding_high").row(0, named=True)
        return (
            f"no limit: {plural(best['n_requests'], 'request')} support "
            f"{best['exceeding_high']:.2g}, not {share:g}; count for longer"
        )
    row = enough.row(0, named=True)
    return (
        f"{plural(row['max_attempts'], 'attempt')}: exceeded by {row['n_exceeding']:,} of "
        f"{plural(row['n_requests'], 'request')}, at most {row['exceeding_high']:.2g}"
    )


def _leaves(requests: pl.DataFrame, attempts: pl.DataFrame) -> Iterator[str]:
    n = pl.col("n_requests")
    is_left = ~pl.col("outcome").is_in(COMPLETE)
    rows = requests.with_columns(name=leaf_name(pl.col("leaf"))).group_by(
        "leaf", "name", maintain_order=True
    )
    table = rows.agg(
        n=n.sum(),
        retried=n.filter((pl.col("n_attempts") > 1) | is_left).sum(),
        left=n.filter(is_left).sum(),
        most=pl.col("n_attempts").max(),
    )
    heads = "".join(f"{f'>{limit:,}':>11}" for limit in SHOWN_LIMITS)
    yield f"{'leaf':<24}{'requests':>12}{'retried':>10}{'left busy':>10}{'most':>9}{heads}"
    for row in table.sort("retried", "leaf", descending=[True, False]).iter_rows(named=True):
        shares = []
        for limit in SHOWN_LIMITS:
            found = attempts.filter(leaf=row["leaf"], max_attempts=limit)
            n_more = int(found["n_exceeding"][0]) if found.height else 0
            shares.append(f"{n_more:>11,}")
        max_attempts = f"{row['most']:,}" + ("+" if row["most"] > EXACT else "")
        yield (
            f"{row['name'] or row['leaf']:<24}{row['n']:>12,}{row['retried']:>10,}"
            f"{row['left']:>10,}{max_attempts:>9}{''.join(shares)}"
        )


def _warnings(about: HistogramFacts) -> Iterator[str]:
    if not about.is_whole:
        yield "counting was interrupted: requests that were still open are missing"
    if about.n_not_kept:
        yield (
            f"{plural(about.n_not_kept, 'request')} did not fit into the map: raise "
            "BPFTRACE_MAP_KEYS_MAX"
        )
    by_reason: dict[int, int] = {}
    for (_, reason), n in about.cannot.items():
        by_reason[reason] = by_reason.get(reason, 0) + n
    for reason, n in sorted(by_reason.items()):
        why = TEXT_OF_CANNOT.get(reason, "could not be assigned to a request")
        yield f"{plural(n, 'call')} {why}"
