"""Findings as text for one terminal screen: problems, leaves, episodes, worst chains, losses."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from typing import Any, Final

import polars as pl
from rich.console import Group, RenderableType
from rich.text import Text

from tdxtrace.report.columns import Sentence, TextTable
from tdxtrace.report.counts import facts, n_cut_by_losses
from tdxtrace.report.limits_text import supported_line
from tdxtrace.report.loader_text import loader_sentences
from tdxtrace.report.units import (
    clock_text,
    count,
    duration,
    plural,
    seconds,
    share,
    short_duration,
    total,
    word,
)
from tdxtrace.report.verdict_text import kinds_of, problem_lines
from tdxtrace.tables.findings import RETRY_CHAINS
from tdxtrace.tables.text import one_line
from tdxtrace.tables.trace import Findings, Source
from tdxtrace.tdx.leaves import leaf_name

MAX_JUDGED_ROWS: Final = 1_000_000
"""SEAMCALLs up to which ``analyze`` looks for problems.

Verdicts need the cause of every busy answer.  They add 60 % to the time of reading and analysing
0.1 M SEAMCALLs, 80 % for 0.7 M, and 180 % for 12 M, a third of them busy: above this limit they
would more than double it (tests/bench/commands.py).
"""
# Rows of zero-step episodes and of worst chains without a terminal: chosen by the project.
_N_WORST: Final = 10
# Maximum number of problems shown on a terminal: three take a third of 24 lines.
_N_PROBLEMS: Final = 3
_OUTCOMES: Final = (
    ("succeeded", "ok"),
    ("failed", "failed"),
    ("resolved_elsewhere", "elsewhere"),
    ("abandoned", "abandoned"),
    ("cut", "cut"),
)
# Columns of the table of leaves, the most important first.
_LEAF_RANKS: Final = (
    *("source", "TDH.", "requests", "retried", "%", "p50/p99/max"),
    *("abandoned", "cut", "failed", "elsewhere", "time p99/max", "ok"),
)


def findings_text(
    findings: Findings, lines: int | None = None, limit: int | None = None, *, brief: bool = False
) -> RenderableType:
    """Return the output of ``tdxtrace analyze log``.

    Args:
        findings: The findings.
        lines: Height of the terminal, which limits the number of rows of each table; None: no
            terminal, and all leaves are shown.
        limit: Maximum number of rows of each table; 0: all; None: derived from ``lines``.
        brief: Whether to leave out the tables.
    """
    top: list[Sentence | Text] = [*_problems(findings, lines), *_inputs(findings)]
    bottom: list[Sentence | Text] = [
        _loss_text(findings),
        *_messages(findings),
        *(Text(f"P-SEAMLDR: {line}") for line in loader_sentences(findings.loader_calls)),
        *map(_next, next_steps(findings)[: 1 if lines else 2]),
    ]
    if brief:
        return Group(*top, *bottom)
    n_leaves, n_rows = _rows(findings, limit, lines and lines - _height(top) - _height(bottom))
    return Group(
        *top,
        Text(),
        _leaves(findings, n_leaves),
        _zero_steps(findings, n_rows),
        _worst(findings, n_rows),
        *_cut(findings, n_leaves, n_rows),
        *bottom,
    )


def _next(step: str) -> Sentence:
    is_command = step.startswith("tdxtrace ")
    return Sentence("next:", then=step) if is_command else Sentence(f"next: {step}")


def _height(parts: Sequence[Sentence | Text]) -> int:
    """Return the number of lines that ``parts`` take on a terminal of 80 columns."""
    sentences = (Sentence(part.plain) if isinstance(part, Text) else part for part in parts)
    return sum(len(list(part.lines(80))) for part in sentences)


def _rows(findings: Findings, limit: int | None, lines: int | None) -> tuple[int, int]:
    """Return the number of leaves, and of episodes and worst chains each, that are shown."""
    n_leaves = findings.leaf_stats.height
    if limit is not None:
        n_chains = total(findings.leaf_stats, "n_requests")
        everything = max(n_leaves, n_chains, findings.zero_steps.height)
        return (limit or everything, limit or everything)
    if lines is None:
        return n_leaves, _N_WORST
    # Reserve an empty line, three titles, the line about omitted rows, and the prompt.
    available = max(lines - 6, 5)
    shown = min(n_leaves, max(3, available * 5 // 9))
    return shown, max(1, (available - shown) // 2)


def _cut(findings: Findings, n_leaves: int, n_rows: int) -> list[RenderableType]:
    """Return a line that states how many rows are left out and how to see them; empty if none."""
    n_worst = total(findings.leaf_stats, "retried_seamcalls")
    parts = [
        plural(n - shown, noun, many)
        for n, shown, noun, many in (
            (findings.leaf_stats.height, n_leaves, "leaf", "leaves"),
            (findings.zero_steps.height, n_rows, "episode", None),
            (n_worst, n_rows, "retried chain", None),
        )
        if n > shown
    ]
    return [Text(f"more: {', '.join(parts)} (-n 0: all)", style="dim")] if parts else []


def _problems(findings: Findings, lines: int | None) -> list[Sentence]:
    """Return the problems found, one per line, or a note that verdicts were not computed."""
    path = _path(findings)
    n_calls = total(findings.leaf_stats, "n_seamcalls")
    if n_calls > MAX_JUDGED_ROWS:
        return [
            Sentence(
                f"problems: not checked for {plural(n_calls, 'SEAMCALL')}:",
                style="bold yellow",
                then=f"tdxtrace verdicts {path}",
            )
        ]
    judged = plural(total(findings.leaf_stats, "n_requests"), "request")
    if not n_calls and findings.kernel_messages.height:
        judged = plural(findings.kernel_messages.height, "kernel message")
    elif not n_calls:
        judged = "KVM's own events"
    if not n_calls and findings.options and findings.verdicts.is_empty():
        return [Sentence("nothing to judge: no SEAMCALL was selected", style="bold yellow")]
    made = problem_lines(kinds_of(findings.verdicts), findings.provenance.sources, judged, path)
    limit = [Sentence(supported_line(findings))] if n_calls else []
    if lines is not None and len(made) > _N_PROBLEMS + 1:
        more = plural(len(made) - _N_PROBLEMS - 1, "more problem")
        made = [
            *made[: _N_PROBLEMS + 1],
            Sentence(f"{more}:", indent=2, then=f"tdxtrace verdicts {path}"),
        ]
    return made + limit


def _inputs(findings: Findings) -> list[Text]:
    sources = findings.provenance.sources
    numbered = [f"{n} " if len(sources) > 1 else "" for n in range(len(sources))]
    return [*map(_source, sources, numbered), _totals(findings)]


def _path(findings: Findings) -> str:
    """Return the traces as command-line arguments."""
    sources = findings.provenance.sources
    has_traces = not all(source.is_log for source in sources)
    words = (
        ("--dmesg " if source.is_log and has_traces else "") + shlex.quote(source.path)
        for source in sources
    )
    return one_line(" ".join(words), 400)


def _source(source: Source, number: str) -> Text:
    packed = "" if source.compression == "none" else f" ({source.compression})"
    span = None
    if source.first_ns is not None and source.last_ns is not None:
        span = source.last_ns - source.first_ns
    facts = [
        f"{source.format}{packed}",
        plural(source.n_lines, source.unit),
        duration(span),
        f"clock: {clock_text(source.clock, source.clock_resolution_ns)}",
        *([f"Linux {one_line(source.kernel, 20)}"] if source.kernel else []),
    ]
    line = Text(number + one_line(source.path.rpartition("/")[2], 40), style="bold")
    return line.append(": " + ", ".join(facts), style="not bold")


def _totals(findings: Findings) -> Text:
    parts = facts(findings)
    if findings.options:
        chosen = ", ".join(f"{name} {_option(value)}" for name, value in findings.options.items())
        parts.append(f"only {one_line(chosen, 200)}")
    return Text(", ".join(parts))


def _option(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _loss_text(findings: Findings) -> Text:
    data_losses = findings.losses.filter(pl.col("severity") != "info")
    cut = n_cut_by_losses(findings)
    if data_losses.is_empty():
        return Text("No lost events reported", style="green")
    kinds = [
        f"{kind} {count(n) if n else '(number unknown)'}"
        for kind, n in data_losses.group_by("kind", maintain_order=True)
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
    if stats.is_empty() and {"since", "until"} & set(findings.options):
        firsts = [s.first_ns for s in findings.provenance.sources if s.first_ns is not None]
        lasts = [s.last_ns for s in findings.provenance.sources if s.last_ns is not None]
        if firsts and lasts:
            span = f"the trace is from {seconds(min(firsts))} to {seconds(max(lasts))} s"
            return Text(f"no SEAMCALL in the selected time: {span}", style="yellow")
    if stats.is_empty():
        return Text("no SEAMCALL was captured: only KVM's own events", style="yellow")
    outcomes = [(name, short) for name, short in _OUTCOMES if total(stats, name)]
    titles = ["TDH.", "requests", "retried", "%", "p50/p99/max", "time p99/max"]
    titles += [short for _, short in outcomes]
    rows = stats.head(n).with_columns(name=leaf_name(pl.col("leaf")))
    cells = [
        [
            _leaf(row),
            count(row["n_requests"]),
            count(row["retried_seamcalls"]),
            share(row["retried_seamcalls"], row["n_requests"]).replace(" ", ""),
            "/".join(count(row[f"{q}_attempts"]) for q in ("p50", "p99", "max")),
            f"{short_duration(row['p99_ns'])}/{short_duration(row['max_ns'])}",
            *(count(row[name]) for name, _ in outcomes),
        ]
        for row in rows.iter_rows(named=True)
    ]
    return _table(findings, rows, titles, cells, titles[1:], _LEAF_RANKS)


def _table(
    findings: Findings,
    rows: pl.DataFrame,
    titles: Sequence[str],
    cells: Iterable[Sequence[str]],
    right: Sequence[str],
    ranks: Sequence[str],
) -> TextTable:
    """Return a table; with several inputs, its first column is the number of the input.

    Args:
        findings: The findings.
        rows: Rows of the finding table that are shown, with ``source``.
        titles: Titles of the columns.
        cells: Cells of each row.
        right: Titles of right-aligned columns.
        ranks: Titles, the most important first.
    """
    several = len(findings.provenance.sources) > 1
    named = ["source", *titles] if several else list(titles)
    table = TextTable(
        named,
        right=[place for place, title in enumerate(named) if title in right],
        ranks=[ranks.index(title) for title in named],
    )
    for row, source in zip(cells, rows["source"], strict=True):
        table.add_row(*([str(source)] if several else []), *(one_line(cell) for cell in row))
    return table


def _leaf(row: dict[str, Any]) -> str:
    """Return the leaf's name without TDH., which is in the title."""
    return str(row["name"] or f"leaf {row['leaf']}").removeprefix("TDH.")


def _zero_steps(findings: Findings, n: int) -> RenderableType:
    steps = findings.zero_steps
    if steps.is_empty():
        has_vcpus = findings.vcpu_stats.height > 0
        result = "none found" if has_vcpus else "unknown: no vCPU entry was captured"
        return Text(f"zero-step: {result}")
    shown = steps.sort("n_refused", descending=True).head(n)
    cells = [
        (
            _thread_label(findings, row["source"], row["tid"]),
            seconds(row["start_ns"]),
            count(row["n_refused"]),
            short_duration(row["end_ns"] - row["start_ns"]),
            f"{row['form']} ({row['strength']})",
            row["ended"],
        )
        for row in shown.iter_rows(named=True)
    ]
    titles = ("zero-step vCPU", "from, s", "refused", "for", "form", "ended")
    ranks = ("source", "zero-step vCPU", "refused", "for", "ended", "form", "from, s")
    return _table(findings, shown, titles, cells, ("from, s", "refused", "for"), ranks)


def _worst(findings: Findings, n: int) -> RenderableType:
    rows = worst_chains(findings.scan("retry_chains"), n)
    if rows.is_empty():
        return Text("worst chains: no request was retried")
    named = rows.with_columns(name=leaf_name(pl.col("leaf")))
    cells = [
        (
            _leaf(row),
            word(row["gpa"]),
            _thread_label(findings, row["source"], row["tid"]),
            count(row["n_attempts"]),
            short_duration(row["took_ns"]),
            count(row["first_seq"]),
            chain_end(row),
        )
        for row in named.iter_rows(named=True)
    ]
    unit = "/".join(sorted({source.unit for source in findings.provenance.sources}))
    titles = ("worst chains", "gpa", "thread", "attempts", "time", unit, "outcome")
    ranks = ("source", "worst chains", "attempts", unit, "outcome", "gpa", "time", "thread")
    return _table(findings, rows, titles, cells, ("attempts", "time", unit), ranks)


def worst_chains(retry_chains: pl.DataFrame | pl.LazyFrame, n: int) -> pl.DataFrame:
    """Return the ``n`` retried chains with the most attempts, by attempts and duration."""
    order = ("n_attempts", "took_ns", "first_seq")
    shown = (
        RETRY_CHAINS.pick(retry_chains, *order, *RETRY_CHAINS.key[:1], "n_busy")
        .filter(pl.col("n_busy") > 0)
        .sort(order, descending=[True, True, False], nulls_last=True)
        .head(n)
    )
    # Collect all columns only for the rows that are shown.
    is_shown = pl.col("first_seq").is_in(shown["first_seq"].implode())
    rows = retry_chains.lazy().filter(is_shown).collect()
    keys = shown.select(RETRY_CHAINS.key)
    return keys.join(rows, on=RETRY_CHAINS.key, maintain_order="left").select(rows.columns)


def chain_end(row: dict[str, Any]) -> str:
    """Return the outcome of a chain, with its identity unless that is ``request``."""
    end: str = row["outcome"]
    return end if row["identity"] == "request" else f"{end} (by {row['identity']})"


def _thread_label(findings: Findings, source: int, tid: int | None) -> str:
    if tid is None:
        return "-"
    names = findings.threads.filter(pl.col("source") == source, pl.col("tid") == tid)["comm"]
    return f"{one_line(names[0], 16)}-{tid}" if len(names) else str(tid)


def next_steps(findings: Findings) -> list[str]:
    """Return suggested next commands or capture options, the most useful first."""
    path = _path(findings)
    return [*_about_the_capture(findings), *_about_the_findings(findings, path)]


def _about_the_findings(findings: Findings, path: str) -> list[str]:
    steps = []
    if findings.zero_steps.height:
        steps.append(f"tdxtrace zero-steps {path}")
    if total(findings.leaf_stats, "abandoned"):
        steps.append(f"tdxtrace retry-chains {path} --outcome abandoned")
    worst = findings.leaf_stats.filter(pl.col("retried_seamcalls") > 0).head(1)
    if worst.height:
        name = worst.select(leaf_name(pl.col("leaf"))).item() or str(worst["leaf"][0])
        steps.append(f"tdxtrace retry-chains {path} --leaf {name}")
    if findings.kernel_messages.height and not total(findings.leaf_stats, "n_requests"):
        steps.append(f"tdxtrace events {path} --table kernel_messages")
    if not steps:
        steps.append(f"tdxtrace events {path}")
    return steps


def _about_the_capture(findings: Findings) -> list[str]:
    losses = findings.losses.filter(pl.col("severity") != "info")
    order = {"data_loss": 0, "error": 1}
    ranked = sorted(losses.iter_rows(named=True), key=lambda row: order[row["severity"]])
    return [f"{row['kind'].replace('_', ' ')}: {row['advice']}" for row in ranked[:1]]
