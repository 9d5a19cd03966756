"""A scenario: all parameters of a run except its seed, as data and as TOML."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, Final, TypeVar

from tdxtrace.errors import QueryError
from tdxtrace.simulate.durations import Durations, durations_from
from tdxtrace.simulate.guest.programs import GuestSpec, program_named
from tdxtrace.simulate.kvm.policies import policy_named
from tdxtrace.simulate.kvm.vmm_threads import CONDUCTS, WORKER_KINDS, WorkerSpec
from tdxtrace.simulate.module.generations import GENERATIONS
from tdxtrace.simulate.tables import rows
from tdxtrace.tables.settings import parse_settings
from tdxtrace.tables.text import one_line

KERNELS: Final = ("6.16", "6.18", "6.19", "7.0", "7.2")
# HP_LOCK_TIMEOUT may be 10 ms to 100 s: intel/tdx-module include/td_control_structures.h.
_HP_TIMEOUT_US: Final = (10_000, 100_000_000)
_MAX_COUNTS: Final = {"cpus": 4096, "tds": 64, "vcpus": 1024}


@dataclass(frozen=True, slots=True)
class TdSpec:
    """One TD, or several with the same parameters."""

    guest: GuestSpec
    count: int = 1
    vcpus: int = 4
    accepted: int = 512
    """Pages mapped and accepted before the trace begins."""
    pending_ve_disable: bool = True
    large_pages: bool = False
    """Whether the host maps 2 MB pages if the guest accepts 2 MB (huge page series)."""
    ignored_faults: int = 0
    """MEMORY_FAULT exits in a row that the VMM ignores before it converts the page."""
    mismatched: int = 0
    """Number of the guest's first pages that are marked shared by the VMM at the start."""
    refuses_faults: bool = False
    """Whether the host does not handle the faults of vCPU 0: a zero-step attack."""
    fault_serial_ns: int = 0
    """Serialised part of each fault of the TD, which limits its faults per second."""
    fault_per_vcpu_ns: int = 0
    """Additional time of a fault for each further vCPU of the TD."""
    single_steps: bool = False
    """Whether the host interrupts vCPU 0 after each instruction (TDXdown)."""
    userspace_share: float = 0.3
    build: bool = False
    """Whether the trace begins with the TD's creation."""
    racing_init: bool = False
    """Whether the VMM initialises all vCPUs at the same time, as kernels before 6.19 allow."""
    workers: tuple[WorkerSpec, ...] = ()


@dataclass(frozen=True, slots=True)
class Scenario:
    """All parameters of a run except its seed."""

    name: str
    title: str
    tds: tuple[TdSpec, ...]
    description: str = ""
    generation: str = "C"
    policy: str = "mainline"
    kernel: str = "6.18"
    duration_ms: int = 50
    cpus: int = 16
    interrupt_us: int = 1000
    """Mean time between interrupts of a host CPU."""
    event_us: int = 1000
    """Mean time between the guest's own interrupts on each vCPU."""
    no_entropy: float = 0.0
    """Probability that a call finds no entropy when it needs some."""
    hp_timeout_us: int = 1_000_000
    times: Mapping[str, list[int]] = field(default_factory=dict)

    def durations(self) -> Durations:
        """Return the default durations, with those of this scenario replaced."""
        return durations_from(self.times)

    def with_(self, **changes: Any) -> Scenario:  # noqa: ANN401 - fields of any type
        """Return the scenario with some fields replaced; None leaves a field unchanged.

        Raises:
            QueryError: If the result is invalid.
        """
        known = {k: v for k, v in changes.items() if v is not None}
        return checked(dataclasses.replace(self, **known))

    def with_vcpus(self, n: int | None) -> Scenario:
        """Return the scenario with ``n`` vCPUs in every TD; None changes nothing."""
        if n is None:
            return self
        return self.with_(tds=tuple(dataclasses.replace(td, vcpus=n) for td in self.tds))

    def to_toml(self) -> str:
        """Return the scenario as TOML text, which ``load`` parses."""
        head = {k: v for k, v in _fields_of(self).items() if k not in ("tds", "times")}
        lines = [f"{k} = {_toml_value(v)}" for k, v in head.items()]
        if self.times:
            lines += [
                "",
                "[times]",
                *(f"{k} = {_toml_value(list(v))}" for k, v in self.times.items()),
            ]
        for td in self.tds:
            lines += ["", "[[tds]]"]
            rest = {k: v for k, v in _fields_of(td).items() if k not in ("guest", "workers")}
            lines += [f"{k} = {_toml_value(v)}" for k, v in rest.items()]
            lines += [
                "[tds.guest]",
                *(f"{k} = {_toml_value(v)}" for k, v in _fields_of(td.guest).items()),
            ]
            for work in td.workers:
                lines += ["[[tds.workers]]"]
                given = {k: v for k, v in _fields_of(work).items() if k != "leaf" or v}
                lines += [f"{k} = {_toml_value(v)}" for k, v in given.items()]
        return "\n".join(lines) + "\n"


def names() -> list[str]:
    """Return the names of the scenarios of tdxtrace, sorted."""
    folder = resources.files("tdxtrace.simulate") / "scenarios"
    return sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name[-5:] == ".toml")


def named(name: str) -> Scenario:
    """Return a scenario of tdxtrace.

    Raises:
        QueryError: If the name is unknown; the message gives the nearest name.
    """
    known = names()
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
        raise QueryError(
            f"no scenario '{one_line(name, 60)}'; nearest: {nearest}; see tdxtrace simulate --list"
        )
    text = (resources.files("tdxtrace.simulate") / "scenarios" / f"{name}.toml").read_text("utf-8")
    return load(text)


def load(text: str) -> Scenario:
    """Parse a scenario from TOML.

    Raises:
        QueryError: If it is not TOML, or has an unknown key, a wrong type or a value out of
            range.
    """
    given = parse_settings(text, "the scenario")
    tds = []
    for td in _tables(given.pop("tds", []), "tds"):
        guest = _build(GuestSpec, td.pop("guest", {}), "tds.guest")
        works = [
            _build(WorkerSpec, w, "tds.workers") for w in _tables(td.pop("workers", []), "workers")
        ]
        tds.append(_build(TdSpec, {**td, "guest": guest, "workers": tuple(works)}, "tds"))
    return checked(_build(Scenario, {**given, "tds": tuple(tds)}, "the scenario"))


def checked(scenario: Scenario) -> Scenario:
    """Return ``scenario`` if it is valid.

    Raises:
        QueryError: If it is not; the message is the first problem.
    """
    wrong = next(filter(None, _problems(scenario)), None)
    if wrong is not None:
        raise QueryError(f"scenario '{one_line(scenario.name, 60)}': {wrong}")
    return scenario


_OF_PAGES: Final = ("page", "level")


def _problems(s: Scenario) -> list[str | None]:
    return [
        _error_of(policy_named, s.policy),
        _error_of(durations_from, s.times),
        _one_of("generation", s.generation, tuple(GENERATIONS)),
        _one_of("kernel", s.kernel, KERNELS),
        _within("duration_ms", s.duration_ms, 1, 3_600_000),
        _within("cpus", s.cpus, 1, _MAX_COUNTS["cpus"]),
        _within("interrupt_us", s.interrupt_us, 1, 10**9),
        _within("event_us", s.event_us, 1, 10**9),
        _within("hp_timeout_us", s.hp_timeout_us, *_HP_TIMEOUT_US),
        None if 0 <= s.no_entropy < 1 else f"no_entropy is a chance below 1, not {s.no_entropy}",
        _within("TDs", sum(td.count for td in s.tds), 1, _MAX_COUNTS["tds"]),
        *(problem for td in s.tds for problem in _td_problems(s, td)),
    ]


def _td_problems(s: Scenario, td: TdSpec) -> list[str | None]:
    large = td.large_pages and s.generation == "A"
    return [
        _error_of(program_named, td.guest.program),
        _within("vcpus", td.vcpus, 1, _MAX_COUNTS["vcpus"]),
        _within("count", td.count, 1, _MAX_COUNTS["tds"]),
        _within("pages", td.guest.pages, 1, 1 << 24),
        _within("run_us", td.guest.run_us, 1, 10**9),
        _within("fault_serial_ns", td.fault_serial_ns, 0, 10**9),
        _within("fault_per_vcpu_ns", td.fault_per_vcpu_ns, 0, 10**9),
        "large pages and generation A do not go together: 1.0.x has no DEMOTE" if large else None,
        *(_one_of("worker", work.kind, tuple(WORKER_KINDS)) for work in td.workers),
        *(_one_of("leaf", w.leaf, _leaves_on_pages(s)) for w in td.workers if w.kind == "seamcall"),
        *(_within("every_us", work.every_us, 1, 10**9) for work in td.workers),
        *(_one_of("conduct", work.conduct, CONDUCTS) for work in td.workers),
        *(_within("batch", work.batch, 1, max(1, work.pages)) for work in td.workers),
    ]


def _leaves_on_pages(s: Scenario) -> tuple[str, ...]:
    """Return leaves of this generation that have a wrapper and take only pages and a level."""
    others = {row["leaf"] for row in rows("operands") if row["role"].split()[0] not in _OF_PAGES}
    sequences = GENERATIONS[s.generation].lock_sequences if s.generation in GENERATIONS else {}
    named = (row["leaf"] for row in rows("leaves") if row["wrapper"])
    return tuple(leaf for leaf in named if leaf in sequences and leaf not in others)


def _error_of(read: Any, value: Any) -> str | None:  # noqa: ANN401 - any parser and its input
    try:
        read(value)
    except ValueError as error:
        return str(error)
    return None


def _one_of(what: str, value: str, allowed: tuple[str, ...]) -> str | None:
    shown = one_line(value, 60)
    return None if value in allowed else f"{what} '{shown}' is not one of {', '.join(allowed)}"


def _within(what: str, value: int, low: int, high: int) -> str | None:
    return None if low <= value <= high else f"{what} is {value}, not within {low} to {high}"


_T = TypeVar("_T")


def _build(kind: type[_T], given: Mapping[str, Any], where: str) -> _T:
    known = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if not isinstance(given, Mapping):
        raise QueryError(f"{where} is not a table")
    for name, value in given.items():
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
            raise QueryError(f"{where} has no '{one_line(name, 60)}'; nearest: {nearest}")
        declared = str(known[name].type)
        if declared in _TYPES and type(value) not in _TYPES[declared]:
            shown = one_line(repr(value), 60)
            raise QueryError(f"{name!r} of {where} is {shown}, not {declared}")
    try:
        return kind(**given)
    except TypeError as error:
        raise QueryError(f"{where}: {str(error).split(') ')[-1]}") from None


_TYPES: Final[Mapping[str, tuple[type, ...]]] = {
    "int": (int,),
    "str": (str,),
    "bool": (bool,),
    "float": (float, int),
}


def _tables(given: Any, where: str) -> list[dict[str, Any]]:  # noqa: ANN401 - any value of TOML
    if not isinstance(given, list) or not all(isinstance(row, dict) for row in given):
        raise QueryError(f"{where} is not a list of tables; write [[{where}]]")
    return given


def _fields_of(instance: Any) -> dict[str, Any]:  # noqa: ANN401 - any of the dataclasses here
    return {f.name: getattr(instance, f.name) for f in dataclasses.fields(instance)}


def _toml_value(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        return f'"{escaped}"'
    return str(value)
