"""``tdxtrace watch``: live view of the running host, or of text from a pipe."""

from __future__ import annotations

from typing import Annotated

import typer

from tdxtrace.capture.options import Detail, RecordOptions
from tdxtrace.cli import capture, options
from tdxtrace.cli.options import Color


def watch_command(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="[-]",
            help="- for text or a histogram from a pipe; default: this host.",
            show_default=False,
        ),
    ] = None,
    interval: Annotated[
        str, typer.Option("--interval", metavar="TIME", help="Time between updates.")
    ] = "1s",
    duration: Annotated[
        str | None, typer.Option("--duration", metavar="TIME", help="How long; else to Ctrl-C.")
    ] = None,
    fail_on: options.FailOn = [],  # noqa: B006 - never modified
    jsonl: Annotated[
        bool, typer.Option("--jsonl", help="One line of JSON per update, no table.")
    ] = False,
    metrics: Annotated[
        str | None,
        typer.Option("--metrics", metavar="HOST:PORT", help="For Prometheus; loopback only."),
    ] = None,
    mappings: options.Mappings = [],  # noqa: B006
    level: capture.Level = Detail.full,
    seamcalls: capture.Seamcalls = False,
    only_tds: capture.OnlyTds = False,
    rate: capture.Rate = None,
    buffer: capture.Buffer = None,
    pids: capture.Pids = [],  # noqa: B006
    program: capture.Program = None,
    tracefs: capture.Tracefs = None,
    color: options.Coloring = Color.auto,
    no_color: options.NoColor = False,
) -> None:
    """Watch rates, retry chains, zero-step mitigation and busy causes as they happen.

    Memory use is constant. Without -, needs root and traces as capture record does.
    For perf: perf record -m 8M -o - ... | perf script --show-lost-events -i - | tdxtrace watch -

    Example: ssh HOST sudo cat /sys/kernel/tracing/trace_pipe | tdxtrace watch -
    """
    from tdxtrace.capture.choose import seconds_of
    from tdxtrace.cli.watching import WatchOptions, watch_host, watch_pipe
    from tdxtrace.errors import QueryError

    if source not in (None, "-"):
        raise QueryError("watch takes - for standard input, or nothing for this host")
    watch = WatchOptions.of(
        seconds_of(interval),
        None if duration is None else seconds_of(duration),
        fail_on,
        metrics,
        "json" if jsonl else "table",
        options.chosen_color(color, no_color),
    )
    if source == "-":
        status = watch_pipe(watch, mappings)
    else:
        recording = RecordOptions(
            *(level.value, seamcalls, only_tds, rate, program), buffer=buffer, pids=pids
        )
        status = watch_host(watch, recording, tracefs)
    raise typer.Exit(status)
