"""What is carried from room to room: a Trace of events, Findings about it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import polars as pl

from tdxtrace.tables.events import EVENT_TABLES, KERNEL_MESSAGES, LOSSES, THREADS
from tdxtrace.tables.findings import FINDING_TABLES
from tdxtrace.tables.formats import format_named
from tdxtrace.tables.schema import Table
from tdxtrace.tables.sql import ask
from tdxtrace.tables.text import escape, one_line

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True, slots=True)
class Source:
    """One input: where it came from and what its lines turned out to be."""

    path: str
    format: str
    compression: str
    n_bytes: int
    n_lines: int
    n_headers: int
    first_ns: int | None
    last_ns: int | None
    clock: str
    """The clock's name where the input tells it; else ``unnamed``, ``integer`` (ticks
    of unknown length) or ``relative`` (since the first event)."""
    clock_resolution_ns: int
    kernel: str | None
    tool: str | None
    events: Mapping[str, int]
    """Lines or records per event name, our own events and noise alike."""

    @property
    def unit(self) -> str:
        """What ``n_lines``, ``n_headers``, ``events`` and every ``seq`` count."""
        return format_named(self.format).unit

    @property
    def is_log(self) -> bool:
        """Whether the input holds messages of the kernel's log, not events."""
        return format_named(self.format).holds == "messages"


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where a Trace comes from and what was assumed when it was read."""

    sources: tuple[Source, ...]
    level_base: int
    """Number the capture gave to a 4K level; tables hold it normalised to 0."""
    level_base_evidence: str
    tdxtrace: str
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data, for JSON."""
        return dataclasses.asdict(self)


class _Bundle:
    """Tables with names: how they are listed, exported and shown."""

    __slots__ = ()
    _tables: tuple[Table, ...] = ()

    def tables(self) -> dict[str, pl.DataFrame]:
        """Every table by name, in the catalog's order."""
        return {table.name: getattr(self, table.name) for table in self._tables}

    def to_arrow(self) -> dict[str, pa.Table]:
        """Every table by name, as Arrow."""
        return {name: frame.to_arrow() for name, frame in self.tables().items()}

    def check(self) -> None:
        """Hold every table against its declaration.

        Raises:
            TableError: If a table breaks a promise.
        """
        for table in self._tables:
            table.check(getattr(self, table.name))

    def _size(self, name: str) -> str:
        frame: pl.DataFrame = getattr(self, name)
        return f"{frame.height:,}"

    def _rows(self) -> list[tuple[str, str, str]]:
        return [(t.name, self._size(t.name), t.grain) for t in self._tables]

    def _title(self) -> str:
        raise NotImplementedError  # pragma: no cover - both bundles define it

    def __repr__(self) -> str:
        width = max(len(name) for name, _, _ in self._rows())
        lines = [f"  {name:<{width}} {n:>12}  {grain}" for name, n, grain in self._rows()]
        return "\n".join([self._title(), *lines])

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td><code>{name}</code></td><td style='text-align:right'>{n}</td>"
            f"<td style='text-align:left'>{escape(grain)}</td></tr>"
            for name, n, grain in self._rows()
        )
        head = "<tr><th>table</th><th>rows</th><th style='text-align:left'>grain</th></tr>"
        return f"<p><b>{escape(self._title())}</b></p><table>{head}{rows}</table>"


@dataclass(frozen=True, slots=True, repr=False)
class Trace(_Bundle):
    """What happened: event tables of one or more recordings, and their provenance."""

    seamcalls: pl.DataFrame
    vm_entries: pl.DataFrame
    page_faults: pl.DataFrame
    host_events: pl.DataFrame
    threads: pl.DataFrame
    losses: pl.DataFrame
    provenance: Provenance
    kernel_messages: pl.DataFrame = field(default_factory=KERNEL_MESSAGES.empty)
    _tables = EVENT_TABLES

    def defragment(self) -> None:
        """Put the rows of every table into one piece of memory, where they lie in many.

        A reader leaves a piece per batch; to pick rows out of hundreds takes ten times as
        long.  The tables stay equal; while one is moved it is there twice.
        """
        for name, rows in self.tables().items():
            if rows.n_chunks() > 1:
                object.__setattr__(self, name, rows.rechunk())

    def sql(self, statement: str) -> pl.DataFrame:
        """Ask in SQL, of the events and of the findings about them.

        The findings are found anew where the statement names one; to ask often, keep
        ``findings = analyze(trace)`` and use ``findings.sql``.

        Args:
            statement: One SELECT in the dialect of polars.

        Raises:
            QueryError: If it is not understood; a wrong name is answered with the nearest.

        Example:
            >>> import tdxtrace
            >>> trace = tdxtrace.read_trace("sample_traces/contended.txt")
            >>> trace.sql("select max(n_attempts) from retry_chains").item()
            64
        """
        # A trace knows no analysis: it asks the front door, as its user would.
        import tdxtrace  # noqa: PLC0415

        return tdxtrace.query(self, statement)

    def _title(self) -> str:
        return "Trace of " + ", ".join(one_line(s.path) for s in self.provenance.sources)


@dataclass(frozen=True, slots=True, repr=False)
class Findings(_Bundle):
    """What it means: one finding table per question, and what it rests on.

    Answers that take longer are found when they are first asked for, and kept.
    """

    retry_chains: pl.DataFrame
    leaf_stats: pl.DataFrame
    zero_steps: pl.DataFrame
    vm_stats: pl.DataFrame
    vcpu_stats: pl.DataFrame
    threads: pl.DataFrame
    losses: pl.DataFrame
    provenance: Provenance
    options: Mapping[str, object] = field(default_factory=dict)
    """Filters that were applied before the analysis."""
    _questions: Mapping[str, Callable[[Findings], pl.DataFrame]] = field(default_factory=dict)
    """How each answer is found that was not asked for yet, by table."""
    _answers: dict[str, pl.DataFrame] = field(default_factory=dict)
    kernel_messages: pl.DataFrame = field(default_factory=KERNEL_MESSAGES.empty)
    _tables = (*FINDING_TABLES, KERNEL_MESSAGES, THREADS, LOSSES)

    @property
    def zero_step_causes(self) -> pl.DataFrame:
        """What made each zero-step episode's vCPU fault so often."""
        return self._answer("zero_step_causes")

    @property
    def step_thresholds(self) -> pl.DataFrame:
        """Episodes that each threshold would have made."""
        return self._answer("step_thresholds")

    @property
    def abandoned_requests(self) -> pl.DataFrame:
        """What came of requests that were left busy."""
        return self._answer("abandoned_requests")

    @property
    def progress_loops(self) -> pl.DataFrame:
        """What was repeated though nothing held a lock."""
        return self._answer("progress_loops")

    @property
    def td_conflicts(self) -> pl.DataFrame:
        """Whether one TD made another one's calls busy."""
        return self._answer("td_conflicts")

    @property
    def time_shares(self) -> pl.DataFrame:
        """Where threads' time went in each phase of a TD."""
        return self._answer("time_shares")

    @property
    def verdicts(self) -> pl.DataFrame:
        """Whose fault it is, per group of findings."""
        return self._answer("verdicts")

    @property
    def busy_causes(self) -> pl.DataFrame:
        """The ``busy_causes`` table."""
        return self._answer("busy_causes")

    @property
    def cause_shares(self) -> pl.DataFrame:
        """The ``cause_shares`` table."""
        return self._answer("cause_shares")

    @property
    def broken_rules(self) -> pl.DataFrame:
        """The ``broken_rules`` table."""
        return self._answer("broken_rules")

    @property
    def busy_answers(self) -> pl.DataFrame:
        """Every busy answer with its place in its request."""
        return self._answer("busy_answers")

    @property
    def attempts(self) -> pl.DataFrame:
        """Shares of requests done within so many attempts, or so much time."""
        return self._answer("attempts")

    @property
    def latencies(self) -> pl.DataFrame:
        """What busy and successful calls cost."""
        return self._answer("latencies")

    @property
    def policies(self) -> pl.DataFrame:
        """What the policies of the mailing list would have done."""
        return self._answer("policies")

    @property
    def limits(self) -> pl.DataFrame:
        """After how many attempts, or how long, a caller may stop; a millionth, 95 %."""
        return self._answer("limits")

    @property
    def lock_values(self) -> pl.DataFrame:
        """The ``lock_values`` table."""
        return self._answer("lock_values")

    @property
    def entry_waits(self) -> pl.DataFrame:
        """The ``entry_waits`` table."""
        return self._answer("entry_waits")

    def _answer(self, name: str) -> pl.DataFrame:
        if name not in self._answers:
            self._answers[name] = self._questions[name](self)
        return self._answers[name]

    def _size(self, name: str) -> str:
        waits = name in self._questions and name not in self._answers
        return "on demand" if waits else _Bundle._size(self, name)

    def sql(self, statement: str) -> pl.DataFrame:
        """Ask in SQL, of the findings.

        Args:
            statement: One SELECT in the dialect of polars.

        Raises:
            QueryError: If it is not understood; a wrong name is answered with the nearest.
        """
        return ask(statement, {t.name: t for t in self._tables}, lambda name: getattr(self, name))

    def _title(self) -> str:
        return "Findings on " + ", ".join(one_line(s.path) for s in self.provenance.sources)
