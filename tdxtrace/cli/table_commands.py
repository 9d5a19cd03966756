"""Commands that print one table, and ``query``, which prints the result of an SQL statement.

Commands that print a finding table without options of their own are made from the table's name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Final

import typer

from tdxtrace.cli.option_groups import expand_option_groups
from tdxtrace.cli.options import OutputFormat
from tdxtrace.cli.query_options import ModuleOptions, PrintOptions, QueryOptions
from tdxtrace.tables.enums import EventTable, Outcome, listed

Command = Callable[..., None]


@expand_option_groups
def events_command(
    query: QueryOptions,
    printing: PrintOptions,
    table: Annotated[
        EventTable,
        typer.Option(
            "--table",
            metavar="TABLE",
            help=f"{listed(EventTable, EventTable.seamcalls)}.",
        ),
    ] = EventTable.seamcalls,
) -> None:
    """Print the events that were read: SEAMCALLs, vCPU entries, faults, losses.

    Example: tdxtrace events trace.txt --table losses
    """
    from tdxtrace.tables.trace import collected

    trace = query.read()
    clocks = {n: source.clock for n, source in enumerate(trace.provenance.sources)}
    printing.show(collected(query.selection.scan(table, trace)), query, clocks=clocks)


@expand_option_groups
def retry_chains_command(
    query: QueryOptions,
    printing: PrintOptions,
    outcome: Annotated[
        Outcome | None, typer.Option("--outcome", help="Only chains with this outcome.")
    ] = None,
    retried: Annotated[
        bool, typer.Option("--retried/--all", help="Only requests answered busy, or all.")
    ] = True,
) -> None:
    """Print the retry chains, those with most attempts first.

    Example: tdxtrace retry-chains trace.txt --leaf TDH.MEM.PAGE.AUG --format csv
    """
    import polars as pl

    rows = query.analyze().retry_chains
    as_table = printing.form is OutputFormat.table
    if outcome is not None:
        rows = rows.filter(pl.col("outcome") == outcome.value)
    elif retried and as_table:
        rows = rows.filter(pl.col("n_busy") > 0)
    if as_table:
        rows = rows.sort("n_attempts", "first_seq", descending=[True, False])
    printing.show(rows, query)


@expand_option_groups
def verdicts_command(query: QueryOptions, of: ModuleOptions, printing: PrintOptions) -> None:
    """Print whose fault it is: BUG, HOSTILE, UNDECIDED or EXPECTED, with evidence and rule.

    Example: tdxtrace verdicts trace.txt --dmesg dmesg.txt
    """
    findings = of.analyze(of.read(query), query)
    if printing.form is not OutputFormat.table:
        printing.show(findings.verdicts, query)
        return
    from tdxtrace.report.verdict_text import verdict_text

    sources = findings.provenance.sources
    printing.draw(verdict_text(findings.verdicts, printing.max_rows, sources), query)


@expand_option_groups
def measurement_log_command(query: QueryOptions, printing: PrintOptions) -> None:
    """Print the calls that extend each TD's MRTD, in order, as text for diff.

    Example: tdxtrace measurement-log trace.txt --vm 0x7d000
    """
    findings = query.analyze()
    if printing.form is not OutputFormat.table:
        printing.show(findings.measurement_log, query)
        return
    from tdxtrace.report.build_text import measurement_text

    text = measurement_text(findings.measurement_log, findings.losses)
    printing.write_text(text, query)


@expand_option_groups
def host_check_command(query: QueryOptions, printing: PrintOptions) -> None:
    """Print which known weaknesses the TDX module of a host has, from its kernel's log alone.

    Example: dmesg | tdxtrace host-check -
    """
    findings = query.analyze()
    if printing.form is not OutputFormat.table:
        printing.show(findings.host_checks, query)
        return
    from tdxtrace.report.build_text import host_check_text

    names = [source.path for source in findings.provenance.sources]
    printing.write_text(host_check_text(findings.host_checks, names), query)


@expand_option_groups
def query_command(
    query: QueryOptions,
    statement: Annotated[
        str,
        typer.Argument(metavar="SQL", help="One SELECT, polars' dialect.", show_default=False),
    ],
    printing: PrintOptions,
) -> None:
    """Query any table with SQL: "show tables" names them, "describe TABLE" their columns.

    named_TABLE has names of leaves and statuses: where leaf = 'TDH.VP.ENTER'.

    Example: tdxtrace query trace.txt "select outcome, count(*) from retry_chains group by 1"
    """
    from tdxtrace import pipeline

    printing.show(pipeline.query(query.read(), statement, query.selection), query)


def _table_command(table: str, sentence: str, example: str = "") -> Command:
    """Make the command that prints a finding table.

    Args:
        table: Name of the table.
        sentence: First line of its help.
        example: Options of the example in the help.
    """

    def command(query: QueryOptions, printing: PrintOptions) -> None:
        printing.show(getattr(query.analyze(), table), query)

    words = f"tdxtrace {table.replace('_', '-')} trace.txt {example}".rstrip()
    command.__name__ = f"{table}_command"
    command.__doc__ = f"{sentence}\n\nExample: {words}"
    return expand_option_groups(command)


# Commands by table, in the order of the help. A tuple has the arguments of _table_command.
_COMMANDS: Final[Mapping[str, Command | tuple[str, ...]]] = {
    "events": events_command,
    "retry_chains": retry_chains_command,
    "zero_steps": (
        "Print the zero-step episodes: runs of refused entries of a vCPU.",
        "--format json",
    ),
    "verdicts": verdicts_command,
    "zero_step_causes": (
        "Print the cause of the repeated faults of each zero-step episode.",
        "--format csv",
    ),
    "step_thresholds": ("Print how many zero-step episodes each threshold would have made.",),
    "abandoned_requests": (
        "Print the requests that were abandoned busy, and the consequence of each.",
        "--dmesg dmesg.txt",
    ),
    "progress_loops": (
        "Print requests and faults repeated without a lock conflict, and their progress.",
    ),
    "td_conflicts": ("Print whether TDs made each other's SEAMCALLs busy.",),
    "counters": (
        "Print kvm->stat's counters of retried SEAMCALLs and of zero-step episodes over time.",
        "--format csv",
    ),
    "measurement_log": measurement_log_command,
    "accept_rates": (
        "Print how fast TDs accepted memory, per vCPU over time, and what limited it.",
        "--format csv",
    ),
    "boot_phases": ("Print the time of each TD by phase, from its build to its teardown.",),
    "tdvmcalls": ("Print the exits by TDG.VP.VMCALL, by function and over time.",),
    "module_updates": (
        "Print whether updates of the TDX module stopped all CPUs, and what waited.",
    ),
    "time_shares": ("Print the time of each TD's threads by activity: build, run, teardown.",),
}

COMMANDS: Final[Mapping[str, Command]] = {
    table.replace("_", "-"): made if callable(made) else _table_command(table, *made)
    for table, made in _COMMANDS.items()
}
"""Commands that print one table, by name."""
