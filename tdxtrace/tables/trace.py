"""The containers of tables: Trace (events) and Findings (analysis results), and their inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Final, Protocol

import polars as pl

from tdxtrace.errors import InputError, QueryError
from tdxtrace.tables.events import (
    EVENT_TABLES,
    KERNEL_MESSAGES,
    LOADER_CALLS,
    LOSSES,
    THREADS,
)
from tdxtrace.tables.findings import FINDING_TABLES
from tdxtrace.tables.formats import format_named
from tdxtrace.tables.memory import trim_heap
from tdxtrace.tables.schema import Table
from tdxtrace.tables.sql import run_query
from tdxtrace.tables.text import escape, one_line
from tdxtrace.tdx.leaves import leaf_name
from tdxtrace.tdx.status import status_name

if TYPE_CHECKING:
    import pyarrow as pa

# printk takes timestamps from local_clock() (Linux kernel/printk/printk.c, vprintk_store), as do
# ftrace's clocks local and global (kernel/trace/trace_clock.c: sched_clock) and perf's own
# (kernel/events/core.c, perf_event_clock), which ftrace's clock "perf" reads too.  CLOCK_MONOTONIC
# is adjusted by NTP and has another origin: it differs by more than the duration of any call.
_PRINTK: Final = "printk"
_SAME: Final = ("local", "global", "perf", "perf_clock", "local_clock", "sched_clock")
# Neither ftrace nor perf names the clock in its text; the default of both is the kernel's own
# (Documentation/trace/ftrace.rst, trace_clock; perf-record(1), -k).
_DEFAULT: Final = "unnamed"
# Columns larger than this many bytes: freed memory is returned to the system after each.
_LARGE: Final = 16 << 20
# Rows per slice of a table in memory; slices are not copied.  A choice.
_PART_ROWS: Final = 1 << 20
_EVENT_NAMES: Final = frozenset(table.name for table in EVENT_TABLES)


# Clocks that are each CPU's own, and inputs that do not name theirs: the default of ftrace and
# of perf is such a clock (Linux Documentation/trace/ftrace.rst, trace_clock; perf-record(1), -k).
_CLOCKS_OF_CPUS: Final = (
    *("local", "perf", "perf_clock", "local_clock", "sched_clock"),
    *("unnamed", "integer"),
)
# Such clocks are the TSC, scaled for each CPU (Linux arch/x86/kernel/tsc.c, cyc2ns), where it is
# stable, as on every host of TDX that was seen: they differ by microseconds.  A choice of ours,
# and generous.  Where it is not, they differ by up to a tick (kernel/sched/clock.c).
DRIFT_NS: Final = 100_000


def is_global_clock(name: str) -> bool:
    """Return whether a clock, by its name in :class:`Source`, is the same on every CPU."""
    return name not in _CLOCKS_OF_CPUS


@dataclass(frozen=True, slots=True)
class Source:
    """One input: path, format, clock, time span, and number of lines by event."""

    path: str
    format: str
    compression: str
    n_bytes: int
    n_lines: int
    n_headers: int
    first_ns: int | None
    last_ns: int | None
    clock: str
    """Name of the clock if the input has one; else ``unnamed``, ``integer`` (ticks of
    unknown length) or ``relative`` (since the first event)."""
    clock_resolution_ns: int
    kernel: str | None
    tool: str | None
    events: Mapping[str, int]
    """Lines or records by event name, including events that are not used."""

    @property
    def unit(self) -> str:
        """Unit of ``n_lines``, ``n_headers``, ``events`` and every ``seq``: line or record."""
        return format_named(self.format).unit

    @property
    def drift_ns(self) -> int:
        """How far the clocks of two of its CPUs may differ, ns."""
        return 0 if is_global_clock(self.clock) else DRIFT_NS

    @property
    def is_log(self) -> bool:
        """Whether the input holds kernel messages, not events."""
        return format_named(self.format).holds == "messages"


@dataclass(frozen=True, slots=True)
class Provenance:
    """Inputs of a Trace, and assumptions made when they were read."""

    sources: tuple[Source, ...]
    level_base: int
    """Number of the 4K level in the input (0 or 1); in the tables it is 0."""
    level_base_evidence: str
    tdxtrace: str
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The provenance as plain data, for JSON."""
        return dataclasses.asdict(self)


class TableSource(Protocol):
    """A table of a store, as a Trace reads it."""

    @property
    def n_rows(self) -> int:
        """Number of rows."""

    def read(self) -> pl.DataFrame:
        """Return all rows."""

    def scan(self, since_ns: int | None, until_ns: int | None) -> pl.LazyFrame:
        """Return a query of the rows; rows outside of the time range may be missing."""

    def parts(self, columns: Sequence[str] | None) -> Iterator[pl.DataFrame]:
        """Yield the rows, or some of their columns, in order, a segment at a time."""


class _TableBundle:
    """Base class of Trace and Findings: lists, exports, checks and displays their tables."""

    __slots__ = ("_stored",)
    _stored: Mapping[str, TableSource]
    """Tables that are in a store, by name."""
    _tables: tuple[Table, ...] = ()

    def tables(self) -> dict[str, pl.DataFrame]:
        """All tables by name, in the catalog's order."""
        return {table.name: getattr(self, table.name) for table in self._tables}

    def named(self, table: str | pl.DataFrame) -> pl.DataFrame:
        """Return a table with leaves and statuses by name instead of their numbers.

        Args:
            table: Name of the table, or rows with such columns.

        Returns:
            The rows; a leaf or status without a name is its number, as text.

        Raises:
            QueryError: If the table does not exist.
        """
        if isinstance(table, str) and table not in {own.name for own in self._tables}:
            raise _no_table(table, self._tables)
        rows: pl.DataFrame = getattr(self, table) if isinstance(table, str) else table
        makers = {
            **dict.fromkeys(("leaf", "holder_leaf"), leaf_name),
            **dict.fromkeys(("status", "final_status"), status_name),
        }
        return rows.with_columns(
            pl.coalesce(make(pl.col(column)), pl.col(column).cast(pl.String))
            for column, make in makers.items()
            if column in rows.columns
        )

    def to_arrow(self) -> dict[str, pa.Table]:
        """All tables by name, as Arrow tables."""
        return {name: frame.to_arrow() for name, frame in self.tables().items()}

    def check(self) -> None:
        """Check every table against its declaration.

        Raises:
            TableError: If a table does not match; see :meth:`Table.check`.
        """
        for table in self._tables:
            table.check(getattr(self, table.name))

    def _size(self, name: str) -> str:
        frame: pl.DataFrame = getattr(self, name)
        return f"{frame.height:,}"

    def _rows(self) -> list[tuple[str, str, str]]:
        return [(t.name, self._size(t.name), t.grain) for t in self._tables]

    def _title(self) -> str:
        raise NotImplementedError  # pragma: no cover - both subclasses define it

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
class Trace(_TableBundle):
    """Event tables of one or more recordings, and their provenance."""

    seamcalls: pl.DataFrame
    vm_entries: pl.DataFrame
    page_faults: pl.DataFrame
    host_events: pl.DataFrame
    threads: pl.DataFrame
    losses: pl.DataFrame
    provenance: Provenance
    kernel_messages: pl.DataFrame = field(default_factory=KERNEL_MESSAGES.empty)
    loader_calls: pl.DataFrame = field(default_factory=LOADER_CALLS.empty)
    _tables = EVENT_TABLES

    @classmethod
    def stored(cls, tables: Mapping[str, TableSource], provenance: Provenance) -> Trace:
        """Return a Trace whose tables are read on first access."""
        trace = object.__new__(cls)
        object.__setattr__(trace, "provenance", provenance)
        object.__setattr__(trace, "_stored", tables)
        return trace

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - a table, or the tables of a store
        # Python calls this for attributes that are not set yet.
        if name == "_stored":
            return {}
        if name not in _EVENT_NAMES:
            raise AttributeError(name)
        object.__setattr__(self, name, self._stored[name].read())
        self._defragment(name)
        return getattr(self, name)

    def scan(
        self, name: str, since_ns: int | None = None, until_ns: int | None = None
    ) -> pl.LazyFrame:
        """Return a table as a polars LazyFrame, which reads from a store only what it uses.

        Args:
            name: Name of the event table.
            since_ns: Earliest time needed: earlier rows may be missing.
            until_ns: Latest time needed: later rows may be missing.

        Raises:
            QueryError: If the table does not exist.

        Example:
            >>> import tdxtrace
            >>> trace = tdxtrace.read_trace("sample_traces/contended.txt")
            >>> trace.scan("seamcalls").select("leaf").collect().height
            2011
        """
        if name not in _EVENT_NAMES:
            raise _no_table(name, self._tables)
        if name in self._stored:
            return self._stored[name].scan(since_ns, until_ns)
        rows: pl.DataFrame = getattr(self, name)
        return rows.lazy()

    def parts(self, name: str, columns: Sequence[str] | None = None) -> Iterator[pl.DataFrame]:
        """Yield the rows of a table in order, in slices; from a store a segment at a time.

        Args:
            name: Name of the event table.
            columns: Columns to return; None: all.
        """
        if name in self._unread():
            yield from self._stored[name].parts(columns)
        else:
            rows: pl.DataFrame = getattr(self, name)
            some = rows if columns is None else rows.select(columns)
            yield from some.iter_slices(_PART_ROWS)

    def defragment(self) -> None:
        """Rechunk every table in memory that has several chunks, in place.

        Readers make one chunk per batch; gathering rows from hundreds of chunks takes ten
        times as long.  Only one column at a time is in memory twice.
        """
        for name in _EVENT_NAMES - self._unread():
            self._defragment(name)

    def _defragment(self, name: str) -> None:
        rows: pl.DataFrame = getattr(self, name)
        if rows.n_chunks() == 1:
            return
        columns = rows.get_columns()
        object.__setattr__(self, name, rows.clear())
        del rows
        try:
            for at in range(len(columns)):
                columns[at] = columns[at].rechunk()
                if columns[at].estimated_size() > _LARGE:
                    trim_heap()
        finally:
            object.__setattr__(self, name, pl.DataFrame(columns))

    def _unread(self) -> set[str]:
        """Names of the tables of the store that are not in memory yet."""
        # getattr would read them.
        return {name for name in self._stored if not _has_value(self, name)}

    def n_rows(self, name: str) -> int:
        """Return the number of rows of an event table, without reading it."""
        if name in self._unread():
            return self._stored[name].n_rows
        rows: pl.DataFrame = getattr(self, name)
        return rows.height

    def is_in_memory(self, name: str) -> bool:
        """Return whether an event table is in memory, not only in a store."""
        return name not in self._unread()

    def _size(self, name: str) -> str:
        return f"{self.n_rows(name):,}"

    def sql(self, statement: str) -> pl.DataFrame:
        """Run an SQL query on the events and on the findings about them.

        The analysis runs each time a statement names a finding table; for several queries keep
        ``findings = analyze(trace)`` and use ``findings.sql``.

        Args:
            statement: One SELECT in the dialect of polars.

        Raises:
            QueryError: If it is not understood; the message gives the nearest existing name.

        Example:
            >>> import tdxtrace
            >>> trace = tdxtrace.read_trace("sample_traces/contended.txt")
            >>> trace.sql("select max(n_attempts) from retry_chains").item()
            64
        """
        # The room tables may not import analysis, so this calls the public function.
        import tdxtrace  # noqa: PLC0415

        return tdxtrace.query(self, statement)

    def _title(self) -> str:
        return "Trace of " + ", ".join(one_line(s.path) for s in self.provenance.sources)


def _no_table(name: str, tables: tuple[Table, ...]) -> QueryError:
    names = [table.name for table in tables]
    near = get_close_matches(name, names, n=1, cutoff=0)[0]
    return QueryError(f"no table '{one_line(name, 40)}'; nearest: {near}")


def collected(rows: pl.LazyFrame) -> pl.DataFrame:
    """Collect a query made by :meth:`Trace.scan`.

    Raises:
        InputError: If a stored table cannot be read.
    """
    try:
        return rows.collect()
    except (OSError, pl.exceptions.ComputeError) as error:
        raise InputError(f"cannot read a stored table: {one_line(str(error), 80)}") from None


def _has_value(bundle: object, name: str) -> bool:
    """Return whether an attribute is set; unlike hasattr, this reads no table."""
    try:
        object.__getattribute__(bundle, name)
    except AttributeError:
        return False
    return True


@dataclass(frozen=True, slots=True, repr=False)
class Findings(_TableBundle):
    """Finding tables of a Trace, and their provenance.

    Tables that take longer to compute are computed on first access, and cached.
    """

    leaf_stats: pl.DataFrame
    zero_steps: pl.DataFrame
    vm_stats: pl.DataFrame
    vcpu_stats: pl.DataFrame
    threads: pl.DataFrame
    losses: pl.DataFrame
    provenance: Provenance
    options: Mapping[str, object] = field(default_factory=dict)
    """Filters that were applied before the analysis."""
    _analyses: Mapping[str, Callable[[Findings], pl.DataFrame | pl.LazyFrame]] = field(
        default_factory=dict
    )
    """Functions that compute a table, or a query of it, on first access, by table name."""
    _computed: dict[str, pl.DataFrame] = field(default_factory=dict)
    """Tables computed so far."""
    kernel_messages: pl.DataFrame = field(default_factory=KERNEL_MESSAGES.empty)
    loader_calls: pl.DataFrame = field(default_factory=LOADER_CALLS.empty)
    _tables = (*FINDING_TABLES, LOADER_CALLS, KERNEL_MESSAGES, THREADS, LOSSES)

    @property
    def retry_chains(self) -> pl.DataFrame:
        """The ``retry_chains`` table: every request with all its attempts."""
        return self._table("retry_chains")

    @property
    def zero_step_causes(self) -> pl.DataFrame:
        """The ``zero_step_causes`` table: cause of each zero-step episode."""
        return self._table("zero_step_causes")

    @property
    def step_thresholds(self) -> pl.DataFrame:
        """The ``step_thresholds`` table: episodes that each threshold would have caused."""
        return self._table("step_thresholds")

    @property
    def abandoned_requests(self) -> pl.DataFrame:
        """The ``abandoned_requests`` table: consequences of requests abandoned busy."""
        return self._table("abandoned_requests")

    @property
    def progress_loops(self) -> pl.DataFrame:
        """The ``progress_loops`` table: requests and faults repeated without lock conflict."""
        return self._table("progress_loops")

    @property
    def td_conflicts(self) -> pl.DataFrame:
        """The ``td_conflicts`` table: busy answers caused by other TDs."""
        return self._table("td_conflicts")

    @property
    def time_shares(self) -> pl.DataFrame:
        """The ``time_shares`` table: time of each TD's threads by phase and activity."""
        return self._table("time_shares")

    @property
    def verdicts(self) -> pl.DataFrame:
        """The ``verdicts`` table: BUG, HOSTILE, EXPECTED or UNDECIDED per group of findings."""
        return self._table("verdicts")

    @property
    def busy_causes(self) -> pl.DataFrame:
        """The ``busy_causes`` table: candidate causes of each busy attempt."""
        return self._table("busy_causes")

    @property
    def cause_shares(self) -> pl.DataFrame:
        """The ``cause_shares`` table: number of busy attempts by cause."""
        return self._table("cause_shares")

    @property
    def broken_rules(self) -> pl.DataFrame:
        """The ``broken_rules`` table: calls that show a kernel bug."""
        return self._table("broken_rules")

    @property
    def busy_answers(self) -> pl.DataFrame:
        """The ``busy_answers`` table: every busy answer with its ordinal in its request."""
        return self._table("busy_answers")

    @property
    def attempts(self) -> pl.DataFrame:
        """The ``attempts`` table: share of requests done by number of attempts or time."""
        return self._table("attempts")

    @property
    def latencies(self) -> pl.DataFrame:
        """The ``latencies`` table: durations of busy and successful calls."""
        return self._table("latencies")

    @property
    def policies(self) -> pl.DataFrame:
        """The ``policies`` table: the default policies replayed on the requests."""
        return self._table("policies")

    @property
    def limits(self) -> pl.DataFrame:
        """The ``limits`` table: recommended limits for the default target (1e-6, 95 %)."""
        return self._table("limits")

    @property
    def limit_statements(self) -> pl.DataFrame:
        """The ``limit_statements`` table: upper bounds of the share of requests that need more."""
        return self._table("limit_statements")

    def is_computed(self, name: str) -> bool:
        """Return whether a table that is computed on first access was computed."""
        return name in self._computed

    @property
    def lock_values(self) -> pl.DataFrame:
        """The ``lock_values`` table: effect that kernel locks would have."""
        return self._table("lock_values")

    @property
    def entry_waits(self) -> pl.DataFrame:
        """The ``entry_waits`` table: refused entries that one wait would have replaced."""
        return self._table("entry_waits")

    @property
    def counters(self) -> pl.DataFrame:
        """The ``counters`` table: values of counters in kvm->stat over time, per TD."""
        return self._table("counters")

    @property
    def measurement_log(self) -> pl.DataFrame:
        """The ``measurement_log`` table: calls that extend each TD's MRTD, in order."""
        return self._table("measurement_log")

    @property
    def host_checks(self) -> pl.DataFrame:
        """The ``host_checks`` table: known weaknesses of the module that a kernel log names."""
        return self._table("host_checks")

    @property
    def accept_rates(self) -> pl.DataFrame:
        """The ``accept_rates`` table: pages accepted by TDs over time, and what limits the rate."""
        return self._table("accept_rates")

    @property
    def boot_phases(self) -> pl.DataFrame:
        """The ``boot_phases`` table: time of each TD by phase of its life."""
        return self._table("boot_phases")

    @property
    def tdvmcalls(self) -> pl.DataFrame:
        """The ``tdvmcalls`` table: exits by TDG.VP.VMCALL, by function and over time."""
        return self._table("tdvmcalls")

    @property
    def module_updates(self) -> pl.DataFrame:
        """The ``module_updates`` table: updates of the TDX module, and vCPUs that waited."""
        return self._table("module_updates")

    def scan(self, name: str) -> pl.LazyFrame:
        """Return a table as a polars LazyFrame, which computes or reads only the columns it uses.

        Args:
            name: Name of the table.

        Raises:
            QueryError: If the table does not exist.

        Example:
            >>> import tdxtrace
            >>> findings = tdxtrace.analyze(tdxtrace.read_trace("sample_traces/contended.txt"))
            >>> findings.scan("busy_causes").select("cause").collect().height
            1522
        """
        if name not in {table.name for table in self._tables}:
            raise _no_table(name, self._tables)
        if name not in self._analyses:
            rows: pl.DataFrame = getattr(self, name)
            return rows.lazy()
        if name not in self._computed:
            found = self._analyses[name](self)
            if isinstance(found, pl.LazyFrame):
                return found
            self._computed[name] = found
        return self._computed[name].lazy()

    def _table(self, name: str) -> pl.DataFrame:
        if name not in self._computed:
            self._computed[name] = self.scan(name).collect()
        return self._computed[name]

    def _size(self, name: str) -> str:
        is_pending = name in self._analyses and name not in self._computed
        return "on demand" if is_pending else _TableBundle._size(self, name)

    def sql(self, statement: str) -> pl.DataFrame:
        """Run an SQL query on the findings.

        Args:
            statement: One SELECT in the dialect of polars.

        Raises:
            QueryError: If it is not understood; the message gives the nearest existing name.
        """
        tables = {table.name: table for table in self._tables}
        return run_query(statement, tables, lambda name: getattr(self, name))

    def _title(self) -> str:
        return "Findings on " + ", ".join(one_line(s.path) for s in self.provenance.sources)


@dataclass(frozen=True, slots=True)
class Agreement:
    """Whether the times of two inputs can be compared, and why."""

    comparable: bool
    reason: str


def agreement(trace: Source, log: Source) -> Agreement:
    """Return whether the times of a trace and of a kernel log can be compared.

    Args:
        trace: An input with events.
        log: An input with kernel messages.
    """
    if log.clock != _PRINTK:
        return Agreement(
            False,
            f"the log's clock is {log.clock!r}; take it with dmesg without -T, "
            "or journalctl -k -o json",
        )
    if trace.clock in _SAME:
        return Agreement(True, f"the trace's clock {trace.clock!r} is the one that printk uses")
    if trace.clock == _DEFAULT:
        return Agreement(
            True, "the trace does not name its clock; assumed to be the default, which printk uses"
        )
    return Agreement(
        False,
        f"the trace's clock is {one_line(trace.clock, 20)!r}, printk's is the local one; "
        "record with the clock local (trace-cmd -C local)",
    )


def starts_ns(sources: tuple[Source, ...]) -> list[int]:
    """Return the first timestamp of each input with events, in ns; without any, of each log."""
    traces = [s for s in sources if not s.is_log]
    return [s.first_ns for s in traces or sources if s.first_ns is not None]
