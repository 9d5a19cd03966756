"""Commands about retry limits: attempts, policies, recommend."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from tdxtrace.cli import completion
from tdxtrace.cli.option_groups import expand_option_groups
from tdxtrace.cli.options import OutputFormat
from tdxtrace.cli.query_options import PrintOptions, QueryOptions
from tdxtrace.errors import QueryError
from tdxtrace.tables.enums import Unit, View

if TYPE_CHECKING:
    from tdxtrace.recommend.target import Target

_CONFIDENCE: Final = 0.95


@expand_option_groups
def attempts_command(
    query: QueryOptions,
    printing: PrintOptions,
    by: Annotated[View, typer.Option("--by", help="One curve for each.")] = View.leaf,
    unit: Annotated[
        Unit, typer.Option("--unit", help="Attempts, or ns spent retrying.")
    ] = Unit.attempts,
    latencies: Annotated[
        bool,
        typer.Option("--latencies", help="Durations of busy and successful calls, and pauses."),
    ] = False,
) -> None:
    """Print the share of requests done within a number of attempts, or a time.

    Example: tdxtrace attempts trace.txt --leaf TDH.MEM.PAGE.AUG --unit ns
    """
    import polars as pl

    from tdxtrace.cli.histogram import histogram_of, show_counted

    if (counted := histogram_of(query)) is not None:
        show_counted(counted, query, printing)
        return
    findings = query.analyze()
    if latencies:
        printing.show(findings.latencies, query)
        return
    rows = findings.attempts.filter(pl.col("by") == by.value, pl.col("unit") == unit.value)
    printing.show(rows, query)


@expand_option_groups
def policies_command(
    query: QueryOptions,
    printing: PrintOptions,
    policy: Annotated[
        list[str],
        typer.Option(
            "--policy",
            metavar="NAME",
            autocompletion=completion.policies,
            help="Only this: seed-loop, v1-series, mainline, endless, fixed-5, budget-1ms, or a "
            "policy of --policies; repeatable.",
        ),
    ] = [],  # noqa: B006 - never modified
    file: Annotated[
        Path | None,
        typer.Option("--policies", metavar="FILE", help="TOML file with further policies."),
    ] = None,
) -> None:
    """Print what each retry policy would have done with the requests of a trace.

    Example: tdxtrace policies trace.txt --policy mainline --policy fixed-16
    """
    from tdxtrace.cli.histogram import histogram_of, show_policies
    from tdxtrace.recommend.policy_definitions import DEFAULTS, policy_named
    from tdxtrace.recommend.policy_file import read_policies
    from tdxtrace.recommend.replay import policies

    own = read_policies(file) if file is not None else {}
    names = policy or [*DEFAULTS, *own]
    chosen = [policy_named(name, own) for name in dict.fromkeys(names)]
    if (counted := histogram_of(query)) is not None:
        show_policies(counted, query, printing, policy or ["fixed-16", "fixed-5", "fixed-2"])
        return
    findings = query.analyze()
    rows = policies(findings.scan("retry_chains"), findings.scan("busy_answers"), chosen)
    if printing.form is not OutputFormat.table:
        printing.show(rows, query, file)
        return
    import polars as pl

    from tdxtrace.report.limits_text import policies_text

    shown = rows.filter((pl.col("n_retried") > 0) | (pl.col("n_undecided") > 0))
    printing.draw(policies_text(shown, printing.max_rows), query, file)


@expand_option_groups
def recommend_command(
    query: QueryOptions,
    printing: PrintOptions,
    target: Annotated[
        float | None,
        typer.Option("--target", metavar="P", help="Largest share of requests that may need more."),
    ] = None,
    confidence: Annotated[
        float, typer.Option("--confidence", metavar="C", help="One-sided confidence of that.")
    ] = _CONFIDENCE,
    at_most: Annotated[
        str | None,
        typer.Option(
            "--at-most",
            metavar="RATE",
            help='Instead of --target: "1 VM per year", "1 per VM-hour", "1 in 1000 boots".',
        ),
    ] = None,
    pace: Annotated[
        str | None,
        typer.Option(
            "--pace",
            metavar="TIME",
            help="Time of an attempt on the kernel without probes, such as 850ns; with --leaf.",
        ),
    ] = None,
    ask: Annotated[
        bool,
        typer.Option(
            "--questions", help="Answer the kernel list's questions: 16 or 1024? a lock? ..."
        ),
    ] = False,
) -> None:
    """Print which share of requests needs more, or which limit meets a target.

    Example: tdxtrace recommend monday.txt tuesday.txt --target 1e-3
    """
    from tdxtrace.cli.histogram import histogram_of, show_limits
    from tdxtrace.recommend.limits import limits, observed_seconds
    from tdxtrace.recommend.target import parse_target
    from tdxtrace.report.limits_text import limits_text
    from tdxtrace.tables.times import parse_duration

    if (counted := histogram_of(query)) is not None:
        if at_most is not None or pace is not None or ask or confidence != _CONFIDENCE:
            raise QueryError("a histogram supports only --target of these options")
        show_limits(counted, query, printing, target)
        return
    parsed_target = parse_target(target=target, confidence=confidence, at_most=at_most)
    pace_ns = None if pace is None else float(parse_duration(pace))
    if ask:
        from tdxtrace.report.statements_text import questions_text

        printing.draw(questions_text(query.analyze()), query)
        return
    if target is None and at_most is None:
        _state(query, printing, parsed_target, pace_ns)
        return
    found = query.analyze()
    seconds = observed_seconds(found.provenance)
    chains = found.scan("retry_chains")
    rows = limits(found.attempts, chains, found.losses, seconds, parsed_target, pace_ns)
    if printing.form is OutputFormat.table:
        printing.draw(limits_text(rows, at_most), query)
    else:
        printing.show(rows, query)


def _state(
    query: QueryOptions, printing: PrintOptions, parsed_target: Target, pace_ns: float | None
) -> None:
    """Print the statements that need no target; skips causes, which take the most time."""
    from tdxtrace.analysis.attempts import attempts
    from tdxtrace.recommend.limits import limits, observed_seconds
    from tdxtrace.recommend.statements import limit_statements, modelled_limits
    from tdxtrace.report.statements_text import statements_text

    found = query.analyze()
    chains = found.scan("retry_chains")
    curves = attempts(chains, found.scan("busy_answers"))
    statements = limit_statements(curves, chains, parsed_target.confidence)
    if printing.form is not OutputFormat.table:
        printing.show(statements, query)
        return
    of_trace = (curves, chains, found.losses, observed_seconds(found.provenance))
    printing.draw(
        statements_text(
            statements,
            modelled_limits(*of_trace, parsed_target.confidence, pace_ns),
            limits(*of_trace, parsed_target, pace_ns),
        ),
        query,
    )
