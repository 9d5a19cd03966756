"""Entry point: the commands, error handling and exit status."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Annotated, Final

import typer

from tdxtrace import __version__
from tdxtrace.cli.command_group import COMMANDS, CommandGroup
from tdxtrace.cli.config import defaults, here
from tdxtrace.cli.help import READING_HELP, print_reading_help
from tdxtrace.cli.standard_output import abandon_output, whole_output
from tdxtrace.errors import TdxtraceError

EXIT_INPUT = 1
EXIT_WORDS = 2
EXIT_THRESHOLD = 3
# Exit status of a program that was ended by a signal is 128 + its number, as in shells.
_SIGNALLED: Final = 128
# Number of allocations between runs of the garbage collector: imports and small traces make almost
# no cycles, and 230 runs took a tenth of the time of `analyze`.
_GC_OBJECTS: Final = 200_000

app = typer.Typer(
    cls=CommandGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit status: 0 done, 1 bad input, 2 bad usage, 3 a rule of --fail-on matches.  "
    "Defaults: tdxtrace.toml, or [tool.tdxtrace] in pyproject.toml: target, confidence, module, "
    "fail-on and the like.",
)


def _version(is_set: bool) -> None:
    if is_set:
        typer.echo(f"tdxtrace {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", "-V", callback=_version, is_eager=True, help="Print the version."
        ),
    ] = False,
    help_reading: Annotated[
        bool,
        typer.Option(
            READING_HELP,
            callback=print_reading_help,
            is_eager=True,
            help="Input options of all commands.",
        ),
    ] = False,
) -> None:
    """Find out how often TDX SEAMCALLs are retried, and whose fault it is.

    Start with: tdxtrace analyze log TRACE
    """


# Error of the dynamic loader if the address space is exhausted: glibc elf/dl-map-segments.h.
_UNMAPPED: Final = "failed to map segment"


def _no_memory() -> str:
    from tdxtrace.tables.memory import format_size, free_bytes

    return (
        f"not enough memory: {format_size(free_bytes())} are left (ulimit -v and -d, control "
        "groups); raise the limit, or cut a part out: tdxtrace convert TRACE -o part --until +10"
    )


# Repeated signals are ignored for this time while files are removed: timeout(1) sends SIGTERM to
# the process and again to its group.
_CLEANING_SECONDS: Final = 5.0


def _end_on_signals() -> None:
    """Handle SIGTERM and SIGHUP by SystemExit, so that temporary files are removed.

    An ignored SIGHUP, as with nohup(1), stays ignored.
    """
    ended_at = float("inf")

    def end(number: int, _frame: FrameType | None) -> None:
        nonlocal ended_at
        if ended_at == float("inf"):
            ended_at = time.monotonic()
            abandon_output()
            raise SystemExit(_SIGNALLED + number)
        if time.monotonic() - ended_at > _CLEANING_SECONDS:
            os._exit(_SIGNALLED + number)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, end)


def main() -> None:
    """Run the command line.

    Exit status: 0 success, 1 bad input, 2 bad usage, 3 a threshold given by the user was
    exceeded, 128 and the number of a signal.
    """
    _end_on_signals()
    gc.set_threshold(_GC_OBJECTS)
    try:
        with whole_output():
            app(prog_name="tdxtrace", default_map=defaults(here(), COMMANDS))
    except TdxtraceError as error:
        from tdxtrace.errors import QueryError

        abandon_output()
        print(f"tdxtrace: {error}", file=sys.stderr)
        raise SystemExit(EXIT_WORDS if isinstance(error, QueryError) else EXIT_INPUT) from None
    except (MemoryError, ImportError) as error:
        if not isinstance(error, MemoryError) and _UNMAPPED not in str(error):
            raise
        print(f"tdxtrace: {_no_memory()}", file=sys.stderr)
        raise SystemExit(EXIT_INPUT) from None
    except BrokenPipeError:
        # The reader (head, less) closed the pipe: print no error, not even at exit.
        abandon_output()
        raise SystemExit(EXIT_INPUT) from None
    finally:
        # Skip the garbage collection of all modules at exit.
        gc.freeze()
