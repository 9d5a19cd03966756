"""One call from words to files: what ``tdxtrace simulate`` does."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tdxtrace.errors import InputError, QueryError
from tdxtrace.simulate import engine, faults, output, scenario, tiles
from tdxtrace.simulate.engine import Run
from tdxtrace.simulate.observe import PROBES, Capture
from tdxtrace.simulate.scenario import Scenario
from tdxtrace.tables.files import refuse_overwriting, whole_file

_SCENARIO: Final = "scenario.toml"
_TIME: Final = re.compile(r"^(?P<n>\d+)(?P<unit>ms|s)$")


@dataclass(frozen=True, slots=True)
class Changes:
    """What is to differ from the scenario as it ships; None: nothing."""

    duration: str | None = None
    vcpus: int | None = None
    generation: str | None = None
    policy: str | None = None
    kernel: str | None = None


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to be recorded, and how it is to be written."""

    form: str = "tracefs"
    options: tuple[str, ...] = ()
    probes: str = "wrappers"
    arguments: bool = True
    faults: tuple[str, ...] = ()
    repeat: int = 1


@dataclass(frozen=True, slots=True)
class Target:
    """Where it goes: a file (None: standard output), and a folder for the truth."""

    trace: Path | None = None
    truth: Path | None = None
    force: bool = False


def listing() -> str:
    """Name every scenario, one a line, with what it is."""
    made = [scenario.named(name) for name in scenario.names()]
    width = max(len(s.name) for s in made)
    return "\n".join(f"{s.name:<{width}}  {s.title}" for s in made)


def description(name: str) -> str:
    """Say what a scenario is, and give it as TOML.

    Raises:
        QueryError: If there is none of that name.
    """
    made = _scenario(name)
    return f"{made.name}: {made.title}\n\n{made.description}\n\n{made.to_toml()}".rstrip()


def simulate(name: str | None, seed: int, changes: Changes, wanted: Wanted, target: Target) -> str:
    """Simulate a scenario and write its trace and its truth.

    Args:
        name: A scenario that ships, or a TOML file.
        seed: Chance.
        changes: What differs from the scenario.
        wanted: What is recorded and in which form.
        target: Where to write.

    Returns:
        One line that says what was made.

    Raises:
        QueryError: If a word names nothing, or the words do not go together.
        InputError: If something cannot be written, or would overwrite the scenario.
    """
    if name is None:
        raise QueryError("no scenario named; see tdxtrace simulate --list")
    chosen = _changed(_scenario(name), changes)
    form = output.form_of(wanted.form, wanted.options)
    capture = _capture(wanted)
    broken = tuple(faults.fault_of(text) for text in wanted.faults)
    if wanted.repeat > 1 and any(fault.kind == "truncated" for fault in broken):
        raise QueryError("--repeat and --fault truncated do not go together")
    if target.truth is not None and target.truth.exists() and not target.truth.is_dir():
        raise InputError(f"{target.truth} is a file; name a folder for the truth")
    inputs = [name] if Path(name).suffix == ".toml" else []
    if target.truth is not None:
        refuse_overwriting(target.truth / _SCENARIO, inputs)
    run = engine.run(chosen, seed)
    if wanted.repeat > 1:
        run = tiles.closed(run)
    recording = faults.record(run, capture, broken)
    if wanted.repeat > 1:
        chunks = tiles.tiles(recording, form, run.end_ns, wanted.repeat)
    else:
        chunks = iter([output.bytes_of(run, recording, form)])
    n_bytes = _write(chunks, target, inputs)
    if target.truth is not None:
        _write_truth(run, wanted, target, inputs)
    n_calls = len(run.journal.calls)
    return (
        f"{chosen.name}: {n_calls:,} SEAMCALLs in {chosen.duration_ms} ms, "
        f"seed {seed}, {n_bytes:,} bytes of {form.name}"
    )


def _scenario(name: str) -> Scenario:
    path = Path(name)
    if path.suffix != ".toml":
        return scenario.named(name)
    try:
        return scenario.load(path.read_text("utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {name}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise QueryError(f"{name} is no text") from None


def _changed(chosen: Scenario, changes: Changes) -> Scenario:
    duration_ms = None if changes.duration is None else milliseconds(changes.duration)
    return chosen.with_vcpus(changes.vcpus).with_(
        duration_ms=duration_ms,
        generation=changes.generation,
        policy=changes.policy,
        kernel=changes.kernel,
    )


def milliseconds(text: str) -> int:
    """Read a length of time such as ``2s`` or ``50ms``.

    Raises:
        QueryError: If it is none.

    Example:
        >>> milliseconds("2s")
        2000
    """
    found = _TIME.match(text)
    if found is None:
        raise QueryError(f"not a length of time: {text!r}; write e.g. 2s or 50ms")
    return int(found["n"]) * (1000 if found["unit"] == "s" else 1)


def _capture(wanted: Wanted) -> Capture:
    if wanted.probes not in PROBES:
        raise QueryError(f"no probes {wanted.probes!r}; there are: {', '.join(PROBES)}")
    if wanted.form == "graph" and wanted.probes != "wrappers":
        raise QueryError("function_graph sees wrappers only; leave --probes out")
    return Capture(wanted.probes, arguments=wanted.arguments)


def _write(chunks: Iterator[bytes], target: Target, inputs: list[str]) -> int:
    n_bytes = 0
    if target.trace is None:
        for chunk in chunks:
            sys.stdout.buffer.write(chunk)
            n_bytes += len(chunk)
        sys.stdout.buffer.flush()
        return n_bytes
    with whole_file(target.trace, force=target.force, inputs=inputs) as file:
        for chunk in chunks:
            file.write(chunk)
            n_bytes += len(chunk)
    return n_bytes


def _write_truth(run: Run, wanted: Wanted, target: Target, inputs: list[str]) -> None:
    """Write each truth table as CSV, and the scenario with its seed as TOML."""
    from tdxtrace.simulate import truth  # noqa: PLC0415 - polars is slow to load
    from tdxtrace.tables.truth import TRUTH_TABLES  # noqa: PLC0415

    assert target.truth is not None
    try:
        target.truth.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make {target.truth}: {error.strerror}") from None
    rows = truth.rows_of(run)
    files = {
        f"{table.name}.csv": truth.csv_of(table.schema.names(), rows[table.name])
        for table in TRUTH_TABLES
    }
    made = f"# seed = {run.seed}, repeat = {wanted.repeat}\n{run.scenario.to_toml()}"
    for name, text in {**files, _SCENARIO: made}.items():
        with whole_file(target.truth / name, force=target.force, inputs=inputs) as file:
            file.write(text.encode())
