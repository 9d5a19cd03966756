"""Kernel functions that issue SEAMCALLs: leaf and arguments."""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING, Final

from tdxtrace.tdx.facts import facts, records

if TYPE_CHECKING:
    import polars as pl

# Also the columns of ``seamcalls`` that hold them.
PAGES: Final = ("page", "page_2", "page_3")
"""Words of wrappers.csv for the pages that a call takes, in the order of its parameters."""
# 6ad0badd765c and 4c7a1247646c "Use PFN directly for (un)mapping guest private memory": the KVM
# pull of June 2026 for 7.2-rc1.  A tree of 7.1-rc (5b25f249be32) still passes struct page.
_NEWER_FORM: Final = (7, 2)


@cache
def wrapper_table() -> pl.DataFrame:
    """Return the kernel functions that issue SEAMCALLs, one row per function.

    Returns:
        Columns function, leaf (UInt16; null: any), version (UInt8; null: 0), arguments (words in
        order), arguments_7_2 (from Linux 7.2 on, where it differs), source.
    """
    import polars as pl

    return facts("wrappers", leaf=pl.UInt16, version=pl.UInt8)


@cache
def signature(function: str, kernel: str | None = None) -> tuple[str, ...]:
    """Return the meaning of each argument of a wrapper, in order.

    The words: ``td`` and ``vp`` are addresses of struct tdx_td and tdx_vp, ``gpa`` is a guest
    physical address in bytes, ``level`` counts from :func:`level_base`, ``page`` is an address of a
    struct page and ``pfn`` a page frame number, ``page_2`` and ``page_3`` are further pages,
    ``ext_err1`` and ``ext_err2`` are addresses where RCX and RDX go, ``fn`` is RAX at entry and
    ``args`` the address of a struct tdx_module_args (rcx, rdx, r8, ...).

    Args:
        function: The kernel's name of it, such as tdh_mem_page_aug.
        kernel: Kernel release; below 7.2 the form of 6.16 to 7.1.  Without it that form too, and
            of a function that is newer the form that it has.

    Returns:
        One word per argument; empty if the function or its arguments are not known.

    Sources:
        arch/x86/virt/vmx/tdx/tdx.c; each row of wrappers.csv names the release.
    """
    row = _rows().get(function)
    if row is None:
        return ()
    older, newer = row["arguments"], row["arguments_7_2"]
    if kernel is None:
        words = older or newer
    else:
        words = (newer or older) if _release(kernel) >= _NEWER_FORM else older
    return tuple((words or "").split())


def sources() -> dict[str, str]:
    """Return where each function that issues SEAMCALLs comes from, such as "Linux 6.16"."""
    return {str(function): row["source"] or "" for function, row in _rows().items()}


@cache
def leaf_of(function: str) -> int | None:
    """Return the leaf that a kernel function issues.

    Args:
        function: The kernel's name of it.

    Returns:
        The leaf number; None if the function is not known or issues any leaf (__seamcall).  One
        that is not in wrappers.csv is known by its name.
    """
    row = _rows().get(function)
    if row is None:
        return functions_named_as_leaves().get(function)
    leaf = row["leaf"]
    return None if leaf is None else int(leaf, 0)


@cache
def functions_named_as_leaves() -> dict[str, int]:
    """Return leaves by the names that their functions would have, tdh_mem_sept_rd for one.

    Every function in wrappers.csv has the name of its leaf, so one of a kernel that is out of tree
    is told by it too.  Its arguments are not known: those count that a probe names.
    """
    named = {
        name.lower().replace(".", "_"): int(row["leaf"] or "", 0)
        for row in records("leaves")
        if (name := row["name"] or "").startswith("TDH.")
    }
    return {name: leaf for name, leaf in named.items() if name not in _rows()}


def level_base(kernel: str) -> int | None:
    """Return the number that a kernel's wrappers pass as the level of a 4K page.

    The module counts 4K as 0.  Wrappers of 6.16 to 7.1 do so too; those from 7.2 on take enum
    pg_level, where 4K is 1.  Source: the rows of kernels.csv.

    Args:
        kernel: Kernel release, such as "6.18.44-foo".

    Returns:
        0 or 1; None for a kernel whose wrappers were not read.
    """
    row = _kernel(kernel)
    return None if row is None else int(row["level_base"] or 0)


def _release(kernel: str) -> tuple[int, int]:
    """Parse major and minor number of a kernel release; (0, 0) if there are none."""
    found = re.match(r"^(\d+)\.(\d+)", kernel)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _kernel(kernel: str) -> dict[str, str | None] | None:
    """Return the row of kernels.csv for ``kernel``; None if there is none."""
    major, minor = _release(kernel)
    for row in records("kernels"):
        first, last = int(row["minor_first"] or 0), int(row["minor_last"] or minor)
        if int(row["major"] or 0) == major and first <= minor <= last:
            return row
    return None


@cache
def _rows() -> dict[str | None, dict[str, str | None]]:
    """Return the wrappers by name."""
    return {row["function"]: row for row in records("wrappers")}
