"""Write a large trace: the lines of a small real one, repeated with later timestamps.

    python tests/bench/make_text.py sample_traces/contended.txt big.txt --events 3000000
    python tests/bench/make_text.py sample_traces/contended.txt big.txt --bytes 1e9 --noise 0.95

Chains stay whole: each round begins after the last one ended.  Noise lines are
sched_switch and raw_syscalls events as ``trace`` prints them, between the real ones.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

_STAMP = re.compile(rb"(\d+)\.(\d{6}): ")
_NOISE = (
    b"            bash-17936   [000] .....  %d.%06d: sys_enter: NR 33 (b, 1, 557e594aa9b, 0, 7)\n",
    b"            bash-17936   [000] .....  %d.%06d: sys_exit: NR 33 = 2\n",
    b"          <idle>-0       [001] d..2.  %d.%06d: sched_switch: prev_comm=swapper/1 prev_pid=0 "
    b"prev_prio=120 prev_state=R ==> next_comm=kworker/1:1 next_pid=44 next_prio=120\n",
)


def rounds(lines: list[bytes], noise: float) -> bytes:
    """One round as a format string: ``%d.%06d`` where a time goes."""
    per_line = noise / (1 - noise) if noise else 0.0
    made, due, n = [], 0.0, 0
    for line in lines:
        made.append(line)
        due += per_line
        while due >= 1:
            made.append(_NOISE[n % len(_NOISE)])
            due, n = due - 1, n + 1
    return b"".join(made)


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--events", type=float, default=0)
    parser.add_argument("--bytes", type=float, default=0)
    parser.add_argument("--noise", type=float, default=0.0, help="share of foreign lines")
    options = parser.parse_args()
    real = [line for line in options.source.read_bytes().splitlines(True) if _STAMP.search(line)]
    stamps = [int(m[1]) * 1_000_000 + int(m[2]) for line in real if (m := _STAMP.search(line))]
    period = max(stamps) - min(stamps) + 100
    template = rounds([line.replace(b"%", b"%%") for line in real], options.noise)
    places = list(re.finditer(rb"(\d+)\.(\d{6}): |%d\.%06d: ", template))
    times, last = [], stamps[0]
    for found in places:
        last = int(found[1]) * 1_000_000 + int(found[2]) if found[1] else last
        times.append(last)
    text = re.sub(rb"(\d+)\.(\d{6}): ", b"%d.%06d: ", template)
    written = n = 0
    with options.target.open("wb") as file:
        while n < options.events or written < options.bytes:
            shift = period * (n // len(times))
            values = [part for t in times for part in divmod(t + shift, 1_000_000)]
            written += file.write(text % tuple(values))
            n += len(times)
    print(f"{options.target}: {n:,} events, {written:,} bytes")


if __name__ == "__main__":
    main()
