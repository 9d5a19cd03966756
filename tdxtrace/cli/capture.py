"""``tdxtrace capture``: check what can be traced, print a recipe, record, clean up."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from tdxtrace.capture.options import Detail, Dialect, RecordOptions
from tdxtrace.cli import options
from tdxtrace.cli.help import Command
from tdxtrace.tables.text import one_line

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from tdxtrace.capture.doctor import Verdict
    from tdxtrace.capture.recorder import RecordingResult

_COLOURS: Final = {
    "ok": "green",
    "limited": "yellow",
    "missing": "red",
    "unknown": "magenta",
    "note": "default",
}
_SUMMARY: Final = {
    "full": "This host can be captured in full: tdxtrace capture record -o trace.dat",
    "stock": "Only KVM's own events: tdxtrace capture record --level stock -o trace.dat",
    "program": "Only programs can be captured (--program), not this kernel's SEAMCALLs.",
    "nothing": "Nothing can be captured here.",
}


app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="See what this host lets be traced, get the recipe, record, clean up.",
)
Level = Annotated[
    Detail,
    typer.Option(
        "--level", help="minimal: faults and zaps, returns only; stock: KVM's own events."
    ),
]
Seamcalls = Annotated[
    bool, typer.Option("--seamcalls", help="Probe __seamcall too: shows retries for entropy.")
]
OnlyTds = Annotated[
    bool, typer.Option("--only-tds", help="Leave out KVM's events of VMs that are no TDs.")
]
Rate = Annotated[
    int | None,
    typer.Option("--rate", min=1, metavar="N", help="Events per second on the busiest CPU."),
]
Program = Annotated[
    Path | None,
    typer.Option(
        "--program",
        metavar="FILE",
        help="Probe a program with functions named like the wrappers, not the kernel.",
    ),
]
Tracefs = Annotated[
    Path | None, typer.Option("--tracefs", metavar="DIR", help="Where tracefs is mounted.")
]
Buffer = Annotated[
    str | None,
    typer.Option("--buffer", metavar="SIZE", help="Per CPU, e.g. 64M; else from --rate."),
]
Pids = Annotated[
    list[int], typer.Option("--pid", help="Only this process and its children; repeatable.")
]
BtfFiles = Annotated[
    list[Path],
    typer.Option(
        "--btf", metavar="FILE", help="Types of that kernel; then of its kvm_intel, if a module."
    ),
]


@app.command("doctor", cls=Command)
def doctor_command(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    tracefs: Tracefs = None,
    color: options.Coloring = options.Color.auto,
    no_color: options.NoColor = False,
) -> None:
    """Say what this host lets be traced, what is lost without the rest, and how to get it.

    Changes nothing.

    Example: sudo tdxtrace capture doctor
    """
    from tdxtrace.capture.doctor import examine
    from tdxtrace.capture.host import Host
    from tdxtrace.cli import outputs

    verdict = examine(Host(tracefs_at=tracefs))
    if as_json:
        typer.echo(outputs.json_text(verdict.to_dict()), nl=False)
        return

    chosen = options.chosen_color(color, no_color)
    outputs.print_screen(verdict_table(verdict), chosen)
    outputs.print_screen(verdict_line(verdict), chosen)


@app.command("plan", cls=Command)
def plan_command(
    kernel: Annotated[
        str | None,
        typer.Option("--kernel", metavar="X.Y", help="For that kernel, not for this one."),
    ] = None,
    kallsyms: Annotated[
        Path | None,
        typer.Option("--from-kallsyms", metavar="FILE", help="A copy of its /proc/kallsyms."),
    ] = None,
    btf: BtfFiles = [],  # noqa: B006 - typer reads, nobody writes it
    level: Level = Detail.full,
    dialect: Annotated[
        Dialect, typer.Option("--dialect", help="Which tool shall record.")
    ] = Dialect.tracefs,
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
        typer.Argument(metavar="[-- COMMAND...]", help="Record while it runs.", show_default=False),
    ] = None,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="FILE", help="trace.dat, trace.txt, or a folder of raw pages."
        ),
    ] = Path("trace.dat"),
    duration: Annotated[
        str | None,
        typer.Option("--duration", metavar="TIME", help="How long, e.g. 10s; else to Ctrl-C."),
    ] = None,
    level: Level = Detail.full,
    seamcalls: Seamcalls = False,
    only_tds: OnlyTds = False,
    rate: Rate = None,
    buffer: Buffer = None,
    pids: Pids = [],  # noqa: B006
    program: Program = None,
    tracefs: Tracefs = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite what --output names.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No summary.")] = False,
) -> None:
    """Record in a tracefs instance of its own; leave everything as it was.

    Needs root. A command given after -- is ended with the recording.

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
    plan = plan_recording(host, options, notify)
    outcome = record(host, plan)
    if not quiet:
        notify(summary(outcome, output))


@app.command("clean", cls=Command)
def clean_command(tracefs: Tracefs = None) -> None:
    """Remove what a recorder that was killed left behind; nothing of anyone else's.

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


def verdict_table(verdict: Verdict) -> Table:
    """Return the checks as a table, with what is lost and the remedy where one fails."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 1))
    for check in verdict.checks:
        shown = [Text(one_line(check.found))]
        if check.state != "ok":
            named = (("lost", check.lost), ("to get it", check.remedy))
            shown += [Text(f"{label}: {one_line(text)}", "dim") for label, text in named if text]
        state = Text(check.state, _COLOURS[check.state])
        table.add_row(Text(check.name.replace("_", " ")), state, Text("\n").join(shown))
    return table


def verdict_line(verdict: Verdict) -> Text:
    """Return the overall verdict as one line."""
    from rich.text import Text

    return Text(f"\n{_SUMMARY[verdict.can]}\n({one_line(verdict.why)})")


def notify(text: str) -> None:
    """Print a line to stderr."""
    print(f"tdxtrace: {one_line(text, 2000)}", file=sys.stderr)


def summary(outcome: RecordingResult, output: Path) -> str:
    """Return what was recorded and lost as one line."""
    told = outcome.provenance
    lost = f"{told['lost_events']:,} lost" if told["lost_events"] else "none lost"
    return (
        f"{told['read_events']:,} events in {outcome.seconds:.1f} s, {lost}, "
        f"{outcome.n_bytes / 1e6:.1f} MB; wrote {output}"
    )
