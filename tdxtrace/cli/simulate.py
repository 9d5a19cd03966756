"""``tdxtrace simulate SCENARIO``: a synthetic trace with its ground truth."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


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
    kernel: Annotated[str | None, typer.Option("--kernel", help="6.16, 6.18, 6.19 or 7.0.")] = None,
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
        str, typer.Option("--probes", help="wrappers, retargs, seamcall or stock.")
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
