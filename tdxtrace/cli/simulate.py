"""``tdxtrace simulate``: a synthetic trace with its truth; ``validate``: scores on such traces."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tdxtrace.cli import completion
from tdxtrace.cli.progress import working

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from tdxtrace.validate.cells import Cell
    from tdxtrace.validate.matrix import Result


def simulate_command(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="SCENARIO",
            help="A name from --list, or a TOML file.",
            show_default=False,
            autocompletion=completion.scenarios,
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Random seed.")] = 1,
    duration: Annotated[
        str | None,
        typer.Option("--duration", metavar="TIME", help="Simulated time, e.g. 2s or 50ms."),
    ] = None,
    vcpus: Annotated[int | None, typer.Option("--vcpus", help="vCPUs of every TD.")] = None,
    generation: Annotated[
        str | None, typer.Option("--generation", metavar="A|B|C", help="Of the TDX module.")
    ] = None,
    policy: Annotated[
        str | None, typer.Option("--policy", help="Retry policy of KVM: mainline, fixed-8, …")
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
    ] = [],  # noqa: B006 - never modified
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
    repeat: Annotated[int, typer.Option("--repeat", min=1, help="Write the run N times.")] = 1,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Output file, not stdout."),
    ] = None,
    truth: Annotated[
        Path | None, typer.Option("--truth", metavar="DIR", help="Write the truth tables there.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite existing files.")] = False,
    list_: Annotated[bool, typer.Option("--list", help="List the scenarios.")] = False,
    describe: Annotated[
        str | None, typer.Option("--describe", metavar="SCENARIO", help="Describe a scenario.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no summary.")] = False,
) -> None:
    """Write what tools would have recorded on a TDX host, and the ground truth.

    Example: tdxtrace simulate zero_step_attack -o trace.txt --truth truth/
    """
    from tdxtrace.simulate import command

    if list_ or describe is not None:
        typer.echo(command.listing() if describe is None else command.description(describe))
        return
    changes = command.ScenarioChanges(duration, vcpus, generation, policy, kernel)
    trace = command.TraceOptions(form, tuple(options), probes, arguments, tuple(faults), repeat)
    paths = command.OutputPaths(output, truth, force)
    doing = ["simulating"]
    with working(quiet, lambda: doing[-1]):
        summary = command.simulate(name, seed, changes, trace, paths, doing.append)
    if not quiet:
        print(summary, file=sys.stderr)


def validate_command(
    full: Annotated[
        bool, typer.Option("--full/--small", help="Hundreds of cells, or those of a test run.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", min=0, help="First random seed.")] = 1,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Number of seeds.")] = 1,
    n_cells: Annotated[
        int,
        typer.Option("--cells", min=0, help="Approximate number of evenly spaced cells; 0: all."),
    ] = 0,
    replay: Annotated[
        bool,
        typer.Option("--replay", help="Score replayed policies against runs of the policies."),
    ] = False,
    scenarios: Annotated[
        list[str], typer.Option("--scenario", metavar="NAME", help="Only this; may be repeated.")
    ] = [],  # noqa: B006 - never modified
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write every cell's scores.")
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", min=0, help="Processes; 0: one per CPU.")] = 0,
    captures: Annotated[
        bool, typer.Option("--by-capture", help="Add a table by format, probes and fault.")
    ] = False,
    confusions: Annotated[
        bool, typer.Option("--by-cause", help="Add a table of true holders against found ones.")
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
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file of --json.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no table.")] = False,
) -> None:
    """Score every answer against simulated truth; exit with 3 if a threshold is missed.

    Example: tdxtrace validate --full --seed 1000 --cells 200 --json scores.json
    """
    chosen_seeds = range(seed, seed + seeds)
    if replay:
        _validate_replay(chosen_seeds, scenarios, jobs, quiet)
        return
    from tdxtrace.validate import acceptance, cells
    from tdxtrace.validate.matrix import validate

    thresholds = acceptance.Thresholds(
        min_exact, min_precision, min_recall, min_cause_precision, min_cause_recall
    )
    made = cells.full(chosen_seeds) if full else cells.small(chosen_seeds)
    chosen = cells.spread(cells.select_scenarios(made, scenarios), n_cells)
    results = _with_progress(validate, chosen, jobs, quiet)
    if not quiet:
        _print_scores(results, captures, confusions)
    if json_file is not None:
        from tdxtrace.tables.files import atomic_file

        with atomic_file(json_file, force=force, inputs=()) as file:
            file.write(acceptance.as_json(results, thresholds).encode())
    short = acceptance.failures(results, thresholds)
    for line in short:
        print(f"tdxtrace: {line}", file=sys.stderr)
    if short:
        raise typer.Exit(3)


def _print_scores(results: list[Result], captures: bool, confusions: bool) -> None:
    from tdxtrace.validate import acceptance

    _print(acceptance.table(results))
    for rows in (acceptance.verdict_table(results), *acceptance.answer_tables(results)):
        typer.echo()
        _print(rows)
    if captures:
        _print(acceptance.by_capture(results))
    if confusions:
        _print(acceptance.confusion_table(results))


def _validate_replay(seeds: Sequence[int], scenarios: list[str], jobs: int, quiet: bool) -> None:
    from tdxtrace.validate import replays

    with working(quiet, lambda: "validating replays"):
        compared = replays.compare(seeds, replays.select_scenarios(scenarios), jobs)
    if not quiet:
        _print(replays.table(compared))
    held = replays.share_held(compared)
    if held is not None and held < replays.MIN_HELD:
        print(
            f"tdxtrace: intervals of replays: {held:.6f} contain the truth, at least "
            f"{replays.MIN_HELD:g} is required",
            file=sys.stderr,
        )
        raise typer.Exit(3)


def _with_progress(
    validate: Callable[..., list[Result]], chosen: list[Cell], jobs: int, quiet: bool
) -> list[Result]:
    doing = ["validating"]
    with working(quiet, lambda: doing[-1]):
        return validate(chosen, jobs, lambda n, of: doing.append(f"{n:,} of {of:,} runs"))


def _print(rows: Sequence[list[str]]) -> None:
    for line in _aligned(rows):
        typer.echo(line)


def _aligned(rows: Sequence[list[str]]) -> Iterator[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        first, *rest = zip(row, widths, strict=True)
        cells = [f"{first[0]:<{first[1]}}", *(f"{text:>{width}}" for text, width in rest)]
        yield "  ".join(cells)
