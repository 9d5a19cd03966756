"""Compute the facts of traces: one task per trace, on the workers of an engine.

The output of a task is named by the content of its trace, so that tasks are idempotent. The driver
has no state: traces whose facts exist when it starts are skipped.
"""

from __future__ import annotations

import json
import re
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

from tdxtrace.errors import QueryError, TdxtraceError
from tdxtrace.fleet.engine import Engine, Run
from tdxtrace.fleet.storage import Storage, TraceInput, content_hash, local_copy, open_storage
from tdxtrace.tables.text import one_line

if TYPE_CHECKING:
    from tdxtrace.fleet.facts import Identity, Part

# Maximum number of tries of a trace whose worker dies. A choice.
MAX_TRIES: Final = 3
FAILURES: Final = "failures"
_FIELDS: Final = ("host", "date", "kernel", "module")
_FIELD: Final = re.compile(r"\{([a-z]*)\}|(\*)")
_MAX_REASON_LENGTH: Final = 200


@dataclass(frozen=True, slots=True)
class MapOptions:
    """Options for counting traces."""

    identify: str | None = None
    """End of a trace's path, such as ``{host}/{date}.dat``; None: each file is a host."""
    key: bytes = b""
    """Key for hashing names of hosts and paths; empty: hosts keep their names."""
    memory: int | None = None
    """Memory limit of each task in bytes; None: its share of the free memory."""
    module: str | None = None
    """Release of the TDX module, if no log and no path names it."""
    big_bytes: int | None = None
    """Minimum size of traces that need workers with the resource ``big``."""


@dataclass(frozen=True, slots=True)
class MapTask:
    """One trace to count, with all that a worker needs."""

    url: str
    origin: str
    to: str
    host: str
    named: tuple[tuple[str, str], ...]
    """date, kernel and module, if the path or the user names them."""
    memory: int | None
    is_big: bool = False


@dataclass(slots=True)
class MapSummary:
    """Summary of a run: traces counted, counted before and failed."""

    n_traces: int
    n_done: int = 0
    n_there: int = 0
    n_failed: int = 0
    seconds: float = 0.0
    failures: list[tuple[str, str]] = field(default_factory=list)
    """URL and reason of each failure."""

    @property
    def n_finished(self) -> int:
        """Number of traces that need no further work."""
        return self.n_done + self.n_there + self.n_failed


Report = Callable[[MapSummary], None]


def _quiet(_: MapSummary) -> None:
    """Report nothing."""


def map_traces(
    inputs: Sequence[TraceInput],
    storage: Storage,
    engine: Engine,
    options: MapOptions | None = None,
    report: Report = _quiet,
    run: Run | None = None,
) -> MapSummary:
    """Compute and store the facts of traces; traces whose facts exist are not read again.

    Args:
        inputs: The traces.
        storage: Output; every worker must reach it by the same URL.
        engine: Runs the tasks.
        options: Identification of hosts, memory limits and further options.
        report: Called at the start and after each trace.
        run: Function that runs a task; tests replace it.

    Returns:
        Numbers of traces counted, counted before, and failed.

    Raises:
        QueryError: If ``identify`` cannot be parsed.
        InputError: If the storage cannot be read or written.
    """
    given = options or MapOptions()
    begin = time.monotonic()
    summary = MapSummary(len(inputs))
    there = _origins_there(storage)
    tasks = deque(task for task in _tasks(inputs, storage, given) if task.origin not in there)
    summary.n_there = len(inputs) - len(tasks)
    tries: dict[str, int] = {}
    report(summary)

    def submit_next() -> None:
        if tasks:
            task = tasks.popleft()
            engine.submit(run or map_one, task, is_big=task.is_big)

    for _ in range(engine.n_workers):
        submit_next()
    for task, result in engine.as_completed():
        tries[task.origin] = n_tries = tries.get(task.origin, 0) + 1
        if result is None and n_tries < MAX_TRIES:
            tasks.append(task)
        else:
            words = result or {"failed": f"its worker died {n_tries} times (memory?)"}
            _record_result(task, words, storage, summary, n_tries)
            del tries[task.origin]
        summary.seconds = time.monotonic() - begin
        report(summary)
        submit_next()
    return summary


def _record_result(
    task: MapTask, result: Mapping[str, str], storage: Storage, summary: MapSummary, n_tries: int
) -> None:
    """Add a result to the summary, and write or remove the file of its failure."""
    failure = f"{_root()}/{FAILURES}/{task.origin}.json"
    if "failed" not in result:
        summary.n_done += result["status"] == "done"
        summary.n_there += result["status"] == "there"
        storage.remove(failure)
        return
    summary.n_failed += 1
    summary.failures.append((task.url, result["failed"]))
    row = {"origin": task.origin, "trace": task.url, "reason": result["failed"], "n_tries": n_tries}
    storage.write(failure, f"{json.dumps(row, sort_keys=True)}\n".encode())


def _tasks(
    inputs: Sequence[TraceInput], storage: Storage, options: MapOptions
) -> Iterator[MapTask]:
    patterns = _patterns(options.identify)
    for given in inputs:
        named = _named(given.url, patterns)
        host = named.pop("host", None) or Path(given.url).name.split(".")[0] or "unknown"
        if options.key:
            host = blake2b(host.encode(), digest_size=8, key=options.key).hexdigest()
        if options.module is not None:
            named.setdefault("module", options.module)
        yield MapTask(
            given.url,
            given.origin(options.key),
            storage.url,
            host,
            tuple(sorted(named.items())),
            options.memory,
            options.big_bytes is not None and given.n_bytes >= options.big_bytes,
        )


def _patterns(identify: str | None) -> list[re.Pattern[str]]:
    """Compile ``identify`` into one pattern for each of the last components of a path.

    Raises:
        QueryError: If a field is unknown.
    """
    patterns = []
    for part in (identify or "").split("/") if identify else []:
        words, at = "", 0
        for found in _FIELD.finditer(part):
            if found[1] is not None and found[1] not in _FIELDS:
                raise QueryError(
                    f"--identify: no field '{one_line(found[1], 20)}'; use "
                    + ", ".join(f"{{{name}}}" for name in _FIELDS)
                )
            words += re.escape(part[at : found.start()])
            words += f"(?P<{found[1]}>.+?)" if found[1] is not None else ".*?"
            at = found.end()
        words += re.escape(part[at:])
        patterns.append(re.compile(words))
    return patterns


def _named(url: str, patterns: list[re.Pattern[str]]) -> dict[str, str]:
    """Return the fields in the URL of a trace.

    Raises:
        QueryError: If the URL does not match the patterns.
    """
    parts = url.split("/")[-len(patterns) :] if patterns else []
    named: dict[str, str] = {}
    for part, pattern in zip(parts, patterns, strict=False):
        found = pattern.fullmatch(part)
        if found is None:
            raise QueryError(f"--identify: {one_line(url)} does not have this form")
        named |= found.groupdict()
    return named


def _root() -> str:
    from tdxtrace.fleet.facts import FORMAT  # noqa: PLC0415 - after use_one_thread() of workers

    return f"format={FORMAT}"


def _origins_there(storage: Storage) -> set[str]:
    """Return the origins of the traces whose facts are complete."""
    from tdxtrace.fleet.facts import PROVENANCE  # noqa: PLC0415

    marks = [name for name in storage.names(PROVENANCE) if name.startswith(f"{_root()}/")]
    return {str(json.loads(mark)["origin"]) for mark in storage.read(marks)}


def map_one(task: MapTask) -> dict[str, str]:
    """Compute the facts of one trace and write its part; runs in a worker.

    Returns:
        ``status``: ``done``, or ``there`` if the part exists; or ``failed``: the reason.
    """
    try:
        with local_copy(task.url) as path:
            return _count(task, path)
    except TdxtraceError as error:
        reason = str(error)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
    return {"failed": one_line(reason, _MAX_REASON_LENGTH)}


def _count(task: MapTask, path: Path) -> dict[str, str]:
    from tdxtrace.ingest.histogram import is_histogram  # noqa: PLC0415 - after use_one_thread()

    return (_count_histogram if is_histogram(path) else _count_recording)(task, path)


def _count_recording(task: MapTask, path: Path) -> dict[str, str]:
    from tdxtrace.analysis.causes.generation import module_release  # noqa: PLC0415
    from tdxtrace.fleet import facts  # noqa: PLC0415
    from tdxtrace.ingest.read import ReadOptions, read  # noqa: PLC0415
    from tdxtrace.pipeline import analyze  # noqa: PLC0415
    from tdxtrace.tdx.releases import generation_of  # noqa: PLC0415

    part = content_hash(path)
    trace = read([path], ReadOptions(memory=task.memory))
    release = module_release(trace.kernel_messages)
    kernel = trace.provenance.sources[0].kernel
    identity = _identity(task, kernel, release[0] if release else None)
    if _is_there(task, identity, part):
        return {"status": "there"}
    module = identity.module if generation_of(identity.module) is not None else None
    findings = analyze(trace, memory=task.memory, module=module)
    return _write(task, facts.part_of(trace, findings, identity, part=part, origin=task.origin))


def _count_histogram(task: MapTask, path: Path) -> dict[str, str]:
    from tdxtrace.fleet import facts  # noqa: PLC0415
    from tdxtrace.ingest.histogram import read_histogram  # noqa: PLC0415

    part, found = content_hash(path), read_histogram(path)
    identity = _identity(task, found.kernel, None)
    if _is_there(task, identity, part):
        return {"status": "there"}
    n_bytes = path.stat().st_size
    named = {"part": part, "origin": task.origin}
    return _write(task, facts.part_of_histogram(found, n_bytes, identity, **named))


def _identity(task: MapTask, kernel: str | None, module: str | None) -> Identity:
    """Return the identity of an input: what its path or the user names is used first."""
    from tdxtrace.fleet.facts import UNKNOWN, Identity  # noqa: PLC0415

    named = {"kernel": kernel or UNKNOWN, "module": module or UNKNOWN} | dict(task.named)
    return Identity(host=task.host, **named)


def _is_there(task: MapTask, identity: Identity, part: str) -> bool:
    from tdxtrace.fleet.facts import PROVENANCE  # noqa: PLC0415

    return open_storage(task.to).has(f"{part_folder(asdict(identity), part)}/{PROVENANCE}")


def _write(task: MapTask, counted: Part) -> dict[str, str]:
    """Write the files of a part, the provenance last."""
    storage, provenance = open_storage(task.to), counted.provenance
    folder = part_folder(provenance, provenance["part"])
    for name, content in counted.files().items():
        storage.write(f"{folder}/{name}", content)
    return {"status": "done"}


def part_folder(identity: Mapping[str, Any], part: str) -> str:
    """Return the name of a part's folder, Hive-partitioned, with quoted values.

    Example:
        >>> named = {"date": "2026-11-30", "kernel": "7.2", "module": "1.5.34", "host": "a/b"}
        >>> part_folder(named, "0f")
        'format=1/date=2026-11-30/kernel=7.2/module=1.5.34/host=a%2Fb/part=0f'
    """
    keys = ("date", "kernel", "module", "host")
    values = [f"{key}={quote(str(identity[key]), safe='')}" for key in keys]
    return "/".join([_root(), *values, f"part={part}"])
