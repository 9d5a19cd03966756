"""``tdxtrace-record``: the commands of ``tdxtrace capture``, using only the standard library.

It runs on hosts on which the packages for analyses are not installed.  ``python -m
tdxtrace.capture.archive`` packs it into one file.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tdxtrace import __version__
from tdxtrace.capture.choose import (
    kernel_to_trace,
    plan_recording,
    recipe_options,
    writable_tracefs,
)
from tdxtrace.capture.dialects import render
from tdxtrace.capture.doctor import examine
from tdxtrace.capture.host import Host
from tdxtrace.capture.instance import clean
from tdxtrace.capture.options import (
    CLEAN,
    DOCTOR,
    HELP,
    PLAN,
    RECORD,
    Detail,
    Dialect,
    RecordOptions,
)
from tdxtrace.capture.recipe import recipe
from tdxtrace.capture.recorder import record
from tdxtrace.errors import InputError, QueryError, TdxtraceError
from tdxtrace.tables.text import one_line

Words = argparse.Namespace


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line, with the same options as ``tdxtrace capture``."""
    program = argparse.ArgumentParser(
        prog="tdxtrace-record",
        description="Record the SEAMCALLs of a TDX host; answers: tdxtrace analyze, elsewhere.",
        epilog="Exit status: 0 done, 1 bad input, 2 bad usage.",
        allow_abbrev=False,
    )
    program.add_argument("-V", "--version", action="version", version=f"tdxtrace {__version__}")
    commands = program.add_subparsers(required=True, metavar="COMMAND")
    doctor = _command(commands, "doctor", DOCTOR, _doctor)
    doctor.add_argument("--json", action="store_true", help=HELP["json"])
    plan = _command(commands, "plan", PLAN, _plan)
    plan.add_argument("--kernel", metavar="X.Y", help=HELP["kernel"])
    plan.add_argument("--from-kallsyms", metavar="FILE", type=Path, help=HELP["kallsyms"])
    plan.add_argument(
        "--btf", metavar="FILE", type=Path, action="append", default=[], help=HELP["btf"]
    )
    dialects = [str(dialect) for dialect in Dialect]
    plan.add_argument("--dialect", choices=dialects, default="tracefs", help=HELP["dialect"])
    recording = _command(commands, "record", RECORD, _record)
    recording.add_argument("command", nargs="*", metavar="COMMAND", help=HELP["command"])
    recording.add_argument(
        *("-o", "--output"), metavar="FILE", type=Path, default="trace.dat", help=HELP["output"]
    )
    recording.add_argument("--duration", metavar="TIME", help=HELP["duration"])
    recording.add_argument("--buffer", metavar="SIZE", help=HELP["buffer"])
    recording.add_argument(
        "--pid", metavar="N", type=int, action="append", default=[], help=HELP["pid"]
    )
    recording.add_argument("--force", action="store_true", help=HELP["force"])
    recording.add_argument("-q", "--quiet", action="store_true", help=HELP["quiet"])
    for command in (plan, recording):
        _add_recipe(command)
    _command(commands, "clean", CLEAN, _clean)
    return program


def _command(commands, name: str, sentence: str, run) -> argparse.ArgumentParser:  # type: ignore[no-untyped-def]  # noqa: ANN001
    subparser: argparse.ArgumentParser = commands.add_parser(
        name, help=sentence, description=sentence, allow_abbrev=False
    )
    subparser.add_argument("--tracefs", metavar="DIR", type=Path, help=HELP["tracefs"])
    subparser.set_defaults(run=run)
    return subparser


def _add_recipe(command: argparse.ArgumentParser) -> None:
    levels = [str(level) for level in Detail]
    command.add_argument("--level", choices=levels, default="full", help=HELP["level"])
    command.add_argument("--seamcalls", action="store_true", help=HELP["seamcalls"])
    command.add_argument("--only-tds", action="store_true", help=HELP["only_tds"])
    command.add_argument("--rate", metavar="N", type=_positive, help=HELP["rate"])
    command.add_argument("--program", metavar="FILE", type=Path, help=HELP["program"])


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def _doctor(words: Words) -> None:
    verdict = examine(Host(tracefs_at=words.tracefs))
    if words.json:
        print(json.dumps(verdict.to_dict(), indent=2))
        return
    width = max(len(check.name) for check in verdict.checks)
    for check in verdict.checks:
        name = check.name.replace("_", " ")
        print(f"{name:<{width}} {check.state:<8} {one_line(check.found, 400)}")
        if check.state != "ok":
            for label, text in (("impact", check.lost), ("fix", check.remedy)):
                if text:
                    print(f"{'':<{width}} {'':<8} {label}: {one_line(text, 400)}")
    print(f"\n{verdict.sentence}\n({one_line(verdict.why, 400)})")


def _plan(words: Words) -> None:
    host = Host(tracefs_at=words.tracefs)
    kernel = kernel_to_trace(host, words.kernel, words.from_kallsyms, words.btf, words.program)
    chosen = recipe_options(words.level, words.seamcalls, words.only_tds, words.rate)
    sys.stdout.write(render(recipe(kernel, chosen), Dialect(words.dialect)))


def _record(words: Words) -> None:
    host = Host(tracefs_at=words.tracefs)
    options = RecordOptions(
        *(words.level, words.seamcalls, words.only_tds, words.rate, words.program),
        output=words.output,
        buffer=words.buffer,
        duration=words.duration,
        command=words.command,
        pids=words.pid,
        force=words.force,
    )
    plan = plan_recording(host, options, _print_message)
    if sys.stderr.isatty() and not (words.quiet or words.command):
        plan = replace(plan, report=_show_progress)
    outcome = record(host, plan)
    if not words.quiet:
        _print_message(outcome.summary(words.output))


def _clean(words: Words) -> None:
    done = clean(writable_tracefs(Host(tracefs_at=words.tracefs)))
    for name in done.removed:
        print(f"removed {name}")
    if done.kept:
        raise InputError(f"not removed: {', '.join(done.kept)}")
    if not done.removed:
        print("nothing to clean")


# Return to the start of the line, and erase it: ECMA-48, EL.
_ERASE = "\r\x1b[K"


def _show_progress(n_recorded: int, n_lost: int) -> None:
    text = f"recording: {n_recorded:,} events, {n_lost:,} lost; Ctrl-C ends it"
    print(f"{_ERASE}{text}", end="", file=sys.stderr, flush=True)


def _print_message(text: str) -> None:
    erase = _ERASE if sys.stderr.isatty() else ""
    print(f"{erase}tdxtrace: {one_line(text, 2000)}", file=sys.stderr)


def main(given: Sequence[str] | None = None) -> None:
    """Run the command line; exit with status 0, 1 (bad input) or 2 (bad usage)."""
    words = parser().parse_args(given)
    try:
        words.run(words)
        sys.stdout.flush()
    except TdxtraceError as error:
        _print_message(str(error))
        raise SystemExit(2 if isinstance(error, QueryError) else 1) from None
    except OSError as error:
        # An error of standard output: other read and write errors are TdxtraceErrors.
        _print_message(f"cannot write standard output: {error.strerror}")
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
