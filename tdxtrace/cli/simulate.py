"""``tdxtrace simulate``: a synthetic trace with its truth; ``validate``: scores on such traces."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from tdxtrace.validate.cells import Cell
    from tdxtrace.validate.matrix import Result


def simulate_command(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="SCENARIO", help="A name from --list, or a TOML file.", show_default=False
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Chance: any number.")] = 1,
    duration: Annotated[
        str | None, typer.Option("--duration", metavar="TIME", help="Length, e.g. 2s or 50ms.")
    ] = None,
    vcpus: Annotated[int | None, typer.Option("--vcpus", help="vCPUs of every TD.")] = None,
    generation: Annotated[
        str | None, typer.Option("--generation", metavar="A|B|C", help="Of the TDX module.")
    ] = None,
    policy: Annotated[
        str | None, typer.Option("--policy", help="What KVM does with busy: mainline, fixed-8, …")
    ] = None,
    kernel: Annotated[
        str | None, typer.Option("--kernel", help="6.16, 6.18, 6.19, 7.0 or 7.2.")
    ] = None,
    form: Annotated[
        str,
        typer.Option(
            "--format",
            help="tracefs, trace-pipe, trace-cmd, perf, graph, dmesg, trace.dat or trace.dat-v6.",
        ),
    ] = "tracefs",
    options: Annotated[
        list[str],
        typer.Option("--option", metavar="WORD", help="Of the format: tgid, latency, ns, raw, …"),
    ] = [],  # noqa: B006 - typer reads, nobody writes it
    probes: Annotated[
        str,
        typer.Option(
            "--probes",
            help="wrappers, retargs, seamcall, stock, capture, …",
        ),
    ] = "wrappers",
    arguments: Annotated[
        bool,
        typer.Option("--arguments/--no-arguments", help="Whether probes fetch td, gpa, level."),
    ] = True,
    faults: Annotated[
        list[str],
        typer.Option("--fault", metavar="KIND=AMOUNT", help="Of the capture, e.g. lost=0.05."),
    ] = [],  # noqa: B006
    repeat: Annotated[
        int, typer.Option("--repeat", min=1, help="Write the run so often, for large files.")
    ] = 1,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Write there, not to stdout."),
    ] = None,
    truth: Annotated[
        Path | None, typer.Option("--truth", metavar="DIR", help="Write the truth tables there.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite what is there.")] = False,
    list_: Annotated[bool, typer.Option("--list", help="Name the scenarios.")] = False,
    describe: Annotated[
        str | None, typer.Option("--describe", metavar="SCENARIO", help="Say what one is.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No summary.")] = False,
) -> None:
    """Write what the tools would have recorded on a TDX host, and the truth behind it.

    Example: tdxtrace simulate zero_step_attack --seed 7 -o trace.txt --truth truth/
    """
    from tdxtrace.simulate import command

    if list_ or describe is not None:
        typer.echo(command.listing() if describe is None else command.description(describe))
        return
    changes = command.ScenarioChanges(duration, vcpus, generation, policy, kernel)
    trace = command.TraceOptions(form, tuple(options), probes, arguments, tuple(faults), repeat)
    summary = command.simulate(
        name, seed, changes, trace, command.OutputPaths(output, truth, force)
    )
    if not quiet:
        print(summary, file=sys.stderr)


def validate_command(
    full: Annotated[
        bool, typer.Option("--full/--small", help="Hundreds of cells, or those of a test run.")
    ] = False,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Seeds of --full.")] = 1,
    scenarios: Annotated[
        list[str], typer.Option("--scenario", metavar="NAME", help="Only this; may be repeated.")
    ] = [],  # noqa: B006 - typer reads, nobody writes it
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write every cell's scores.")
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", min=0, help="Processes; 0: one per CPU.")] = 0,
    captures: Annotated[
        bool, typer.Option("--by-capture", help="Add a table by format, probes and fault.")
    ] = False,
    confusions: Annotated[
        bool, typer.Option("--by-cause", help="Add a table of true causes against found ones.")
    ] = False,
    min_exact: Annotated[
        float,
        typer.Option("--min-exact", min=0, max=1, help="Share of sure chains that are exact."),
    ] = 1.0,
    min_precision: Annotated[
        float, typer.Option("--min-precision", min=0, max=1, help="Of sure zero-step episodes.")
    ] = 1.0,
    min_recall: Annotated[
        float, typer.Option("--min-recall", min=0, max=1, help="Of zero-step episodes shown.")
    ] = 0.99,
    min_cause_precision: Annotated[
        float,
        typer.Option("--min-cause-precision", min=0, max=1, help="Of the answers with each cause."),
    ] = 0.99,
    min_cause_recall: Annotated[
        float,
        typer.Option("--min-cause-recall", min=0, max=1, help="Of each cause, on full captures."),
    ] = 0.99,
    force: Annotated[bool, typer.Option("--force", help="Overwrite what --json names.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no table.")] = False,
) -> None:
    """Score every analysis against simulated truth; exit with 3 if a threshold is missed.

    Example: tdxtrace validate --full --json scores.json
    """
    from tdxtrace.validate import acceptance, cells
    from tdxtrace.validate.acceptance import confusion_table
    from tdxtrace.validate.matrix import validate

    thresholds = acceptance.Thresholds(
        min_exact, min_precision, min_recall, min_cause_precision, min_cause_recall
    )
    chosen = cells.select_scenarios(cells.full(seeds) if full else cells.small(), scenarios)
    results = _with_progress(validate, chosen, jobs, quiet)
    if not quiet:
        _print(acceptance.table(results))
        typer.echo()
        _print(acceptance.verdict_table(results))
    if captures and not quiet:
        _print(acceptance.by_capture(results))
    if confusions and not quiet:
        _print(confusion_table(results))
    if json_file is not None:
        from tdxtrace.tables.files import whole_file

        with whole_file(json_file, force=force, inputs=()) as file:
            file.write(acceptance.as_json(results, thresholds).encode())
    short = acceptance.failures(results, thresholds)
    for line in short:
        print(f"tdxtrace: {line}", file=sys.stderr)
    if short:
        raise typer.Exit(3)


def _with_progress(
    validate: Callable[..., list[Result]], chosen: list[Cell], jobs: int, quiet: bool
) -> list[Result]:
    if quiet or not sys.stderr.isatty():
        return validate(chosen, jobs)
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("runs", total=None)
        return validate(chosen, jobs, lambda n, of: bar.update(task, completed=n, total=of))


def _print(rows: Sequence[list[str]]) -> None:
    for line in _aligned(rows):
        typer.echo(line)


def _aligned(rows: Sequence[list[str]]) -> Iterator[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        first, *rest = zip(row, widths, strict=True)
        cells = [f"{first[0]:<{first[1]}}", *(f"{text:>{width}}" for text, width in rest)]
        yield "  ".join(cells)
