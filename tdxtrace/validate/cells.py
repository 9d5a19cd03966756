"""Cells of the validation: combinations of scenario, generation, policy, capture and seed."""

from __future__ import annotations

import difflib
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil
from random import Random
from typing import Any, Final

from tdxtrace.errors import QueryError
from tdxtrace.simulate import scenario


@dataclass(frozen=True, slots=True)
class Plan:
    """One run of the simulator, shared by all cells with captures of it."""

    scenario: str
    generation: str
    policy: str
    seed: int
    duration_ms: int
    kernel: str = "6.18"


@dataclass(frozen=True, slots=True)
class Cell:
    """One capture of one run; it is read and analysed once."""

    plan: Plan
    form: str = "tracefs"
    options: tuple[str, ...] = ()
    probes: str = "wrappers"
    vp_enter: bool = True
    arguments: bool = True
    faults: tuple[str, ...] = ()

    @property
    def is_clean(self) -> bool:
        """Whether the capture is complete: no losses, and all arguments."""
        return not self.faults and self.arguments and self.probes != "stock"

    @property
    def probes_seamcalls(self) -> bool:
        """Whether each SEAMCALL is captured, not only the call of its wrapper."""
        return self.probes in ("seamcall", "capture-seamcalls")

    @property
    def shows_causes(self) -> bool:
        """Whether a complete capture also has the entries of all calls, in nanoseconds."""
        probed = self.probes in ("wrappers", "capture")
        whole = probed and self.form != "graph" and self.vp_enter
        return self.is_clean and whole and "ns" in self.options

    @property
    def capture(self) -> str:
        """Short description of the capture."""
        words = [self.form, *self.options, self.probes]
        words += [] if self.vp_enter else ["no vpenter"]
        words += [] if self.arguments else ["no arguments"]
        return " ".join([*words, *self.faults])


FULL_CAPTURE: Final[dict[str, Any]] = {"form": "trace-cmd", "options": ("raw", "ns")}
"""The most complete capture: entries of all functions, arguments and nanoseconds."""
OWN_CAPTURE: Final[dict[str, Any]] = {**FULL_CAPTURE, "probes": "capture"}
"""A capture with the probes of ``tdxtrace capture``, in the same format."""

# Captures that cover each format, each set of probes and each fault.
_CAPTURES: Final[tuple[dict[str, Any], ...]] = (
    {},
    {"options": ("tgid",)},
    {"form": "trace-pipe"},
    {"form": "trace-cmd"},
    FULL_CAPTURE,
    {"form": "trace-cmd", "options": ("instance=rig",)},
    {"form": "perf"},
    {"form": "perf", "options": ("ns",)},
    {"form": "graph"},
    {"options": ("latency",)},
    {"options": ("no-irq-info",)},
    {"probes": "retargs"},
    {"probes": "seamcall"},
    {"vp_enter": False},
    {"probes": "stock"},
    {"arguments": False},
    {"form": "trace-pipe", "faults": ("lost=0.02",)},
    {"form": "trace-cmd", "faults": ("lost=0.02",)},
    {"form": "perf", "faults": ("lost=0.02",)},
    {"faults": ("overwritten=0.3",)},
    {"faults": ("full=0.3",)},
    {"faults": ("truncated=0.3",)},
    {"faults": ("returns=0.01",)},
    {"faults": ("clock=3",)},
    OWN_CAPTURE,
    {"probes": "capture"},
    {"probes": "capture-minimal"},
    {"probes": "capture-seamcalls"},
    {"probes": "capture", "form": "trace-pipe", "faults": ("lost=0.02",)},
)
# Generations and policies of a plan; None: those of the scenario.
_VARIANTS: Final = (
    (None, None),
    ("B", "v1-series"),
    ("C", "seed-loop"),
    ("A", "fixed-8"),
    ("B", "endless"),
)
_DURATION_MS: Final = 6
_SMALL_RUNS: Final = (
    ("zero_step_attack", "B", None),
    ("hostile_guest", "C", "endless"),
    ("balloon", "C", None),
    ("lifecycle", "C", None),
    ("crowd", "A", None),
)
_SMALL_CAPTURES: Final = (0, 4, 6, 8, 12, 13, 16, 22, 24, 26)


def small(seeds: Sequence[int] = (1,)) -> list[Cell]:
    """Return the cells of a short validation: few runs, and the captures of _SMALL_CAPTURES."""
    plans = [
        _plan(name, generation, policy, seed)
        for (name, generation, policy), seed in itertools.product(_SMALL_RUNS, seeds)
    ]
    return list(_cells(plans, [_CAPTURES[i] for i in _SMALL_CAPTURES]))


def full(seeds: Sequence[int] = (1,)) -> list[Cell]:
    """Return the cells of a full validation: every scenario in every variant.

    Plans of _ALL_CAPTURES with the scenario's own policy have all captures; other plans have three
    fixed ones and three others in rotation.  The contents of a capture depend little on the
    scenario, so the full product is not needed.

    Args:
        seeds: Seeds of the runs; each is used for all scenarios in all variants.
    """
    plans = [
        _plan(name, generation, policy, seed)
        for name, (generation, policy), seed in itertools.product(
            scenario.names(), _VARIANTS, seeds
        )
        if not (generation == "A" and any(td.large_pages for td in scenario.named(name).tds))
    ]
    cells: list[Cell] = []
    for number, plan in enumerate(dict.fromkeys(plans)):
        whole = (
            plan.scenario in _ALL_CAPTURES and plan.policy == scenario.named(plan.scenario).policy
        )
        turn = [_CAPTURES[(number * 3 + i) % len(_CAPTURES)] for i in range(3)]
        always = [_CAPTURES[0], FULL_CAPTURE, OWN_CAPTURE]
        captures = _CAPTURES if whole else [*always, *(c for c in turn if c not in always)]
        cells += _cells([plan], captures)
    return cells


def select_scenarios(cells: list[Cell], names: Sequence[str]) -> list[Cell]:
    """Return the cells of the named scenarios; all cells if ``names`` is empty.

    Raises:
        QueryError: If a named scenario has no cells.
    """
    known = sorted({cell.plan.scenario for cell in cells})
    for name in names:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
            raise QueryError(f"no cells of scenario {name!r}; nearest: {nearest}; --full has more")
    return [cell for cell in cells if not names or cell.plan.scenario in names]


def spread(cells: list[Cell], n: int) -> list[Cell]:
    """Return about ``n`` cells: all cells of randomly drawn plans, spread evenly over scenarios.

    Args:
        cells: Cells to draw from.
        n: Number of cells to keep, at least those of one plan; 0: all.
    """
    if not n or n >= len(cells):
        return cells
    plans = list(dict.fromkeys(cell.plan for cell in cells))
    n_plans = ceil(n * len(plans) / len(cells))
    Random(0).shuffle(plans)
    turns = Counter[str]()
    turn_of = {}
    for plan in plans:
        turn_of[plan] = turns[plan.scenario]
        turns[plan.scenario] += 1
    kept = set(sorted(plans, key=turn_of.__getitem__)[:n_plans])
    return [cell for cell in cells if cell.plan in kept]


_ALL_CAPTURES: Final = ("zero_step_attack", "hostile_guest", "balloon", "lifecycle", "crowd")


def _plan(name: str, generation: str | None, policy: str | None, seed: int) -> Plan:
    own = scenario.named(name)
    return Plan(
        name,
        generation or own.generation,
        policy or own.policy,
        seed,
        # Scenarios in _FULL_LENGTH show their effect late: the end of a life cycle, a timeout.
        own.duration_ms if name in _FULL_LENGTH else _DURATION_MS,
        own.kernel,
    )


_FULL_LENGTH: Final = ("lifecycle", "host_gives_up", "hotplug")


def _cells(plans: list[Plan], captures: Sequence[dict[str, Any]]) -> Iterator[Cell]:
    for plan, capture in itertools.product(plans, captures):
        yield replace(Cell(plan), **capture)
