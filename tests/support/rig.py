"""Captures with ground truth, and the comparison of retry chains with it.

A user-space program (the rig) with functions named like the kernel's wrappers was traced while
its threads competed for locks like those of the TDX module; it logged its operations itself
(sample_traces/README.md).  Two captures are in sample_traces/; others are outside the
repository, and their tests are skipped without them.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import polars as pl

ROOT: Final = Path(__file__).parents[2]
SAMPLES: Final = ROOT / "sample_traces"
CAPTURES: Final = ROOT.parent / "shared" / "captures"

LEAVES: Final = {
    "tdh_vp_enter": 0,
    "tdh_mem_sept_add": 3,
    "tdh_mem_page_aug": 6,
    "tdh_mem_range_block": 7,
    "tdh_mem_page_remove": 29,
    "tdh_mem_track": 38,
    "tdh_phymem_page_wbinvd_hkid": 41,
}
_FAULT_LEAVES: Final = (3, 6)
_VP_ENTER: Final = 0
# The kernel and trace-cmd round timestamps to a microsecond, perf truncates them.
CLOCK_NS: Final = 1000

Key = tuple[int, int, int | None]


@dataclass(frozen=True, slots=True)
class Op:
    """One logged operation: a call and its retries."""

    tid: int
    leaf: int
    td: int
    gpa: int | None
    level: int | None
    start_ns: int
    end_ns: int
    n_attempts: int
    outcome: str
    final_status: int
    detail: str

    @property
    def key(self) -> Key:
        """Identity of the request."""
        return self.tid, self.leaf, self.gpa


@dataclass(slots=True)
class Score:
    """Result of comparing chains with operations."""

    exact: int = 0
    cut: int = 0
    wrong: list[str] = field(default_factory=list)
    """Chains that differ from their operation."""
    extra: list[str] = field(default_factory=list)
    """Chains without an operation."""
    missing: list[str] = field(default_factory=list)
    """Operations without a chain."""

    @property
    def problems(self) -> list[str]:
        """All differences."""
        return [*self.wrong, *self.extra, *self.missing]


def read_ops(path: Path, probed: Iterable[str] = LEAVES, blind: Iterable[str] = ()) -> list[Op]:
    """Read a truth file.

    Args:
        path: A truth.csv.
        probed: Functions that the capture has probes on; others are ignored.
        blind: Functions whose probes do not fetch the page.
    """
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["function"] in set(probed)]
    return [_op(row, set(blind)) for row in rows]


def _op(row: dict[str, str], blind: set[str]) -> Op:
    sees = row["gpa"] and row["function"] not in blind
    return Op(
        tid=int(row["tid"]),
        leaf=LEAVES[row["function"]],
        td=int(row["td"], 16),
        gpa=int(row["gpa"], 16) if sees else None,
        level=int(row["level"]) if sees else None,
        start_ns=int(row["start_ns"]),
        end_ns=int(row["end_ns"]),
        n_attempts=int(row["attempts"]),
        outcome=row["outcome"],
        final_status=int(row["final_status"], 16),
        detail=row["detail"],
    )


def outcomes(ops: list[Op]) -> dict[Op, str]:
    """Outcome of each operation by the definitions of ``retry_chains``, from the log alone.

    An operation that was given up is resolved elsewhere if another succeeded on the same
    request after its start, and cut if its thread has no later operation that could end it.
    """
    done: dict[tuple[int, int, int | None, int | None], list[Op]] = defaultdict(list)
    last: dict[tuple[int, bool], int] = defaultdict(int)
    for op in ops:
        if op.outcome == "success":
            done[op.leaf, op.td, op.gpa, op.level].append(op)
        for skips_entries in {False, op.leaf == _VP_ENTER}:
            key = op.tid, skips_entries
            last[key] = max(last[key], op.start_ns)
    return {op: _outcome(op, done[op.leaf, op.td, op.gpa, op.level], last) for op in ops}


def _outcome(op: Op, done: list[Op], last: dict[tuple[int, bool], int]) -> str:
    if op.outcome != "gave_up":
        return {"success": "succeeded", "error": "failed"}[op.outcome]
    rest = [last[op.tid, False]]
    if op.leaf not in _FAULT_LEAVES:
        rest.append(last[op.tid, True])
    if max(rest) <= op.start_ns:
        return "cut"
    settled = op.leaf != _VP_ENTER and any(other.end_ns >= op.start_ns for other in done)
    return "resolved_elsewhere" if settled else "abandoned"


def by_key(items: Iterable[Any], key: Any) -> dict[Key, list[Any]]:  # noqa: ANN401
    """Group items by request, in the given order."""
    found: dict[Key, list[Any]] = defaultdict(list)
    for item in items:
        found[key(item)].append(item)
    return found


def chain_rows(chains: pl.DataFrame) -> list[dict[str, Any]]:
    """The chains ordered by time."""
    return chains.sort("start_ns", "first_seq").to_dicts()


def _chain_key(chain: dict[str, Any]) -> Key:
    return chain["tid"], chain["leaf"], chain["gpa"]


def compare(chains: pl.DataFrame, ops: list[Op], *, is_relative: bool = False) -> Score:
    """Compare the chains of a capture without losses with the truth, one by one in order.

    Args:
        chains: The ``retry_chains`` table.
        ops: The logged operations.
        is_relative: Whether the capture's times are relative to its first event.
    """
    score, ends = Score(), outcomes(ops)
    own = by_key(chain_rows(chains), _chain_key)
    chains_of_key = by_key(sorted(ops, key=lambda op: op.start_ns), lambda op: op.key)
    for key in own.keys() | chains_of_key.keys():
        found, real = own.get(key, []), chains_of_key.get(key, [])
        for chain, op in zip(found, real, strict=False):
            _compare_one(score, chain, op, ends[op], is_relative=is_relative)
        score.extra += [shown(chain) for chain in found[len(real) :]]
        score.missing += [str(op) for op in real[len(found) :]]
    return score


def _compare_one(
    score: Score, chain: dict[str, Any], op: Op, outcome: str, *, is_relative: bool
) -> None:
    same = (chain["n_attempts"], chain["outcome"], chain["final_status"]) == (
        *(op.n_attempts, outcome, op.final_status),
    )
    if same and _fits(chain, op, is_relative=is_relative):
        score.exact += 1
    else:
        score.wrong.append(f"{shown(chain)}, but {op} {outcome}")


def _fits(chain: dict[str, Any], op: Op, *, is_relative: bool) -> bool:
    """Whether a chain is within the time of an operation, up to the clock resolution."""
    if is_relative:
        took = chain["end_ns"] - chain["start_ns"]
        return bool(took <= op.end_ns - op.start_ns + 2 * CLOCK_NS)
    begins = chain["start_ns"] >= op.start_ns - CLOCK_NS
    return bool(begins and chain["end_ns"] <= op.end_ns + CLOCK_NS)


def compare_lossy(chains: pl.DataFrame, ops: list[Op]) -> Score:
    """Compare the chains of a capture with losses with the truth.

    A chain that is not cut must equal an operation; cut chains are only counted.
    """
    score = Score()
    chains_of_key = by_key(sorted(ops, key=lambda op: op.start_ns), lambda op: op.key)
    used: set[Op] = set()
    for chain in chain_rows(chains):
        if chain["outcome"] == "cut":
            score.cut += 1
            continue
        near = [
            op
            for op in chains_of_key.get(_chain_key(chain), [])
            if _fits(chain, op, is_relative=False)
        ]
        exact = [op for op in near if op not in used and _is_one(chain, op)]
        if exact:
            used.add(exact[0])
            score.exact += 1
        else:
            score.wrong.append(f"{shown(chain)}, but {near}")
    return score


def _is_one(chain: dict[str, Any], op: Op) -> bool:
    named = {
        "success": ("succeeded",),
        "error": ("failed",),
        "gave_up": ("abandoned", "resolved_elsewhere"),
    }
    return (
        chain["outcome"] in named[op.outcome]
        and chain["n_attempts"] == op.n_attempts
        and chain["final_status"] == op.final_status
    )


def shown(chain: dict[str, Any]) -> str:
    """A chain as text for messages."""
    names = ("tid", "leaf", "gpa", "first_seq", "start_ns", "end_ns", "n_attempts", "outcome")
    return ", ".join(f"{name} {chain[name]}" for name in (*names, "final_status", "cut_by"))


@dataclass(frozen=True, slots=True)
class Episode:
    """One logged zero-step episode."""

    tid: int
    armed_ns: int
    first_busy_ns: int
    cleared_ns: int
    n_refused: int
    n_emulated: int


def read_episodes(path: Path) -> list[Episode]:
    """Read a truth_zerostep file: episodes with refused entries, by thread and time."""
    with path.open(newline="") as file:
        rows = [
            Episode(
                int(row["tid"]),
                int(row["armed_ns"]),
                int(row["first_busy_ns"]),
                int(row["cleared_ns"]),
                int(row["vp_enter_busy_sept"]),
                int(row["emulated_ept_exits"]),
            )
            for row in csv.DictReader(file)
        ]
    refused = [row for row in rows if row.n_refused]
    return sorted(refused, key=lambda row: (row.tid, row.armed_ns))
