"""The small matrix of the validate command: no analysis fails on any capture."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

from tdxtrace.validate import cells


def _validate(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tdxtrace", "validate", *words],
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_small_matrix_passes(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    done = _validate("--small", "--json", str(path))
    assert done.returncode == 0, done.stderr + done.stdout
    made = json.loads(path.read_text())
    assert len(made["cells"]) == len(cells.small()) >= 20
    assert made["figures"]["exact"] == 1.0
    assert made["figures"]["precision"] == 1.0
    assert made["failures"] == []
    assert done.stdout.splitlines()[0].startswith("scenario")


def test_a_scenario_without_cells_is_refused() -> None:
    done = _validate("--scenario", "lifecicle")
    assert done.returncode == 2
    assert "nearest: lifecycle" in done.stderr


def test_the_full_matrix_has_every_scenario_capture_and_variant() -> None:
    full = cells.full()
    assert len(full) >= 200
    assert len(set(full)) == len(full)
    assert {c.plan.generation for c in full} == {"A", "B", "C"}
    assert {c.form for c in full} >= {"tracefs", "trace-pipe", "trace-cmd", "perf", "graph"}
    assert {f.partition("=")[0] for c in full for f in c.faults} == {
        "lost", "overwritten", "full", "truncated", "returns", "clock",
    }  # fmt: skip
    assert len({c.plan.policy for c in full}) >= 5


def test_given_seeds_change_the_runs_and_not_the_cells() -> None:
    own, other = cells.full((1,)), cells.full((77,))
    assert {cell.plan.seed for cell in other} == {77}
    assert [dataclasses.replace(c.plan, seed=1) for c in other] == [c.plan for c in own]
    assert {cell.plan.seed for cell in cells.small((5, 6))} == {5, 6}


def test_a_part_of_the_matrix_has_whole_runs_of_every_scenario() -> None:
    full = cells.full()
    part = cells.spread(full, 200)
    assert abs(len(part) - 200) < 40
    assert cells.spread(full, 0) == cells.spread(full, 10**6) == full
    plans = {cell.plan for cell in part}
    assert part == [cell for cell in full if cell.plan in plans]
    assert {plan.scenario for plan in plans} == {cell.plan.scenario for cell in full}
    assert {cell.probes for cell in part} >= {"wrappers", "capture"}
