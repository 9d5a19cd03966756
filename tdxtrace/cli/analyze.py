"""``tdxtrace analyze log TRACE``: the main command."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tdxtrace.cli import options

if TYPE_CHECKING:
    from tdxtrace.tables.trace import Findings

_Words = Annotated[
    list[str],
    typer.Argument(
        metavar="[log] TRACE...",
        help="Traces to read: trace.dat, perf.data, raw ring-buffer pages; ftrace, trace-cmd "
        "report, perf script or function_graph text; plain, gzip, zstd or xz; a folder that "
        "convert made; - for standard input.",
        show_default=False,
    ),
]


def analyze_command(
    words: _Words,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="DIR", help="Write every table (Parquet) and findings.json."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print findings as JSON.")] = False,
    vm: options.Vms = [],  # noqa: B006 - typer reads, nobody writes it
    leaf: options.Leaves = [],  # noqa: B006
    since: options.Since = None,
    until: options.Until = None,
    fail_on: options.FailOn = [],  # noqa: B006
    input_format: options.InputFormat = None,
    mappings: options.Mappings = [],  # noqa: B006
    level_base: options.LevelBase = None,
    formats: options.Formats = None,
    cache: options.Cache = False,
    quiet: options.Quiet = False,
    no_color: options.NoColor = False,
) -> None:
    """Read traces and say what was retried, how often, and what was lost.

    Example: tdxtrace analyze log trace.txt --fail-on 'max-attempts>16'
    """
    from tdxtrace.analysis.thresholds import exceeded, parse_rule
    from tdxtrace.cli.inputs import Request
    from tdxtrace.pipeline import analyze

    rules = [parse_rule(text) for text in fail_on]
    request = Request(
        _traces(words),
        vm,
        leaf,
        since,
        until,
        input_format,
        mappings,
        level_base,
        quiet,
        formats,
        cache,
    )
    trace = request.read()
    findings = analyze(trace, request.selection)
    _write(findings, output, as_json, quiet, no_color)
    broken = exceeded(findings, rules)
    for line in broken:
        print(f"tdxtrace: {line}", file=sys.stderr)
    if broken:
        raise typer.Exit(3)


def _traces(words: list[str]) -> list[str]:
    """The traces: the word ``log`` before them may be said or left out."""
    return words[1:] if words[0] == "log" and len(words) > 1 else words


def _write(
    findings: Findings, output: Path | None, as_json: bool, quiet: bool, no_color: bool
) -> None:
    from tdxtrace.cli import outputs
    from tdxtrace.report.facts import facts

    if output is not None:
        outputs.write_folder(output, findings.tables(), facts(findings))
    if as_json:
        typer.echo(outputs.json_text(facts(findings)), nl=False)
    elif not quiet:
        from tdxtrace.report.text import screen

        height = shutil.get_terminal_size(fallback=(80, 24)).lines
        outputs.print_screen(screen(findings, height), no_color)
