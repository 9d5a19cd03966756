"""Kernel functions by address, from the recording's kallsyms."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

from tdxtrace.ingest.events.registry import functions

_LINE: Final = rb"^(?P<address>[0-9a-f]{8,16}) [tTwW] (?P<name>%s)(?:\s|$)"
# A probe sits at most this far into its function: an entry probe behind its
# prologue (endbr64 and the ftrace call: 9 bytes), a return probe at its start.
_REACH: Final = 16


def symbol_finder(kallsyms: Callable[[], bytes]) -> Callable[[int], str | None]:
    """Return a function that names the SEAMCALL function at an address, or None.

    Args:
        kallsyms: Gives the text of /proc/kallsyms; asked once, when first needed.
    """
    found: dict[int, str] | None = None

    def name(address: int) -> str | None:
        nonlocal found
        if found is None:
            found = _addresses(kallsyms())
        near = (found.get(address - step) for step in range(_REACH + 1))
        return next((symbol for symbol in near if symbol is not None), None)

    return name


def _addresses(kallsyms: bytes) -> dict[int, str]:
    names = b"|".join(re.escape(name.encode()) for name in sorted(functions()))
    lines = re.finditer(_LINE % names, kallsyms, re.MULTILINE)
    made = {int(line["address"], 16): line["name"].decode() for line in lines}
    made.pop(0, None)
    return made
