"""Loop of ``tdxtrace watch``: shows ticks as tables, JSON lines or metrics; exit status.

The tables fit 80 columns.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from tdxtrace.analysis.thresholds import FailRule, check_rules, parse_rule
from tdxtrace.capture.options import RecordOptions
from tdxtrace.capture.recorder import stop_on_signals
from tdxtrace.cli.options import Color
from tdxtrace.cli.screen import console
from tdxtrace.errors import InputError, QueryError
from tdxtrace.report.units import duration
from tdxtrace.tables.text import one_line
from tdxtrace.watch.totals import QUANTITIES, RunningTotals

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

# Rows of each table on the screen.
_ROWS = 8
_EXIT_THRESHOLD_EXCEEDED = 3
# Longest delay before a signal is noticed.
_STEP_S = 0.1
# Polls the source and adds the rows since the previous poll; True: it is the last poll.
Poll = Callable[[RunningTotals, bool], None]


@dataclass(frozen=True, slots=True)
class WatchOptions:
    """Interval, duration, thresholds and outputs of ``tdxtrace watch``."""

    interval_s: float
    duration_s: float | None
    rules: Sequence[FailRule]
    metrics: tuple[str, int] | None
    form: str
    color: Color

    @classmethod
    def of(
        cls,
        interval_s: float,
        duration_s: float | None,
        fail_on: Sequence[str],
        metrics: str | None,
        form: str,
        color: Color,
    ) -> WatchOptions:
        """Parse the options of the command line.

        Raises:
            QueryError: If a rule or an address cannot be parsed.
        """
        from tdxtrace.cli.metrics import parse_address

        rules = tuple(map(parse_rule, fail_on))
        for rule in rules:
            if rule.name not in QUANTITIES:
                raise QueryError(
                    f"watch computes no verdicts: --fail-on {rule.name} needs tdxtrace analyze"
                )
        where = None if metrics is None else parse_address(metrics)
        return cls(interval_s, duration_s, rules, where, form, color)


def watch_pipe(watch: WatchOptions, mappings: Sequence[str]) -> int:
    """Watch standard input, a trace or a histogram, until it ends; return the exit status.

    Raises:
        TdxtraceError: If it is neither.
    """
    from tdxtrace.ingest.histogram import begins_histogram
    from tdxtrace.watch.counts import CountTicker
    from tdxtrace.watch.text import Pipe, TextTicker

    name = "standard input"
    pipe = Pipe(sys.stdin.fileno())
    ticker: TextTicker | CountTicker | None = None

    def poll(totals: RunningTotals, is_last: bool) -> None:
        nonlocal ticker
        is_over = pipe.has_ended
        if pipe.error is not None:
            raise InputError(f"cannot read {name}: {pipe.error.strerror}")
        text = pipe.take()
        if ticker is None:
            if not text and not is_last and not is_over:
                return
            ticker = CountTicker(name) if begins_histogram(text) else TextTicker(name, mappings)
        if isinstance(ticker, CountTicker):
            if text:
                totals.replace_counts(ticker.tick(text))
        else:
            totals.take(ticker.tick(text, is_last=is_last or is_over))

    pipe.start()
    return _run(watch, poll, lambda: pipe.has_ended, pipe.wait)


def watch_host(watch: WatchOptions, options: RecordOptions, tracefs: Path | None) -> int:
    """Watch this host through a private tracefs instance; return the exit status.

    Raises:
        TdxtraceError: If it cannot be traced.
    """
    from tdxtrace.capture.host import Host
    from tdxtrace.capture.live import live_instance
    from tdxtrace.watch.pages import PageTicker

    with live_instance(Host(tracefs_at=tracefs), options) as running:
        ticker = PageTicker(running.header_page, running.formats, running.page_bytes)

        def poll(totals: RunningTotals, is_last: bool) -> None:
            if is_last:
                running.instance.switch(on=False)
            found = running.read_buffers()
            tick = ticker.tick(found.pages, found.until_ns, found.comms, is_last=is_last)
            totals.take(tick)

        return _run(watch, poll, lambda: False, _sleep)


def _run(
    watch: WatchOptions, poll: Poll, is_over: Callable[[], bool], pause: Callable[[float], bool]
) -> int:
    """Poll until the source ends, the duration is over or a signal; return the exit status.

    The status is 3 if a rule matches, else 0.
    """
    totals = RunningTotals()
    began = shown = time.monotonic()
    end = float("inf") if watch.duration_s is None else began + watch.duration_s
    with stop_on_signals() as ended, ExitStack() as stack:
        show = stack.enter_context(_output(watch, totals))
        if watch.metrics is not None:
            from tdxtrace.cli.metrics import serve

            stack.enter_context(serve(totals, *watch.metrics))
        while True:
            _pause(min(shown + watch.interval_s, end), ended, pause)
            is_last = time.monotonic() >= end or ended.is_set() or is_over()
            poll(totals, is_last)
            exceeded = check_rules(watch.rules, totals.quantity)
            if exceeded or is_last or time.monotonic() >= shown + watch.interval_s:
                show()
                shown = time.monotonic()
            if exceeded or is_last:
                break
    for line in exceeded:
        print(f"tdxtrace: {line}", file=sys.stderr)
    return _EXIT_THRESHOLD_EXCEEDED if exceeded else 0


def _pause(until: float, ended: Event, pause: Callable[[float], bool]) -> None:
    """Wait until the next poll is due, a signal arrives, or ``pause`` returns true."""
    while not ended.is_set() and (left := until - time.monotonic()) > 0:
        if pause(min(left, _STEP_S)):
            return


def _sleep(seconds: float) -> bool:
    time.sleep(seconds)
    return False


@contextmanager
def _output(watch: WatchOptions, totals: RunningTotals) -> Iterator[Callable[[], None]]:
    """Yield a function that shows the current state."""
    if watch.form == "json":

        def line() -> None:
            sys.stdout.write(json.dumps(totals.to_dict()) + "\n")
            sys.stdout.flush()

        yield line
        return
    from rich.live import Live

    with Live(console=console(watch.color), auto_refresh=False, screen=False) as live:
        yield lambda: live.update(view(totals), refresh=True)


def view(totals: RunningTotals) -> Group:
    """Return the screen: rates, leaves, longest chains, refused vCPUs, busy resources."""
    from rich.console import Group
    from rich.text import Text

    return Group(*(Text(line) for line in _head(totals)), *_tables(totals))


def _head(totals: RunningTotals) -> Iterator[str]:
    rates, chains = totals.rates, totals.chains
    seconds = time.monotonic() - totals.began
    yield (
        f"{seconds:,.0f} s  {totals.n_events:,} events  {rates.get('events', 0):,.0f}/s  "
        f"{rates.get('seamcalls', 0):,.0f} SEAMCALLs/s  {rates.get('busy', 0):,.0f} busy/s"
    )
    in_flight = f"chains in flight: {chains.n_in_flight}"
    if chains.max_attempts_in_flight > 1:
        in_flight += f", the longest with {chains.max_attempts_in_flight:,} attempts so far"
    if chains.n_dropped:
        in_flight += f"; {chains.n_dropped:,} no longer tracked"
    yield in_flight
    if totals.n_lost:
        yield f"lost: {totals.n_lost:,} events; chains across a loss are cut"


def _tables(totals: RunningTotals) -> Iterator[Table]:
    if totals.leaves:
        yield _leaves(totals)
    if totals.worst:
        yield _worst(totals)
    refused = [(tid, v) for tid, v in totals.vcpus.items() if v.n_refused or v.n_failed]
    if refused:
        table = _table("zero-step", "refused", "episodes", "failed entries")
        refused.sort(key=lambda counters: (-counters[1].n_refused, -counters[1].n_failed))
        for tid, counters in refused[:_ROWS]:
            _row(
                table,
                _thread(totals, tid),
                counters.n_refused,
                counters.episodes,
                counters.n_failed,
            )
        yield table
    if totals.busy:
        table = _table("busy", "leaf", "answers")
        for (leaf, what), n in totals.busy.most_common(_ROWS):
            _row(table, what, leaf.removeprefix("TDH."), n)
        yield table


def _leaves(totals: RunningTotals) -> Table:
    table = _table("TDH.", "requests", "retried", "p50", "p99", "max", "longest")
    ranked = sorted(totals.leaves.items(), key=lambda one: -one[1].n_busy)
    for name, one in ranked[:_ROWS]:
        _row(
            table,
            name.removeprefix("TDH."),
            one.n_requests,
            one.n_retried,
            one.quantile(0.5),
            one.quantile(0.99),
            one.max_attempts,
            duration(one.max_ns),
        )
    return table


def _worst(totals: RunningTotals) -> Table:
    table = _table("worst chains", "thread", "gpa", "attempts", "time", "outcome")
    for one in totals.worst:
        gpa = "-" if one["gpa"] is None else f"{one['gpa']:#x}"
        took = "-" if one["took_ns"] is None else duration(one["took_ns"])
        name = one["leaf"].removeprefix("TDH.")
        _row(table, name, _thread(totals, one["tid"]), gpa, one["attempts"], took, one["outcome"])
    return table


def _thread(totals: RunningTotals, tid: int) -> str:
    return one_line(f"{totals.comms.get(tid, '')}-{tid}", 24)


def _table(first: str, *others: str) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 1), show_edge=False)
    table.add_column(Text(first, "bold"))
    for name in others:
        table.add_column(Text(name), justify="right", no_wrap=True)
    return table


def _row(table: Table, *cells: Any) -> None:  # noqa: ANN401 - numbers and text
    from rich.text import Text

    table.add_row(*(Text(f"{c:,}" if isinstance(c, int) else str(c)) for c in cells))
