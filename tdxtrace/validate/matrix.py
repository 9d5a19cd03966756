"""Run every cell and sum the scores; each analysis has an entry in SCORERS."""

from __future__ import annotations

import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Final, TypeVar

from tdxtrace.simulate import engine, scenario
from tdxtrace.simulate.engine import Run
from tdxtrace.validate.captured import CapturedRun, Score, capture_run
from tdxtrace.validate.causes import score_causes
from tdxtrace.validate.cells import Cell, Plan
from tdxtrace.validate.lifecycle import (
    score_accept_rates,
    score_boot_phases,
    score_module_updates,
    score_tdvmcalls,
)
from tdxtrace.validate.scores import score_chains, score_episodes
from tdxtrace.validate.step_causes import score_step_causes
from tdxtrace.validate.verdicts import score_verdicts

# Scorer of each analysis, by the name of the table that is scored.
SCORERS: Final[dict[str, Callable[[CapturedRun], Score]]] = {
    "retry_chains": score_chains,
    "zero_steps": score_episodes,
    "zero_step_causes": score_step_causes,
    "verdicts": score_verdicts,
    "busy_causes": score_causes,
    "accept_rates": score_accept_rates,
    "boot_phases": score_boot_phases,
    "tdvmcalls": score_tdvmcalls,
    "module_updates": score_module_updates,
}
Progress = Callable[[int, int], None]


@dataclass(slots=True)
class Result:
    """Scores of one cell, by analysis."""

    cell: Cell
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)
    unparsed: int = 0
    """Complete lines that ingest could not parse."""


def validate(cells: list[Cell], jobs: int = 0, progress: Progress | None = None) -> list[Result]:
    """Run and score cells.

    Args:
        cells: Cells to run; cells of the same plan share its simulation.
        jobs: Number of processes; 0: one per CPU.
        progress: Called with the number of plans done and the number of all plans.

    Returns:
        One result per cell, in the order of ``cells``.
    """
    by_plan: dict[Plan, list[Cell]] = {}
    for cell in cells:
        by_plan.setdefault(cell.plan, []).append(cell)
    groups = list(by_plan.values())
    done: dict[Cell, Result] = {}
    for number, results in enumerate(run_in_processes(score_group, groups, jobs), 1):
        done.update({result.cell: result for result in results})
        if progress is not None:
            progress(number, len(groups))
    return [done[cell] for cell in cells]


_Item = TypeVar("_Item")
_Done = TypeVar("_Done")


def run_in_processes(
    work: Callable[[_Item], _Done], items: Sequence[_Item], jobs: int
) -> Iterator[_Done]:
    """Call a function with each item, and yield the results in the order of completion.

    Args:
        work: A module-level function whose items and results can be pickled.
        items: Arguments of the calls.
        jobs: Number of processes; 0: one per CPU.
    """
    jobs = jobs or os.cpu_count() or 1
    if jobs == 1 or len(items) == 1:
        yield from map(work, items)
        return
    # The thread pool of polars does not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        try:
            for future in as_completed([pool.submit(work, item) for item in items]):
                yield future.result()
        finally:  # a signal cancels the work that has not begun
            pool.shutdown(wait=False, cancel_futures=True)


def score_group(cells: list[Cell]) -> list[Result]:
    """Simulate once, then capture, read, analyse and score each of the cells."""
    run = simulated(cells[0].plan)
    return [_scored(run, cell) for cell in cells]


def simulated(plan: Plan) -> Run:
    """Run a plan's scenario."""
    chosen = scenario.named(plan.scenario).with_(
        generation=plan.generation,
        policy=plan.policy,
        duration_ms=plan.duration_ms,
        kernel=plan.kernel,
    )
    return engine.run(chosen, plan.seed)


def _scored(run: Run, cell: Cell) -> Result:
    result = Result(cell)
    captured = capture_run(run, cell)
    if captured is None:
        return result
    losses = captured.trace.losses.filter(
        captured.trace.losses["kind"].is_in(["unparsed", "undecoded"])
    )
    # A line that is truncated at the end of the file cannot be parsed.
    result.unparsed = max(0, int(losses["n_lines"].sum()) - bool(captured.partial_line))
    for name, scorer in SCORERS.items():
        score = scorer(captured)
        result.counts[name] = dict(sorted(score.counts.items()))
        result.examples += [f"{name}: {text}" for text in score.examples]
    return result


def total(results: Iterable[Result], analysis: str) -> Counter[str]:
    """Sum the counts of one analysis over cells."""
    added: Counter[str] = Counter()
    for result in results:
        added.update(result.counts.get(analysis, {}))
    return added
