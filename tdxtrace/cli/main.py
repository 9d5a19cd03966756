"""The program: its commands, its one place for errors, its exit status."""

from __future__ import annotations

import gc
import os
import sys
from typing import Annotated

import typer

from tdxtrace import __version__
from tdxtrace.cli import (
    analyze,
    capture,
    cause_commands,
    compare,
    convert,
    decode,
    export,
    limit_commands,
    notebook,
    query,
    report,
    simulate,
    table_commands,
    validate,
    watch,
)
from tdxtrace.cli.help import WHERE, Command, show_reading
from tdxtrace.errors import TdxtraceError

EXIT_INPUT = 1
EXIT_WORDS = 2
EXIT_THRESHOLD = 3

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tdxtrace {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    help_reading: Annotated[
        bool,
        typer.Option(WHERE, callback=show_reading, is_eager=True, help="Say how traces are read."),
    ] = False,
) -> None:
    """Find out how often TDX SEAMCALLs are retried, and whose fault it is.

    Start with: tdxtrace analyze log TRACE
    """


app.command("analyze", cls=Command)(analyze.analyze_command)
app.command("report", cls=Command)(report.report_command)
app.command("compare", cls=Command)(compare.compare_command)
app.command("convert", cls=Command)(convert.convert_command)
app.command("events", cls=Command)(table_commands.events_command)
app.command("retry-chains", cls=Command)(table_commands.retry_chains_command)
app.command("zero-steps", cls=Command)(table_commands.zero_steps_command)
app.command("verdicts", cls=Command)(table_commands.verdicts_command)
app.command("zero-step-causes", cls=Command)(table_commands.zero_step_causes_command)
app.command("step-thresholds", cls=Command)(table_commands.step_thresholds_command)
app.command("abandoned-requests", cls=Command)(table_commands.abandoned_requests_command)
app.command("progress-loops", cls=Command)(table_commands.progress_loops_command)
app.command("td-conflicts", cls=Command)(table_commands.td_conflicts_command)
app.command("time-shares", cls=Command)(table_commands.time_shares_command)
app.command("export", cls=Command)(export.export_command)
app.command("notebook", cls=Command)(notebook.notebook_command)
app.command("query", cls=Command)(query.query_command)
app.command("busy-causes", cls=Command)(cause_commands.busy_causes_command)
app.command("attempts", cls=Command)(limit_commands.attempts_command)
app.command("policies", cls=Command)(limit_commands.policies_command)
app.command("explain", cls=Command)(cause_commands.explain_command)
app.command("recommend", cls=Command)(limit_commands.recommend_command)
# A signed status word begins like an option.
app.command("decode", cls=Command, context_settings={"ignore_unknown_options": True})(
    decode.decode_command
)
app.command("simulate", cls=Command)(simulate.simulate_command)
app.command("validate", cls=Command)(validate.validate_command)
app.add_typer(capture.app, name="capture")
app.command("watch", cls=Command)(watch.watch_command)


def main() -> None:
    """Run the command line.

    Exit status: 0 answered, 1 the input is wrong, 2 the words are wrong, 3 a
    threshold given by the user was exceeded.
    """
    try:
        app(prog_name="tdxtrace")
    except TdxtraceError as error:
        from tdxtrace.errors import QueryError

        print(f"tdxtrace: {error}", file=sys.stderr)
        raise SystemExit(EXIT_WORDS if isinstance(error, QueryError) else EXIT_INPUT) from None
    except BrokenPipeError:
        # The reader (head, less) has enough: say nothing more, also not at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(EXIT_INPUT) from None
    finally:
        # The process ends: Python need not look through all modules for circles of objects.
        gc.freeze()
