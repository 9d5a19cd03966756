"""Findings as text for one terminal screen: inputs, losses, leaves, episodes, worst chains."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from typing import Any, Final

import polars as pl
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tdxtrace.report.loader_text import loader_sentences
from tdxtrace.report.units import (
    count,
    duration,
    plural,
    seconds,
    share,
    short_duration,
    total,
    word,
)
from tdxtrace.tables.text import one_line
from tdxtrace.tables.trace import Findings, Source
from tdxtrace.tdx.leaves import leaf_name

# Height of a terminal that was never resized: VT100, 24 lines.
SCREEN_LINES: Final = 24
_FIXED_LINES: Final = 15
"""Lines whose number does not depend on the findings."""
_OUTCOMES: Final = (
    ("succeeded", "ok"),
    ("failed", "failed"),
    ("resolved_elsewhere", "elsewhere"),
    ("abandoned", "abandoned"),
    ("cut", "cut"),
)


def findings_text(findings: Findings, lines: int = SCREEN_LINES) -> RenderableType:
    """Return the output of ``tdxtrace analyze log``.

    Args:
        findings: The findings.
        lines: Height of the screen, which determines the number of rows of each table.
    """
    available = max(lines - _FIXED_LINES, 7)
    n_leaves = min(findings.leaf_stats.height, max(3, available * 5 // 9))
    n_rows = max(1, (available - n_leaves) // 2)
    parts: list[RenderableType] = [
        *map(_source, findings.provenance.sources),
        _totals(findings),
        _lost(findings),
        *_messages(findings),
        *(Text(f"P-SEAMLDR: {line}") for line in loader_sentences(findings.loader_calls)),
        Text(),
        _leaves(findings, n_leaves),
        _zero_steps(findings, n_rows),
        _worst(findings, n_rows),
        Text(),
        *(Text(f"next: {line}", style="cyan") for line in next_steps(findings)[:2]),
    ]
    return Group(*parts)


def _source(source: Source) -> Text:
    packed = "" if source.compression == "none" else f" ({source.compression})"
    span = None
    if source.first_ns is not None and source.last_ns is not None:
        span = source.last_ns - source.first_ns
    facts = [
        f"{source.format}{packed}",
        plural(source.n_lines, source.unit),
        duration(span),
        f"{source.clock} clock, {short_duration(source.clock_resolution_ns)} resolution",
        *([f"Linux {one_line(source.kernel, 20)}"] if source.kernel else []),
    ]
    line = Text(one_line(source.path.rpartition("/")[2], 40), style="bold")
    return line.append(": " + ", ".join(facts), style="not bold")


def _totals(findings: Findings) -> Text:
    stats, chains = findings.leaf_stats, findings.retry_chains
    n_tds, n_vms = (chains.select("source", c).drop_nulls().n_unique() for c in ("td_id", "tgid"))
    vms = plural(n_tds, "TD") if n_tds else plural(n_vms, "VM")
    parts = [
        plural(total(stats, "n_seamcalls"), "SEAMCALL"),
        plural(total(stats, "n_requests"), "request"),
        f"{count(total(stats, 'retried_seamcalls'))} retried",
        vms,
        plural(findings.vcpu_stats.height, "vCPU"),
        plural(total(findings.vm_stats, "zero_steps"), "zero-step episode"),
    ]
    if findings.options:
        chosen = ", ".join(f"{name} {value}" for name, value in findings.options.items())
        parts.append(f"only {one_line(chosen, 60)}")
    return Text(", ".join(parts))


def _lost(findings: Findings) -> Text:
    bad = findings.losses.filter(pl.col("severity") != "info")
    cut = int((findings.retry_chains["cut_by"] == "lost_events").sum())
    if bad.is_empty():
        return Text("No lost events reported", style="green")
    kinds = [
        f"{kind} {count(n) if n else '(number unknown)'}"
        for kind, n in bad.group_by("kind", maintain_order=True)
        .agg(pl.col("n_events").sum())
        .rows()
    ]
    text = f"LOST: {', '.join(kinds)}; {plural(cut, 'chain')} cut by it"
    return Text(text, style="bold yellow")


def _messages(findings: Findings) -> list[Text]:
    """Return the kinds of messages in the kernel log in one line; nothing without a log."""
    messages = findings.kernel_messages
    if messages.is_empty():
        return []
    kinds = messages.group_by("message", maintain_order=True).len().sort("len", descending=True)
    shown = ", ".join(f"{count(n)} {kind}" for kind, n in kinds.rows())
    return [Text(f"kernel log: {shown}")]


def _leaves(findings: Findings, n: int) -> RenderableType:
    stats = findings.leaf_stats
    if stats.is_empty() and findings.kernel_messages.height:
        return Text("no SEAMCALL was captured: the kernel log has no calls that succeeded")
    if stats.is_empty():
        return Text("no SEAMCALL was captured: only KVM's own events", style="yellow")
    rows = stats.head(n).with_columns(name=leaf_name(pl.col("leaf")))
    cells = [
        (
            _leaf(row),
            count(row["n_requests"]),
            count(row["retried_seamcalls"]),
            share(row["retried_seamcalls"], row["n_requests"]).replace(" ", ""),
            "/".join(count(row[f"{q}_attempts"]) for q in ("p50", "p99", "max")),
            f"{short_duration(row['p99_ns'])}/{short_duration(row['max_ns'])}",
            _outcomes(row),
        )
        for row in rows.iter_rows(named=True)
    ]
    titles = ("TDH.", "requests", "retried", "", "p50/p99/max", "time p99/max", "outcome")
    table = grid(titles, cells, right=(1, 2, 3, 4, 5))
    if stats.height > n:
        return Group(table, Text(f"… and {stats.height - n} more: --json, --output DIR"))
    return table


def _leaf(row: dict[str, Any]) -> str:
    """Return the leaf's name without TDH., which is in the title."""
    return str(row["name"] or f"leaf {row['leaf']}").removeprefix("TDH.")


def _outcomes(row: dict[str, Any]) -> str:
    return " ".join(f"{count(row[name])} {short}" for name, short in _OUTCOMES if row[name])


def _zero_steps(findings: Findings, n: int) -> RenderableType:
    steps = findings.zero_steps
    if steps.is_empty():
        has_vcpus = findings.vcpu_stats.height > 0
        result = "none found" if has_vcpus else "unknown: no vCPU entry was captured"
        return Text(f"zero-step: {result}")
    cells = [
        (
            _who(findings, row["source"], row["tid"]),
            seconds(row["start_ns"])[:-3],
            count(row["n_refused"]),
            short_duration(row["end_ns"] - row["start_ns"]),
            f"{row['form']} ({row['strength']})",
            row["ended"],
        )
        for row in steps.sort("n_refused", descending=True).head(n).iter_rows(named=True)
    ]
    titles = ("zero-step vCPU", "from, s", "refused", "for", "form", "ended")
    return grid(titles, cells, right=(1, 2, 3))


def _worst(findings: Findings, n: int) -> RenderableType:
    rows = worst_chains(findings.retry_chains, n)
    if rows.is_empty():
        return Text("worst chains: no request was retried")
    named = rows.with_columns(name=leaf_name(pl.col("leaf")))
    cells = [
        (
            _leaf(row),
            word(row["gpa"]),
            _who(findings, row["source"], row["tid"]),
            count(row["n_attempts"]),
            short_duration(row["took_ns"]),
            count(row["first_seq"]),
            chain_end(row),
        )
        for row in named.iter_rows(named=True)
    ]
    units = sorted({source.unit for source in findings.provenance.sources})
    titles = ("worst chains", "gpa", "thread", "attempts", "time", "/".join(units), "outcome")
    return grid(titles, cells, right=(3, 4, 5))


def worst_chains(retry_chains: pl.DataFrame, n: int) -> pl.DataFrame:
    """Return the ``n`` retried chains with the most attempts, by attempts and duration."""
    order = ("n_attempts", "took_ns", "first_seq")
    # Only the rows that are shown are taken with all their columns.
    shown = (
        retry_chains.select(*order, "n_busy")
        .with_row_index("place")
        .filter(pl.col("n_busy") > 0)
        .sort(order, descending=[True, True, False], nulls_last=True)
        .head(n)
    )
    return retry_chains[shown["place"]]


def chain_end(row: dict[str, Any]) -> str:
    """Return the outcome of a chain, and its identity if that is less than the request."""
    end: str = row["outcome"]
    return end if row["identity"] == "request" else f"{end} (by {row['identity']})"


def grid(titles: Sequence[str], cells: Iterable[Sequence[str]], right: Sequence[int] = ()) -> Table:
    """Return a table without borders; cells are plain text, not rich markup."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for place, title in enumerate(titles):
        table.add_column(
            Text(title),
            justify="right" if place in right else "left",
            no_wrap=place < len(titles) - 1,
            overflow="fold",
        )
    for row in cells:
        table.add_row(*(Text(one_line(cell)) for cell in row))
    return table


def _who(findings: Findings, source: int, tid: int | None) -> str:
    if tid is None:
        return "-"
    names = findings.threads.filter(pl.col("source") == source, pl.col("tid") == tid)["comm"]
    return f"{one_line(names[0], 16)}-{tid}" if len(names) else str(tid)


def next_steps(findings: Findings) -> list[str]:
    """Return suggested next commands or capture options, the most useful first."""
    path = one_line(shlex.quote(findings.provenance.sources[0].path), 60)
    return [*_about_the_capture(findings), *_about_the_findings(findings, path)]


def _about_the_findings(findings: Findings, path: str) -> list[str]:
    steps = []
    if findings.zero_steps.height:
        steps.append(f"tdxtrace zero-steps {path}")
    abandoned = (findings.retry_chains["outcome"] == "abandoned").any()
    if abandoned:
        steps.append(f"tdxtrace retry-chains {path} --outcome abandoned")
    worst = findings.leaf_stats.filter(pl.col("retried_seamcalls") > 0).head(1)
    if worst.height:
        name = worst.select(leaf_name(pl.col("leaf"))).item() or str(worst["leaf"][0])
        steps.append(f"tdxtrace retry-chains {path} --leaf {name}")
    if findings.kernel_messages.height and findings.retry_chains.is_empty():
        steps.append(f"tdxtrace events {path} --table kernel_messages")
    if not steps:
        steps.append(f"tdxtrace events {path}")
    return steps


def _about_the_capture(findings: Findings) -> list[str]:
    losses = findings.losses.filter(pl.col("severity") != "info")
    order = {"data_loss": 0, "error": 1}
    ranked = sorted(losses.iter_rows(named=True), key=lambda row: order[row["severity"]])
    return [f"{row['kind'].replace('_', ' ')}: {row['advice']}" for row in ranked[:1]]
