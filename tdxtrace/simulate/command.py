"""The command ``tdxtrace simulate``: writes a trace and its truth."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tdxtrace.errors import InputError, QueryError
from tdxtrace.simulate import engine, scenario
from tdxtrace.simulate.engine import Run
from tdxtrace.simulate.record import faults, output
from tdxtrace.simulate.record.capture_probes import CAPTURES
from tdxtrace.simulate.record.probes import PROBES, Capture
from tdxtrace.simulate.scenario import Scenario
from tdxtrace.tables.files import atomic_file, atomic_folder, refuse_overwriting
from tdxtrace.tables.settings import read_settings
from tdxtrace.tables.times import parse_duration

_SCENARIO: Final = "scenario.toml"


@dataclass(frozen=True, slots=True)
class ScenarioChanges:
    """Changes to a scenario; None keeps its value."""

    duration: str | None = None
    vcpus: int | None = None
    generation: str | None = None
    policy: str | None = None
    kernel: str | None = None


@dataclass(frozen=True, slots=True)
class TraceOptions:
    """Probes and faults of the recording, and its format."""

    form: str = "tracefs"
    options: tuple[str, ...] = ()
    probes: str = "wrappers"
    arguments: bool = True
    faults: tuple[str, ...] = ()
    repeat: int = 1


@dataclass(frozen=True, slots=True)
class OutputPaths:
    """File for the trace (None: standard output), and folder for the truth (None: no truth)."""

    trace: Path | None = None
    truth: Path | None = None
    force: bool = False


def listing() -> str:
    """Return one line for every scenario: name and title."""
    scenarios = [scenario.named(name) for name in scenario.names()]
    width = max(len(s.name) for s in scenarios)
    return "\n".join(f"{s.name:<{width}}  {s.title}" for s in scenarios)


def description(name: str) -> str:
    """Return a scenario's title, description and TOML.

    Raises:
        QueryError: If the name is unknown.
    """
    found = _scenario(name)
    return f"{found.name}: {found.title}\n\n{found.description}\n\n{found.to_toml()}".rstrip()


def simulate(
    name: str | None,
    seed: int,
    changes: ScenarioChanges,
    options: TraceOptions,
    target: OutputPaths,
    print_message: Callable[[str], None] = lambda _: None,
) -> str:
    """Simulate a scenario and write its trace and its truth.

    Args:
        name: Name of a scenario of tdxtrace, or a TOML file.
        seed: Seed of the run.
        changes: Changes to the scenario.
        options: Probes, faults and format of the recording.
        target: The files to write.
        print_message: Called with the current step.

    Returns:
        A summary in one line.

    Raises:
        QueryError: If the value of an option is invalid, or options cannot be combined.
        InputError: If a file cannot be read or written, or would overwrite the scenario.
    """
    if name is None:
        raise QueryError("no scenario named; see tdxtrace simulate --list")
    chosen = _with_changes(_scenario(name), changes)
    form = output.parse_format(options.form, options.options)
    capture = _capture(options)
    capture_faults = tuple(faults.parse_fault(text) for text in options.faults)
    if options.repeat > 1 and any(fault.kind == "truncated" for fault in capture_faults):
        raise QueryError("--repeat and --fault truncated do not go together")
    if target.truth is not None and target.truth.exists() and not target.truth.is_dir():
        raise InputError(f"{target.truth} is a file; name a folder for the truth")
    inputs = [name] if Path(name).suffix == ".toml" else []
    if target.truth is not None:
        refuse_overwriting(target.truth / _SCENARIO, inputs)
    run = engine.run(
        chosen,
        seed,
        lambda now_ns: print_message(
            f"simulated {now_ns // 1_000_000:,} of {chosen.duration_ms:,} ms"
        ),
    )
    print_message(f"recording {len(run.journal.calls):,} SEAMCALLs")
    if options.repeat > 1:
        run = output.without_open_requests(run)
    recording = faults.record(run, capture, capture_faults)
    if options.repeat > 1:
        chunks = output.repeated(recording, form, run.end_ns, options.repeat)
    else:
        chunks = iter([output.render_bytes(run, recording, form)])
    n_bytes = _write(_reported(chunks, print_message), target, inputs)
    if target.truth is not None:
        _write_truth(run, options, target, inputs)
    n_calls = len(run.journal.calls)
    return (
        f"{chosen.name}: {n_calls:,} SEAMCALLs in {chosen.duration_ms} ms, "
        f"seed {seed}, {n_bytes:,} bytes of {form.name}"
    )


def _scenario(name: str) -> Scenario:
    path = Path(name)
    if path.suffix != ".toml":
        return scenario.named(name)
    return scenario.load(read_settings(path))


def _with_changes(chosen: Scenario, changes: ScenarioChanges) -> Scenario:
    duration_ms = None if changes.duration is None else milliseconds(changes.duration)
    return chosen.with_vcpus(changes.vcpus).with_(
        duration_ms=duration_ms,
        generation=changes.generation,
        policy=changes.policy,
        kernel=changes.kernel,
    )


def milliseconds(text: str) -> int:
    """Parse a duration such as ``2s``, ``0.2s`` or ``50ms``.

    Raises:
        QueryError: If it is not a duration, or not a whole number of ms.

    Example:
        >>> milliseconds("0.2s")
        200
    """
    whole, rest = divmod(parse_duration(text), 1_000_000)
    if rest:
        raise QueryError(f"the duration must be a whole number of ms, not {text!r}")
    return whole


def _capture(options: TraceOptions) -> Capture:
    if options.probes not in PROBES:
        raise QueryError(f"no probes {options.probes!r}; there are: {', '.join(PROBES)}")
    if options.form == "graph" and options.probes != "wrappers":
        raise QueryError("function_graph traces wrappers only; leave --probes out")
    if options.probes in CAPTURES and not options.arguments:
        raise QueryError(f"{options.probes} always fetches arguments; leave --no-arguments out")
    return Capture(options.probes, arguments=options.arguments)


def _reported(chunks: Iterator[bytes], print_message: Callable[[str], None]) -> Iterator[bytes]:
    n_bytes = 0
    for chunk in chunks:
        yield chunk
        n_bytes += len(chunk)
        print_message(f"wrote {n_bytes / 1e6:,.1f} MB")


def _write(chunks: Iterator[bytes], target: OutputPaths, inputs: list[str]) -> int:
    n_bytes = 0
    if target.trace is None:
        for chunk in chunks:
            sys.stdout.buffer.write(chunk)
            n_bytes += len(chunk)
        sys.stdout.buffer.flush()
        return n_bytes
    with atomic_file(target.trace, force=target.force, inputs=inputs) as file:
        for chunk in chunks:
            file.write(chunk)
            n_bytes += len(chunk)
    return n_bytes


def _write_truth(run: Run, options: TraceOptions, target: OutputPaths, inputs: list[str]) -> None:
    """Write each truth table as CSV, and the scenario with its seed as TOML."""
    from tdxtrace.simulate import truth  # noqa: PLC0415 - polars is slow to load
    from tdxtrace.tables.truth import TRUTH_TABLES  # noqa: PLC0415

    assert target.truth is not None
    rows = truth.rows_of(run)
    files = {
        f"{table.name}.csv": truth.csv_of(table.schema.names(), rows[table.name])
        for table in TRUTH_TABLES
    }
    toml = f"# seed = {run.seed}, repeat = {options.repeat}\n{run.scenario.to_toml()}"
    with atomic_folder(target.truth, force=target.force, inputs=inputs) as made:
        for name, text in {**files, _SCENARIO: toml}.items():
            (made / name).write_bytes(text.encode())
