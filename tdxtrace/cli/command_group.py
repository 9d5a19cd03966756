"""The commands, grouped by purpose; the module of each is imported on first use."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from importlib import import_module
from typing import Any, Final

import typer
import typer.main
from typer.core import TyperGroup
from typer.models import CommandInfo

from tdxtrace.cli.help import Command

# Commands by title of their group in the help: name, module of tdxtrace.cli, and one sentence.
_GROUPS: Final[dict[str, dict[str, tuple[str, str]]]] = {
    "Look at a recording": {
        "analyze": ("file_commands", "Is there a problem, what was retried, what was lost?"),
        "report": ("file_commands", "Write a page, a mail or JSON with all findings."),
        "retry-chains": ("table_commands", "List the requests that were retried."),
        "zero-steps": ("table_commands", "List refusals of entries by zero-step mitigation."),
        "counters": ("table_commands", "What kvm->stat would have counted over time."),
        "accept-rates": ("table_commands", "How fast TDs accept memory, and what limits it."),
        "boot-phases": ("table_commands", "Time of each TD by phase, from build to teardown."),
        "tdvmcalls": ("table_commands", "Calls of guests to their host, over time."),
        "events": ("table_commands", "List the events as they were read."),
        "watch": ("watch", "Show a running host, or text from a pipe."),
    },
    "Find the cause": {
        "verdicts": ("table_commands", "Whose fault: BUG, HOSTILE, UNDECIDED, EXPECTED."),
        "busy-causes": ("cause_commands", "Who made each SEAMCALL busy."),
        "explain": ("cause_commands", "What happened around one SEAMCALL."),
        "zero-step-causes": ("table_commands", "Why a vCPU repeated faults until it was refused."),
        "abandoned-requests": ("table_commands", "What happened to abandoned requests."),
        "progress-loops": ("table_commands", "Requests and faults repeated without a conflict."),
        "host-check": ("table_commands", "Which weaknesses the TDX module has, by a log."),
        "measurement-log": ("table_commands", "Which calls made each TD's MRTD."),
        "module-updates": ("table_commands", "Whether a module update stopped all CPUs."),
        "td-conflicts": ("table_commands", "Whether TDs made each other busy."),
        "decode": ("cause_commands", "Explain a status word."),
    },
    "Choose a limit": {
        "recommend": ("limit_commands", "Which retry limit the recording supports."),
        "attempts": ("limit_commands", "How many requests need more than N attempts."),
        "policies": ("limit_commands", "What each retry policy would have done."),
        "step-thresholds": ("table_commands", "What other zero-step thresholds would do."),
        "time-shares": ("table_commands", "Time of each TD's threads by activity."),
        "compare": ("file_commands", "Which differences two recordings support."),
    },
    "Ask for many hosts": {
        "fleet": ("fleet", "Count traces in parallel; limits, report and rollouts of all."),
    },
    "Ask in SQL or Python": {
        "query": ("table_commands", "Query any table with SQL."),
        "notebook": ("file_commands", "Write a Jupyter notebook that opens a trace."),
    },
    "Keep and share": {
        "convert": ("file_commands", "Keep what was read as Parquet, or cut a part out."),
        "export": ("file_commands", "Write a trace for ui.perfetto.dev."),
    },
    "Record": {
        "capture": ("capture", "Check a host, get the recipe, record, clean up."),
    },
    "Prove": {
        "simulate": ("simulate", "Write what a TDX host would have recorded."),
        "validate": ("simulate", "Score the answers against simulated truth."),
    },
}
_MODULES: Final = {
    name: module for group in _GROUPS.values() for name, (module, _) in group.items()
}
COMMANDS: Final = tuple(_MODULES)
"""Names of the commands, in the order of the help."""
# Commands that have subcommands.
_APPS: Final = ("capture", "fleet")
# Names of the same commands in perf and git.
ALIASES: Final = {"stat": "analyze", "diff": "compare", "script": "events"}
# Command for ``record``, as perf and trace-cmd call it.
_RECORD: Final = ("capture", "record")
# A negative status word begins with a minus, like an option.
_SETTINGS: Final = {"decode": {"ignore_unknown_options": True}}
# Option of perf and trace-cmd for the input.
_INPUT: Final = "-i"


class _Commands(MutableMapping[str, Any]):
    """Commands by name, each imported and built on first access."""

    def __init__(self) -> None:
        self._loaded: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:  # noqa: ANN401 - typer's click
        if name not in self._loaded:
            self._loaded[name] = _command(name, _MODULES[name])
        return self._loaded[name]

    def __setitem__(self, name: str, command: Any) -> None:  # noqa: ANN401
        self._loaded[name] = command

    def __delitem__(self, name: str) -> None:
        del self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(_MODULES)

    def __len__(self) -> int:
        return len(_MODULES)


def _command(name: str, module: str) -> Any:  # noqa: ANN401
    found = import_module(f"tdxtrace.cli.{module}")
    if name in _APPS:
        group = typer.main.get_group(found.app)
        group.name = name
        return group
    commands = getattr(found, "COMMANDS", {})
    attribute = f"{name.replace('-', '_')}_command"
    return typer.main.get_command_from_info(
        CommandInfo(
            name=name,
            cls=Command,
            callback=commands.get(name) or getattr(found, attribute),
            context_settings=_SETTINGS.get(name),
        ),
        pretty_exceptions_short=False,
        rich_markup_mode=None,
    )


class CommandGroup(TyperGroup):
    """The program, whose help lists commands grouped by purpose."""

    def __init__(self, **given: Any) -> None:  # noqa: ANN401
        super().__init__(**given)
        self.commands = _Commands()

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ANN401
        """Return a command by its name, or by its alias from perf or git."""
        return self.commands.get(ALIASES.get(cmd_name, cmd_name))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:  # noqa: ANN401
        """Return the command and its arguments; accepts perf's ``record`` and ``-i FILE``."""
        name, *words = _RECORD if args[0] == _RECORD[-1] else args[:1]
        words += args[1:]
        # The options of a command that is run by ``record`` are not changed.
        reads = (name in _MODULES or name in ALIASES) and name != _RECORD[0]
        return super().resolve_command(
            ctx, [name, *(word for word in words if not (reads and word == _INPUT))]
        )

    def format_commands(self, ctx: Any, formatter: Any) -> None:  # noqa: ANN401
        """Write each group of commands, with one sentence for each command."""
        width = max(map(len, _MODULES))
        for title, group in _GROUPS.items():
            with formatter.section(title):
                formatter.write_dl(
                    [(f"{name:<{width}}", sentence) for name, (_, sentence) in group.items()]
                )
