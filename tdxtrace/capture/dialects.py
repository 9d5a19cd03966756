"""Recipes as scripts: shell for tracefs, trace-cmd and perf, or bpftrace."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Callable, Iterable, Mapping
from typing import Final

from tdxtrace.capture import bpftrace, histogram
from tdxtrace.capture.options import Dialect
from tdxtrace.capture.probes import Tracepoint
from tdxtrace.capture.recipe import Recipe

_MAPPED_MB: Final = 8


def render(recipe: Recipe, dialect: Dialect) -> str:
    """Render a recipe as a script.

    Args:
        recipe: Probes, events, clock and buffer.
        dialect: Tool to record with.

    Returns:
        A shell script whose arguments are the output file and a command to trace; for bpftrace a
        bpftrace script that prints a trace, for histogram one that prints counts.
    """
    return _RENDERERS[dialect](recipe)


def heading(recipe: Recipe) -> list[str]:
    """Return the comment lines at the top of every script."""
    lines = [f"tdxtrace capture plan: Linux {recipe.release or '?'}, level {recipe.options.detail}"]
    lines += [f"note: {text}" for text in recipe.notes]
    lines += [f"not answered: {text}" for text in recipe.cannot]
    return [
        f"# {line}"
        for text in lines
        for line in textwrap.wrap(text, 94, subsequent_indent="  ", break_long_words=False)
    ]


def _tracefs(recipe: Recipe) -> str:
    body = [
        *_prepare(recipe),
        'mkdir "$I"',
        f'echo {recipe.clock} >"$I/trace_clock"',
        f'echo {recipe.buffer_kb} >"$I/buffer_size_kb"',
        'echo 1 >"$I/options/record-tgid"',
        *(
            f'echo {shlex.quote(event.filter)} >"$I/events/{event.name}/filter"'
            for event in recipe.events
            if event.filter
        ),
        *(f'echo 1 >"$I/events/{name}/enable"' for name in _enabled(recipe)),
        'cat "$I/trace_pipe" >"${1:-trace.txt}" &',
        "reader=$!",
        "shift || true",
        'if [ $# -gt 0 ]; then "$@"; else sleep "${SECONDS_TO_TRACE:-10}"; fi',
        f'for e in {" ".join(_enabled(recipe))}; do echo 0 >"$I/events/$e/enable"; done',
        "sleep 1",
        'cat "$I"/per_cpu/cpu*/stats | grep -E "overrun|dropped" | sort | uniq -c >&2',
    ]
    return _script(recipe, body)


def _trace_cmd(recipe: Recipe) -> str:
    """Render for trace-cmd, without -d (needed under lockdown), which would disable ftrace.

    Kprobes on function entries depend on ftrace: Linux kernel/kprobes.c,
    CONFIG_KPROBES_ON_FTRACE.
    """
    words = ["trace-cmd record", "-B", recipe.options.group, "-C", recipe.clock]
    words += ["-b", str(recipe.buffer_kb)]
    body = [
        '# On a locked-down kernel this ends with "Can\'t enable ftrace"; there use:',
        "#   tdxtrace capture record -o trace.dat",
        *_prepare(recipe),
        "out=${1:-trace.dat}",
        "shift || true",
        "[ $# -gt 0 ] || set -- sleep 10",
        " \\\n    ".join(
            [" ".join([*words, "-O", "record-tgid"]), *_with_filters(recipe, "-e", "-f", ":")]
        )
        + ' \\\n    -o "$out" "$@"',
    ]
    return _script(recipe, body)


def _perf(recipe: Recipe) -> str:
    """Render for perf, with -k so that its clock matches other recordings."""
    body = [
        *_prepare(recipe),
        "out=${1:-perf.data}",
        "shift || true",
        "[ $# -gt 0 ] || set -- sleep 10",
        " \\\n    ".join(
            [
                f"perf record -a -k CLOCK_MONOTONIC -m {_MAPPED_MB}M",
                *_with_filters(recipe, "-e", "--filter", ":"),
            ]
        )
        + ' \\\n    -o "$out" -- "$@"',
    ]
    return _script(recipe, body)


def _prepare(recipe: Recipe) -> Iterable[str]:
    """Yield lines that add the probes to dynamic_events, and remove them at exit."""
    group = recipe.options.group
    yield "T=${TRACEFS:-/sys/kernel/tracing}"
    yield f"I=$T/instances/{group}"
    yield "reader= added="
    yield 'say() { echo "$1" >>"$T/dynamic_events"; }'
    yield 'add() { if say "$1"; then set -- $1 && added="$added ${1#*:}"; else'
    yield '    echo "not probed: $1" >&2; fi; }'
    yield "tidy() {"
    yield '    [ -z "$reader" ] || { kill "$reader" && wait "$reader"; } 2>/dev/null || true'
    yield '    [ ! -d "$I" ] || rmdir "$I" || true'
    yield '    for e in $added; do say "-:$e" || true; done'
    yield "}"
    yield "trap tidy EXIT"
    yield "trap 'exit 130' INT TERM"
    for probe in recipe.probes:
        yield f"add {shlex.quote(probe.line)}"


def _enabled(recipe: Recipe) -> list[str]:
    """Return the events to enable: the group of the probes, and the kernel's tracepoints."""
    groups = [recipe.options.group] if recipe.probes else []
    return groups + [event.name for event in recipe.events]


def _with_filters(recipe: Recipe, event: str, filter_: str, between: str) -> Iterable[str]:
    if recipe.probes:
        yield f"{event} '{recipe.options.group}{between}*'"
    for one in recipe.events:
        yield f"{event} {one.system}{between}{one.event}{_filter(one, filter_)}"


def _filter(event: Tracepoint, word: str) -> str:
    return f" {word} {shlex.quote(event.filter)}" if event.filter else ""


def _script(recipe: Recipe, body: Iterable[str]) -> str:
    lines = ["#!/bin/sh", *heading(recipe), "set -eu", *body]
    return "\n".join(lines) + "\n"


def _bpftrace(recipe: Recipe) -> str:
    return "\n".join(["#!/usr/bin/env bpftrace", *bpftrace.script(recipe, heading(recipe))]) + "\n"


def _histogram(recipe: Recipe) -> str:
    return histogram_script(recipe)


def histogram_script(recipe: Recipe, every_s: int = 60) -> str:
    """Return the bpftrace script that counts requests in the kernel.

    Args:
        recipe: Probes of the calls to count.
        every_s: Seconds between two prints of the counts.
    """
    return (
        "\n".join(["#!/usr/bin/env bpftrace", *histogram.script(recipe, heading(recipe), every_s)])
        + "\n"
    )


_RENDERERS: Final[Mapping[Dialect, Callable[[Recipe], str]]] = {
    Dialect.tracefs: _tracefs,
    Dialect.trace_cmd: _trace_cmd,
    Dialect.perf: _perf,
    Dialect.bpftrace: _bpftrace,
    Dialect.histogram: _histogram,
}
