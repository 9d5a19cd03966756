"""The simulator's tables of leaves: numbers, wrappers, registers and locks, as rows of CSV.

They are transcribed independently of ``tdxtrace.tdx``: a simulator that shared its data with the
readers would reproduce their mistakes.  A leaf without effects on the state needs only rows:

- ``data/leaves.csv``: number, wrapper, its arguments before the first that is only an output,
  whether its ``page`` is a page frame number from Linux 7.2 on, whether it is called through
  __seamcall_ret, and the position of its code among the wrappers;
- ``data/operands.csv``: contents of each input register: td, vcpu, gpa, level, page, page 2,
  page 3, or operand (another number);
- ``data/locks.csv``: the locks of a call in the order they are acquired, each as resource, mode
  and operand, for generation B (A and C have only rows that differ from B or are not in B).
"""

from __future__ import annotations

import csv
from importlib import resources
from typing import Final

_DATA: Final = resources.files("tdxtrace.simulate") / "data"


def rows(name: str) -> list[dict[str, str]]:
    """Read ``data/NAME.csv``: one dict per row, in the order of the file."""
    text = (_DATA / f"{name}.csv").read_text("utf-8")
    return list(csv.DictReader(text.splitlines()))
