"""The simulator writes the same bytes as before.

Every scenario in every generation of the module's locks, as truth and trace.dat; those of the
newest in every format: how an event is printed does not depend on the generation.

``same_output.txt`` holds one line a run: what was simulated, its seed, and the start of the
SHA-256 of each thing that was written.  After a change that is meant to change the output:

    python tests/simulate/test_same_output.py
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tdxtrace.simulate import command, engine, scenario, truth
from tdxtrace.simulate.engine import Run
from tdxtrace.simulate.guest.programs import PROGRAMS
from tdxtrace.simulate.module.generations import GENERATIONS
from tdxtrace.simulate.record import faults, output
from tdxtrace.simulate.record.capture_probes import CAPTURES
from tdxtrace.simulate.record.probes import PROBES, Capture
from tdxtrace.simulate.scenario import KERNELS, Scenario
from tdxtrace.tables.truth import TRUTH_TABLES

HASHES = Path(__file__).with_name("same_output.txt")
SEEDS = (1,)
NEWEST = "C"
# Long enough for what the scenario is about to happen: some hundred calls to some thousand.
DURATION_MS = {
    "accept_beside_track": 1,
    "balloon": 3,
    "boot_storm": 1,
    "broken_mmu_lock": 4,
    "churn_2mb": 2,
    "churn_without_unblock": 2,
    "conversion_churn": 2,
    "crowd": 10,
    "dropped_block": 3,
    "fresh_memory": 1,
    "held_off": 3,
    "host_gives_up": 25,
    "hostile_accept": 3,
    "hostile_guest": 5,
    "hotplug": 14,
    "interrupted_requests": 2,
    "lifecycle": 60,
    "memory_fault_ignored": 6,
    "memslot_deletion": 8,
    "merge_given_up": 2,
    "module_update": 12,
    "page_split": 8,
    "prefault_race": 1,
    "quiet": 40,
    "racing_init": 3,
    "removal": 2,
    "single_step_attack": 3,
    "string_copy": 4,
    "td_boot": 30,
    "tdxdown": 2,
    "unseen_holder": 3,
    "zero_step_attack": 3,
}
POLICIES = ("mainline", "v1-series", "seed-loop", "endless", "fixed-1", "fixed-3")
OPTIONS = {
    "tracefs": (
        ["tgid"],
        ["latency"],
        ["latency", "verbose"],
        ["no-irq-info"],
        ["no-irq-info", "tgid"],
        ["clock=x86-tsc"],
    ),
    "trace-cmd": (["ns"], ["raw"], ["no-plugin"], ["flags"], ["instance=rig"]),
    "perf": (["ns"], ["process"], ["hide-lost"]),
}
FAULTS = (
    "lost=0.2",
    "overwritten=0.5",
    "full=0.3",
    "truncated=0.4",
    "clock=50",
    "returns=0.2",
)


def _short(name: str, generation: str = NEWEST) -> Scenario:
    return scenario.named(name).with_(duration_ms=DURATION_MS[name], generation=generation)


def _scenarios() -> dict[str, Scenario]:
    """Every run whose truth and formats are hashed, by what the line calls it."""
    runs = {}
    for name in scenario.names():
        for generation in GENERATIONS:
            if generation != "A" or not any(td.large_pages for td in scenario.named(name).tds):
                runs[f"{name} {generation}"] = _short(name, generation)
    for policy in POLICIES:
        runs[f"hostile_guest policy={policy}"] = _short("hostile_guest").with_(policy=policy)
    for kernel in KERNELS:
        runs[f"hostile_guest kernel={kernel}"] = _short("hostile_guest").with_(
            kernel=kernel, policy="fixed-16"
        )
    for program in PROGRAMS:
        td = _short("page_split").tds[0]
        guest = dataclasses.replace(td.guest, program=program, pages=1024)
        runs[f"page_split guest={program}"] = _short("page_split").with_(
            tds=(dataclasses.replace(td, accepted=512, guest=guest),), duration_ms=2
        )
    return runs | _long_held_locks()


def _long_held_locks() -> dict[str, Scenario]:
    """Runs in which the policies' warnings, limits and timeouts take effect."""
    runs = {}
    for lock_ns in (100_000, 1_000_000):
        held = {"attr": [lock_ns, lock_ns, 2 * lock_ns, 3 * lock_ns]}
        for name, policy in (("hostile_guest", "seed-loop"), ("host_gives_up", "fixed-1")):
            runs[f"{name} locks held {lock_ns} ns"] = _short(name).with_(policy=policy, times=held)
    return runs


def _run_outputs(run: Run, forms: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    rows = truth.rows_of(run)
    tables = [truth.csv_of(t.schema.names(), rows[t.name]) for t in TRUTH_TABLES]
    yield "truth", "".join(tables).encode()
    recording = faults.record(run, Capture(), ())
    for name in forms:
        yield name, output.render_bytes(run, recording, output.parse_format(name))


def _option_outputs(run: Run) -> Iterator[tuple[str, bytes]]:
    recording = faults.record(run, Capture(), (faults.parse_fault("lost=0.1"),))
    for name, choices in OPTIONS.items():
        for options in choices:
            form = output.parse_format(name, options)
            yield f"{name},{','.join(options)}", output.render_bytes(run, recording, form)


def _probe_outputs(run: Run) -> Iterator[tuple[str, bytes]]:
    for probes in PROBES:
        for arguments in (True, False)[: 1 if probes in CAPTURES else 2]:
            recording = faults.record(run, Capture(probes, arguments=arguments), ())
            for name in ("trace-cmd", "trace.dat"):
                data = output.render_bytes(run, recording, output.parse_format(name))
                yield f"{probes},{arguments},{name}", data


def _fault_outputs(run: Run) -> Iterator[tuple[str, bytes]]:
    for fault in FAULTS:
        recording = faults.record(run, Capture(), (faults.parse_fault(fault),))
        for name in ("trace-pipe", "perf", "graph", "trace.dat"):
            yield f"{fault},{name}", output.render_bytes(run, recording, output.parse_format(name))


def _tiled_outputs(run: Run) -> Iterator[tuple[str, bytes]]:
    closed = output.without_open_requests(run)
    for name in ("tracefs", "trace-cmd", "perf"):
        recording = faults.record(closed, Capture(), (faults.parse_fault("lost=0.1"),))
        chunks = output.repeated(recording, output.parse_format(name), run.end_ns, 3)
        yield f"{name},repeat=3", b"".join(chunks)


_MORE = {
    "options": ("balloon", _option_outputs),
    "probes": ("lifecycle", _probe_outputs),
    "faults": ("balloon", _fault_outputs),
    "repeat": ("zero_step_attack", _tiled_outputs),
}


def _outputs(what: str, seed: int) -> Iterator[tuple[str, bytes]]:
    if what == "listing":
        yield "list", command.listing().encode()
        yield "describe", "".join(map(command.description, scenario.names())).encode()
    elif what in _MORE:
        name, outputs = _MORE[what]
        yield from outputs(engine.run(_short(name), seed))
    else:
        is_newest = RUNS[what].generation == NEWEST
        forms = list(output.FORMATS) if is_newest else ["trace.dat"]
        yield from _run_outputs(engine.run(RUNS[what], seed), forms)


def _line(what: str, seed: int) -> str:
    parts = (f"{n}:{hashlib.sha256(d).hexdigest()[:8]}" for n, d in _outputs(what, seed))
    return f"{what} seed={seed} | {' '.join(parts)}"


RUNS = _scenarios()
WHAT = [*RUNS, *_MORE, "listing"]


def _known() -> dict[str, str]:
    return {line.partition(" | ")[0]: line for line in HASHES.read_text().splitlines()}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("what", WHAT)
def test_the_output_is_the_same_as_before(what: str, seed: int) -> None:
    assert _line(what, seed) == _known()[f"{what} seed={seed}"]


def test_every_known_line_is_checked() -> None:
    assert list(_known()) == [f"{what} seed={seed}" for what in WHAT for seed in SEEDS]


if __name__ == "__main__":
    HASHES.write_text("".join(f"{_line(what, seed)}\n" for what in WHAT for seed in SEEDS))
