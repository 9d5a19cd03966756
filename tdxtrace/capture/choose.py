"""Which kernel, or program, and what of it: the user's words become a recipe's ingredients."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tdxtrace.capture import buffers, symbols, tracing
from tdxtrace.capture.btf import open_btf
from tdxtrace.capture.host import Host
from tdxtrace.capture.programs import program as program_at
from tdxtrace.capture.recipe import GROUP, Detail, Kernel, Wish
from tdxtrace.errors import QueryError
from tdxtrace.tables.text import one_line

# The wrappers' arguments that a program's functions have, if the user does not say: those of
# the first kernel with TDs.
_FIRST: Final = "6.16"


def wanted_kernel(
    host: Host,
    release: str | None,
    kallsyms: Path | None,
    btf: Sequence[Path],
    program: Path | None,
) -> Kernel:
    """Return the kernel that is meant: the running one, unless a word says otherwise.

    Args:
        host: The machine.
        release: Of another kernel, such as "6.16".
        kallsyms: A copy of its symbols.
        btf: Its types, and those of its kvm_intel.
        program: A program to trace in its place.

    Raises:
        QueryError: If the release is no release, or words contradict each other.
        InputError: If a file cannot be read.
        FormatError: If a file is not what it should be.
    """
    if release is not None and not re.match(r"\d{1,3}\.\d{1,4}(?!\d)", release):
        raise QueryError(f"not a kernel release: {one_line(release, 40)!r}; write e.g. 6.16")
    if program is not None:
        if kallsyms is not None or btf:
            raise QueryError("--program has symbols of its own; leave --from-kallsyms, --btf out")
        return program_at(program, release or _FIRST)
    if release is None and kallsyms is None and not btf:
        return tracing.kernel_of(host)
    if release is None and kallsyms is not None:
        raise QueryError("kallsyms does not tell the release: add --kernel, e.g. --kernel 6.18")
    known = symbols.Symbols() if kallsyms is None else symbols.from_file(kallsyms)
    if release is None:
        known = symbols.of_host(host)
    return Kernel(release or host.release, known, open_btf(btf) if btf else None)


def wish_of(
    detail: str, seamcalls: bool, only_tds: bool, rate: int | None, group: str = GROUP
) -> Wish:
    """Put the user's words together."""
    return Wish(Detail(detail), seamcalls, only_tds, rate or buffers.RATE, group)
