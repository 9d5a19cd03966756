"""Programs that stand in for a TDX host: uprobes on functions named like the wrappers.

Such a program (tests/capture/testbed.c is one) has functions with the names and arguments of
the kernel's wrappers; probes on it go through the same tracing machinery as a kernel's.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Final

from tdxtrace.capture.recipe import Kernel
from tdxtrace.capture.symbols import Symbols
from tdxtrace.errors import FormatError, InputError
from tdxtrace.tables.text import one_line
from tdxtrace.tdx import wrappers

# The kernel takes a uprobe's path up to the first blank, and its offset after the last
# colon: Linux kernel/trace/trace_uprobe.c, __trace_uprobe_create.
_FORBIDDEN: Final = " \t\n\r\"'\\"


def program(path: Path, release: str) -> Kernel:
    """Return a program's functions that are named like wrappers, as a kernel to trace.

    Args:
        path: An ELF file with symbols.
        release: Kernel release whose wrapper signatures they have, such as "6.16".

    Raises:
        InputError: If it cannot be read, or the kernel does not accept its path.
        FormatError: If it is not an ELF file, or has no such function.
    """
    where = str(path.absolute())
    shown = one_line(where)
    if any(c in where for c in _FORBIDDEN):
        raise InputError(f"{shown}: the kernel takes no blank or quote in a probed path")
    spots = {name: f"{where}:{at:#x}" for name, at in _functions(path, shown).items()}
    if not spots:
        raise FormatError(f"{shown} has no function named like a wrapper (tdh_mem_page_aug, ...)")
    return Kernel(release, Symbols(frozenset(spots), frozenset(), shown), None, False, spots)


def _functions(path: Path, shown: str) -> dict[str, int]:
    """Return the file offset of each function named like a wrapper."""
    from elftools.common.exceptions import ELFError  # noqa: PLC0415 - only where it is needed
    from elftools.elf.elffile import ELFFile  # noqa: PLC0415
    from elftools.elf.sections import SymbolTableSection  # noqa: PLC0415

    known = set(wrappers.wrapper_table()["function"])
    try:
        with path.open("rb") as file:
            elf = ELFFile(file)
            tables = [s for s in elf.iter_sections() if isinstance(s, SymbolTableSection)]
            loaded = [s.header for s in elf.iter_segments() if s.header["p_type"] == "PT_LOAD"]
            found = {}
            for symbol in (one for table in tables for one in table.iter_symbols()):
                at = int(symbol["st_value"])
                if symbol.name in known and symbol["st_info"]["type"] == "STT_FUNC" and at:
                    found[symbol.name] = next(
                        at - s["p_vaddr"] + s["p_offset"]
                        for s in loaded
                        if s["p_vaddr"] <= at < s["p_vaddr"] + s["p_filesz"]
                    )
            return found
    except OSError as error:
        raise InputError(f"cannot read {shown}: {error.strerror}") from None
    except (ELFError, ValueError, struct.error, StopIteration):
        raise FormatError(f"{shown} is no ELF program, or is damaged") from None
