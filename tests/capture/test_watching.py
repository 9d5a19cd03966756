"""``tdxtrace watch`` on the running kernel, while the testbed runs."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import pytest
from support.testbed import LEAVES, Tracing, program, truth

PATIENCE_S = 120
NAMES = {
    0: "TDH.VP.ENTER",
    3: "TDH.MEM.SEPT.ADD",
    6: "TDH.MEM.PAGE.AUG",
    7: "TDH.MEM.RANGE.BLOCK",
    29: "TDH.MEM.PAGE.REMOVE",
    38: "TDH.MEM.TRACK",
}


@pytest.mark.parametrize("seed", ["7", "8"])
def test_it_counts_what_was_done(seed: str, tracing: Tracing, bench: Path, tmp_path: Path) -> None:
    csv = tmp_path / "truth.csv"
    command = program("watch", "--program", bench, "--interval", "100ms", "--jsonl")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        subprocess.run([str(bench), str(csv), "4", "2", "100", seed], check=True)
        process.send_signal(signal.SIGINT)
        result = json.loads(process.stdout.read().splitlines()[-1])
        assert process.wait(PATIENCE_S) == 0
    assert result["lost"] == 0
    assert result["given_up"] == 0
    wanted: dict[str, list[int]] = {}
    for (_, leaf), requests in truth(csv).items():
        one = wanted.setdefault(NAMES[leaf], [0, 0, 0, 0])
        one[0] += len(requests)
        one[1] += sum(request[1] for request in requests)
        one[2] += sum(request[2] for request in requests)
        one[3] = max(one[3], *(request[1] for request in requests))
    flying = sum(one[0] for one in wanted.values()) - sum(
        one["requests"] for one in result["leaves"].values()
    )
    # Those whose thread ended with a busy answer are in flight for ever.
    assert flying == result["in_flight"]
    for name, (_, calls, busy, most) in wanted.items():
        one = result["leaves"][name]
        assert (one["seamcalls"], one["busy"]) == (calls, busy), name
        assert one["max_attempts"] <= most
    assert set(result["leaves"]) == {NAMES[leaf] for leaf in LEAVES.values()}


def test_a_threshold_ends_it_and_removes_the_instance(tracing: Tracing, bench: Path) -> None:
    command = program("watch", "--program", bench, "--interval", "100ms", "--jsonl")
    command += ["--fail-on", "losses>=0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_S)
    assert done.returncode == 3
    assert "losses is 0" in done.stderr
