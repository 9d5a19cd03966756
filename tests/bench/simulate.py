"""Measure simulated SEAMCALLs per second on one core, without rendering.

python tests/bench/simulate.py
"""

from __future__ import annotations

import time

from tdxtrace.simulate import engine, scenario

RUNS = {"boot_storm": 300, "zero_step_attack": 200, "conversion_churn": 200, "removal": 200}


def main() -> None:
    """Print a line per scenario."""
    for name, duration_ms in RUNS.items():
        chosen = scenario.named(name).with_(duration_ms=duration_ms)
        begun = time.perf_counter()
        run = engine.run(chosen, seed=1)
        took = time.perf_counter() - begun
        calls = sum(len(request.calls) for request in run.journal.requests)
        print(f"{name:<18} {calls:>9,} SEAMCALLs in {took:5.2f} s: {calls / took:>8,.0f} a second")


if __name__ == "__main__":
    main()
