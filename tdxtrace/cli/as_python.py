"""``--python``: the calls of the library that do what a command does."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any, Final

from tdxtrace.cli.inputs import Request

_READING: Final = ("input_format", "mappings", "level_base", "formats", "dmesg")
# What a command prints where it is not the finding table of its own name; a word in braces
# is one of its options.
_ANSWERS: Final[Mapping[str, str]] = {
    "events": "trace.{table}",
    "query": "tdxtrace.query(trace, {statement!r})",
    "busy-causes": "findings.{about}",
    "explain": "surroundings(trace, findings, {seq})",
    "recommend": "findings.limits",
}
_IMPORTS: Final[Mapping[str, str]] = {
    "explain": "from tdxtrace.analysis.causes.surroundings import surroundings",
}
_ABOUT: Final = {"attempts": "busy_causes", "shares": "cause_shares", "rules": "broken_rules"}
_FILTERS: Final[Mapping[str, str]] = {
    "outcome": 'pl.col("outcome") == {value!r}',
    "cause": 'pl.col("rank") == 1, pl.col("cause") == {value!r}',
    "by": 'pl.col("by") == {value!r}',
    "unit": 'pl.col("unit") == {value!r}',
}


def library_calls(command: str, request: Request, given: Mapping[str, Any]) -> str:
    """Return Python that leaves in ``rows`` (or prints, or writes) what a command answers.

    Args:
        command: Its name.
        request: What it was asked, and of which traces.
        given: Its other options by name, groups among them.
    """
    words = {name: _plain(value) for name, value in given.items()}
    module = given.get("of")
    about = _ABOUT.get(str(words.get("about")), words.get("about"))
    if command in ("report", "export"):
        return _written(command, request, words)
    answer = _ANSWERS.get(command, "findings." + command.replace("-", "_"))
    if command == "analyze":
        answer = "findings"
    elif words.get("latencies"):
        answer = "findings.latencies"
    answer = answer.format(**words | {"about": about})
    filters = [
        text.format(value=words[name])
        for name, text in _FILTERS.items()
        if words.get(name) is not None and "latencies" not in answer
    ]
    lines = _opened(request, module, answer)
    for text in filters:
        answer += f".filter({text})"
    if filters:
        lines.insert(0, "import polars as pl")
    if command in _IMPORTS:
        lines.insert(1, _IMPORTS[command])
    name = "findings" if command == "analyze" else "rows"
    if answer != name:
        lines.append(f"{name} = {answer}")
    lines.append(f"print({name})")
    return "\n".join(lines)


def _opened(request: Request, module: object, answer: str) -> list[str]:
    """Read the traces, and analyse them if the answer is about findings."""
    given = [f"{name}={_literal(value)}" for name in _READING if (value := getattr(request, name))]
    traces = ", ".join([*map(repr, request.traces), *given])
    lines = ["import tdxtrace"]
    chosen = request.selection.to_dict()
    asks = "findings" in answer
    options = ["trace"]
    if chosen:
        words = ", ".join(f"{name}={value!r}" for name, value in chosen.items())
        lines.append("from tdxtrace.analysis.selection import Selection")
        lines += ["", f"selection = Selection({words})"]
        options.append("selection")
    for name in ("module", "generation"):
        value = getattr(module, name, None)
        if value is not None:
            options.append(f"{name}={value!r}")
    lines += [*([] if chosen else [""]), f"trace = tdxtrace.read_trace({traces})"]
    if asks:
        lines.append(f"findings = tdxtrace.analyze({', '.join(options)})")
    elif chosen and "query" not in answer:
        lines.append("trace = selection.of_trace(trace)")
    return lines


def _written(command: str, request: Request, words: Mapping[str, Any]) -> str:
    lines = _opened(request, None, "findings")
    if command == "export":
        lines.insert(1, "from tdxtrace.report.perfetto import write_perfetto")
        lines.append(f"with open({words['perfetto']!r}, 'wb') as file:")
        return "\n".join([*lines, "    write_perfetto(trace, findings, file)"])
    output = words.get("output")
    form = words.get("form") or (Path(output).suffix[1:] if output else "md")
    lines.insert(1, "from tdxtrace.report.written import report")
    lines.append(f"data = report(findings, {form!r})")
    lines.append(
        f"with open({output!r}, 'wb') as file:\n    file.write(data)"
        if output
        else "print(data.decode())"
    )
    return "\n".join(lines)


def _plain(value: object) -> object:
    """The value of an option as Python writes it."""
    if isinstance(value, Enum):
        return value.value
    return str(value) if isinstance(value, Path) else value


def _literal(value: object) -> str:
    return repr(str(value) if isinstance(value, Path) else value)
