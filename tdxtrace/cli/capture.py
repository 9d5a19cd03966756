"""``tdxtrace capture``: check what can be traced, print a recipe, record, clean up."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from tdxtrace.capture.options import HELP, Detail, Dialect, RecordOptions
from tdxtrace.cli import options
from tdxtrace.cli.help import Command
from tdxtrace.cli.progress import working
from tdxtrace.tables.text import one_line

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from tdxtrace.capture.doctor import Verdict

_COLOURS: Final = {
    "ok": "green",
    "limited": "yellow",
    "missing": "red",
    "unknown": "magenta",
    "note": "default",
}


app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Check what can be traced on this host, get the recipe, record, clean up.",
)
Level = Annotated[
    Detail,
    typer.Option("--level", help=HELP["level"]),
]
Seamcalls = Annotated[bool, typer.Option("--seamcalls", help=HELP["seamcalls"])]
OnlyTds = Annotated[bool, typer.Option("--only-tds", help=HELP["only_tds"])]
Rate = Annotated[
    int | None,
    typer.Option("--rate", min=1, metavar="N", help=HELP["rate"]),
]
Program = Annotated[
    Path | None,
    typer.Option(
        "--program",
        metavar="FILE",
        help=HELP["program"],
    ),
]
Tracefs = Annotated[Path | None, typer.Option("--tracefs", metavar="DIR", help=HELP["tracefs"])]
Buffer = Annotated[
    str | None,
    typer.Option("--buffer", metavar="SIZE", help=HELP["buffer"]),
]
Pids = Annotated[list[int], typer.Option("--pid", help=HELP["pid"])]
BtfFiles = Annotated[
    list[Path],
    typer.Option("--btf", metavar="FILE", help=HELP["btf"]),
]


@app.command("doctor", cls=Command)
def doctor_command(
    as_json: Annotated[bool, typer.Option("--json", help=HELP["json"])] = False,
    tracefs: Tracefs = None,
    color: options.Coloring = options.Color.auto,
    no_color: options.NoColor = False,
) -> None:
    """Check what can be traced on this host; print impact and fix of what is missing.

    Changes nothing.

    Example: sudo tdxtrace capture doctor
    """
    from tdxtrace.capture.doctor import examine
    from tdxtrace.capture.host import Host
    from tdxtrace.cli import screen

    verdict = examine(Host(tracefs_at=tracefs))
    if as_json:
        typer.echo(screen.json_text(verdict.to_dict()), nl=False)
        return

    chosen = options.chosen_color(color, no_color)
    screen.print_screen(verdict_table(verdict), chosen)
    screen.print_screen(verdict_line(verdict), chosen)


@app.command("plan", cls=Command)
def plan_command(
    kernel: Annotated[
        str | None,
        typer.Option("--kernel", metavar="X.Y", help=HELP["kernel"]),
    ] = None,
    kallsyms: Annotated[
        Path | None,
        typer.Option("--from-kallsyms", metavar="FILE", help=HELP["kallsyms"]),
    ] = None,
    btf: BtfFiles = [],  # noqa: B006 - never modified
    level: Level = Detail.full,
    dialect: Annotated[Dialect, typer.Option("--dialect", help=HELP["dialect"])] = Dialect.tracefs,
    seamcalls: Seamcalls = False,
    only_tds: OnlyTds = False,
    rate: Rate = None,
    program: Program = None,
    tracefs: Tracefs = None,
) -> None:
    """Print the exact recipe for a kernel as a script: probes, events, clock, buffer.

    Example: tdxtrace capture plan --kernel 6.18 --dialect trace-cmd > record.sh
    """
    from tdxtrace.capture.choose import kernel_to_trace, recipe_options
    from tdxtrace.capture.dialects import render
    from tdxtrace.capture.host import Host
    from tdxtrace.capture.recipe import recipe

    chosen = kernel_to_trace(Host(tracefs_at=tracefs), kernel, kallsyms, btf, program)
    made = recipe(chosen, recipe_options(level.value, seamcalls, only_tds, rate))
    typer.echo(render(made, dialect), nl=False)


@app.command("record", cls=Command)
def record_command(
    command: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- COMMAND...]", help=HELP["command"], show_default=False),
    ] = None,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="FILE", help=HELP["output"]),
    ] = Path("trace.dat"),
    duration: Annotated[
        str | None,
        typer.Option("--duration", metavar="TIME", help=HELP["duration"]),
    ] = None,
    level: Level = Detail.full,
    seamcalls: Seamcalls = False,
    only_tds: OnlyTds = False,
    rate: Rate = None,
    buffer: Buffer = None,
    pids: Pids = [],  # noqa: B006
    program: Program = None,
    tracefs: Tracefs = None,
    force: Annotated[bool, typer.Option("--force", help=HELP["force"])] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help=HELP["quiet"])] = False,
) -> None:
    """Record in a private tracefs instance, and remove it and its probes at the end.

    Needs root. The command after -- is stopped at the end of the recording.

    Example: sudo tdxtrace capture record -o trace.dat --duration 10s
    """
    from tdxtrace.capture.choose import plan_recording
    from tdxtrace.capture.host import Host
    from tdxtrace.capture.recorder import record

    host = Host(tracefs_at=tracefs)
    options = RecordOptions(
        *(level.value, seamcalls, only_tds, rate, program),
        output=output,
        buffer=buffer,
        duration=duration,
        command=command or (),
        pids=pids,
        force=force,
    )
    so_far = [(0, 0)]
    plan = replace(
        plan_recording(host, options, notify),
        report=lambda recorded, lost: so_far.append((recorded, lost)),
    )
    # No progress while a command uses the terminal.
    with working(quiet or bool(command), lambda: _recording(*so_far[-1])):
        outcome = record(host, plan)
    if not quiet:
        notify(outcome.summary(output))


@app.command("histogram", cls=Command)
def histogram_command(
    command: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- COMMAND...]", help="Count while it runs.", show_default=False),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="Counts, as JSON.")
    ] = Path("histogram.json"),
    duration: Annotated[
        str | None,
        typer.Option("--duration", metavar="TIME", help="How long, e.g. 60s; else to Ctrl-C."),
    ] = None,
    every: Annotated[
        str, typer.Option("--every", metavar="TIME", help="Time between prints of the counts.")
    ] = "60s",
    program: Program = None,
    tracefs: Tracefs = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the output.")] = False,
) -> None:
    """Count requests and attempts in the kernel with bpftrace, without recording calls.

    Needs root and bpftrace. analyze, attempts, recommend and policies read the file.

    Example: sudo tdxtrace capture histogram -o counts.json --duration 3600s
    """
    from tdxtrace.capture.choose import kernel_to_trace, recipe_options, seconds_of
    from tdxtrace.capture.counting import count_requests
    from tdxtrace.capture.dialects import histogram_script
    from tdxtrace.capture.host import Host
    from tdxtrace.capture.recipe import recipe

    every_s = max(1, round(seconds_of(every)))
    chosen = kernel_to_trace(Host(tracefs_at=tracefs), None, None, [], program)
    made = recipe(chosen, recipe_options(Detail.full.value, False, False, None))
    script = histogram_script(made, every_s)
    count_requests(script, output, duration, command or (), force=force)
    notify(f"wrote {output}; read it with: tdxtrace analyze {output}")


@app.command("clean", cls=Command)
def clean_command(tracefs: Tracefs = None) -> None:
    """Remove probes and instances of killed recorders, and nothing of other tools.

    Example: sudo tdxtrace capture clean
    """
    from tdxtrace.capture.choose import writable_tracefs
    from tdxtrace.capture.host import Host
    from tdxtrace.capture.instance import clean
    from tdxtrace.errors import InputError

    done = clean(writable_tracefs(Host(tracefs_at=tracefs)))
    for name in done.removed:
        typer.echo(f"removed {name}")
    if not (done.removed or done.kept):
        typer.echo("nothing to clean")
    if done.kept:
        raise InputError(f"not removed: {', '.join(done.kept)}")


def _recording(n_recorded: int, n_lost: int) -> str:
    return f"recording: {n_recorded:,} events, {n_lost:,} lost; Ctrl-C ends it"


def verdict_table(verdict: Verdict) -> Table:
    """Return the checks as a table, with the impact and fix of each check that fails."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 1))
    for check in verdict.checks:
        shown = [Text(one_line(check.found))]
        if check.state != "ok":
            named = (("impact", check.lost), ("fix", check.remedy))
            shown += [Text(f"{label}: {one_line(text)}", "dim") for label, text in named if text]
        state = Text(check.state, _COLOURS[check.state])
        table.add_row(Text(check.name.replace("_", " ")), state, Text("\n").join(shown))
    return table


def verdict_line(verdict: Verdict) -> Text:
    """Return the overall verdict as one line."""
    from rich.text import Text

    return Text(f"\n{verdict.sentence}\n({one_line(verdict.why)})")


def notify(text: str) -> None:
    """Print a line to stderr."""
    print(f"tdxtrace: {one_line(text, 2000)}", file=sys.stderr)
