"""``--python``: equivalent Python code for a command."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Final

from tdxtrace.cli.options import ABOUT_TABLES
from tdxtrace.cli.query_options import QueryOptions

_READING: Final = ("input_format", "mappings", "level_base", "formats", "dmesg")


@dataclass(slots=True)
class _Script:
    """Python script under construction."""

    words: Mapping[str, Any]
    """Values of the options by name, as plain Python objects."""
    imports: list[str] = field(default_factory=lambda: ["import tdxtrace"])
    lines: list[str] = field(default_factory=list)

    def use(self, module: str, *names: str) -> None:
        """Import names from a module."""
        self.imports.append(f"from {module} import {', '.join(names)}")

    def show(self, answer: str, name: str = "rows") -> None:
        """Assign an expression to a name and print it."""
        if answer != name:
            self.lines.append(f"{name} = {answer}")
        self.lines.append(f"print({name})")

    def text(self) -> str:
        """Text of the script: standard-library imports, other imports, code."""
        own = [line for line in self.imports if "tdxtrace" in line]
        others = [line for line in self.imports if "tdxtrace" not in line]
        parts = [others, own, self.lines]
        return "\n\n".join("\n".join(part) for part in parts if part)


def library_calls(command: str, query: QueryOptions, given: Mapping[str, Any]) -> str:
    """Return Python code that assigns the result of a command to ``rows``, or prints or writes it.

    The result is not formatted: ``rows`` has the rows and columns of --format parquet.

    Args:
        command: Name of the command.
        query: Its query options.
        given: Its other options by name, option groups included.

    Raises:
        QueryError: If options contradict each other.
    """
    script = _Script({name: _plain(value) for name, value in given.items()})
    _open(script, query)
    if command not in ("events", "query"):
        _analyze(script, query, given.get("of"))
    if command in _WRITERS:
        _WRITERS[command](script)
    else:
        script.show("findings." + command.replace("-", "_"))
    return script.text()


def _open(script: _Script, query: QueryOptions) -> None:
    """Add the call of ``read_trace``."""
    values = {name: getattr(query, name) for name in _READING}
    given = [f"{n}={_literal(value)}" for n, value in values.items() if value not in (None, [])]
    # analyze accepts the word ``log`` before the traces.
    names = query.traces[1:] if _is_log(script, query) else query.traces
    chosen = query.selection.to_dict()
    if chosen:
        words = ", ".join(f"{name}={value!r}" for name, value in chosen.items())
        script.lines += [f"selection = tdxtrace.Selection({words})"]
    script.lines.append(f"trace = tdxtrace.read_trace({', '.join([*map(repr, names), *given])})")
    script.words = {**script.words, "chosen": ["selection"] if chosen else []}


def _is_log(script: _Script, query: QueryOptions) -> bool:
    is_analyze = "as_json" in script.words
    return is_analyze and query.traces[0] == "log" and len(query.traces) > 1


def _analyze(script: _Script, query: QueryOptions, module: object) -> None:
    """Add the call of ``analyze``."""
    options = ["trace", *script.words["chosen"]]
    for name in ("module", "generation"):
        value = getattr(module, name, None)
        if value is not None:
            options.append(f"{name}={value!r}")
    script.lines.append(f"findings = tdxtrace.analyze({', '.join(options)})")


def _events(script: _Script) -> None:
    table = f"trace.{script.words['table']}"
    script.show(f"selection.filter({table}, trace)" if script.words["chosen"] else table)


def _query(script: _Script) -> None:
    options = ["trace", repr(script.words["statement"]), *script.words["chosen"]]
    script.show(f"tdxtrace.query({', '.join(options)})")


def _filter_rows(script: _Script, table: str, *names: str) -> None:
    """Show a table, filtered by the options ``names`` that were given."""
    asked = [f'pl.col("{n}") == {script.words[n]!r}' for n in names if script.words.get(n)]
    if asked:
        script.imports.insert(0, "import polars as pl")
    script.show(f"findings.{table}" + (f".filter({', '.join(asked)})" if asked else ""))


def _attempts(script: _Script) -> None:
    if script.words["latencies"]:
        script.show("findings.latencies")
    else:
        _filter_rows(script, "attempts", "by", "unit")


def _busy_causes(script: _Script) -> None:
    table = ABOUT_TABLES[script.words["about"]]
    cause = script.words["cause"]
    if table != "busy_causes" or cause is None:
        script.show(f"findings.{table}")
        return
    script.imports.insert(0, "import polars as pl")
    is_answer = f'pl.col("rank") == 1, pl.col("cause") == {cause!r}'
    script.lines.append(f"answered = findings.busy_causes.filter({is_answer})")
    join = 'answered, on=["source", "seq"], how="semi", maintain_order="left"'
    script.show(f"findings.busy_causes.join({join})")


def _explain(script: _Script) -> None:
    words = script.words
    script.use("tdxtrace.analysis.causes.surroundings", "surroundings")
    script.use("tdxtrace.report.attempt_text", "attempt_text")
    options = f"source={words['source']}, whole_chain={words['chain']}"
    script.show(f"surroundings(trace, findings, {words['seq']}, {options})", "around")
    script.lines[-1] = "print(attempt_text(around))"


def _policies(script: _Script) -> None:
    words = script.words
    script.use("tdxtrace.recommend.policy_definitions", "DEFAULTS")
    names, own = "DEFAULTS", ""
    if words["file"] is not None:
        script.imports.insert(0, "from pathlib import Path")
        script.use("tdxtrace.recommend.policy_file", "read_policies")
        script.lines.append(f"own = read_policies(Path({words['file']!r}))")
        names, own = "[*DEFAULTS, *own]", ", own"
    if words["policy"]:
        names = repr(list(dict.fromkeys(words["policy"])))
        script.imports = [line for line in script.imports if "DEFAULTS" not in line]
    script.lines.append(f"chosen = [tdxtrace.policy_named(name{own}) for name in {names}]")
    script.show("tdxtrace.policies(findings.retry_chains, findings.busy_answers, chosen)")


def _recommend(script: _Script) -> None:
    from tdxtrace.recommend.target import parse_target

    names = ("target", "confidence", "at_most")
    given = {name: script.words[name] for name in names if script.words[name] is not None}
    parse_target(**given)
    chains = "findings.retry_chains"
    if not {"target", "at_most"} & set(given):
        script.use("tdxtrace.recommend.statements", "limit_statements")
        confidence = script.words["confidence"]
        script.show(f"limit_statements(findings.attempts, {chains}, confidence={confidence!r})")
        return
    script.use("tdxtrace.recommend.limits", "observed_seconds")
    script.lines.append(
        f"target = tdxtrace.parse_target({', '.join(f'{n}={v!r}' for n, v in given.items())})"
    )
    script.lines.append("seconds = observed_seconds(findings.provenance)")
    pace = ""
    if script.words["pace"] is not None:
        script.use("tdxtrace.tables.times", "parse_duration")
        pace = f", pace_ns=parse_duration({script.words['pace']!r})"
    script.show(
        f"tdxtrace.limits(findings.attempts, {chains}, findings.losses, seconds, target{pace})"
    )


def _export(script: _Script) -> None:
    script.use("tdxtrace.report.perfetto", "write_perfetto")
    if script.words["chosen"]:
        script.lines.append("trace = selection.filter_trace(trace)")
    script.lines.append(f"with open({script.words['perfetto']!r}, 'wb') as file:")
    script.lines.append("    write_perfetto(trace, findings, file)")


def _report(script: _Script) -> None:
    from tdxtrace.cli.options import format_of

    output = script.words["output"]
    form = script.words["form"] or format_of(None if output is None else Path(output)).value
    form = "brief" if script.words["brief"] else form
    script.use("tdxtrace.report.render", "report")
    script.lines.append(f"data = report(findings, {form!r})")
    for kind in ("png", "svg"):
        if script.words[kind] is not None:
            folder = f"Path({script.words[kind]!r})"
            script.imports += ["from pathlib import Path"]
            script.use("tdxtrace.report.render", "save_charts")
            force = script.words["force"]
            script.lines.append(f"save_charts(findings, {folder}, {kind!r}, force={force})")
    script.imports = list(dict.fromkeys(script.imports))
    if output is None:
        script.lines.append("print(data.decode(), end='')")
    else:
        script.lines += [f"with open({output!r}, 'wb') as file:", "    file.write(data)"]


_WRITERS: Final[Mapping[str, Callable[[_Script], None]]] = {
    "host-check": lambda script: script.show("findings.host_checks"),
    "analyze": lambda script: script.show("findings", "findings"),
    "attempts": _attempts,
    "busy-causes": _busy_causes,
    "events": _events,
    "explain": _explain,
    "export": _export,
    "policies": _policies,
    "query": _query,
    "recommend": _recommend,
    "report": _report,
    "retry-chains": lambda script: _filter_rows(script, "retry_chains", "outcome"),
}


def _plain(value: object) -> object:
    """Value of an option as a plain Python object."""
    if isinstance(value, Enum):
        return value.value
    return str(value) if isinstance(value, Path) else value


def _literal(value: object) -> str:
    if isinstance(value, list):
        return repr([_plain(one) for one in value])
    return repr(_plain(value))
