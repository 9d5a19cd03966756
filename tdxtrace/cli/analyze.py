"""``tdxtrace analyze log TRACE``: the main command."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tdxtrace.cli import options
from tdxtrace.cli.option_groups import expand_option_groups
from tdxtrace.cli.query_options import QueryOptions

if TYPE_CHECKING:
    from tdxtrace.tables.trace import Findings


@expand_option_groups
def analyze_command(
    query: QueryOptions,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="DIR", help="Write every table (Parquet) and findings.json."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print findings as JSON.")] = False,
    fail_on: options.FailOn = [],  # noqa: B006 - typer reads, nobody writes it
) -> None:
    """Read traces and say what was retried, how often, and what was lost.

    Example: tdxtrace analyze log trace.txt --fail-on 'max-attempts>16'
    """
    from tdxtrace.analysis.thresholds import check_findings, parse_rule

    rules = [parse_rule(text) for text in fail_on]
    query = replace(query, traces=_traces(query.traces))
    findings = query.analyze()
    _write(findings, output, as_json, query)
    broken = check_findings(findings, rules)
    for line in broken:
        print(f"tdxtrace: {line}", file=sys.stderr)
    if broken:
        raise typer.Exit(3)


def _traces(words: list[str]) -> list[str]:
    """Traces without the optional word ``log`` before them."""
    return words[1:] if words[0] == "log" and len(words) > 1 else words


def _write(findings: Findings, output: Path | None, as_json: bool, query: QueryOptions) -> None:
    from tdxtrace.cli import outputs
    from tdxtrace.report.json_data import findings_data

    if output is not None:
        outputs.write_folder(output, findings.tables(), findings_data(findings), query.inputs)
    if as_json:
        typer.echo(outputs.json_text(findings_data(findings)), nl=False)
    elif not query.quiet:
        from tdxtrace.report.findings_text import findings_text

        height = shutil.get_terminal_size(fallback=(80, 24)).lines
        outputs.print_screen(findings_text(findings, height), query.no_color)
