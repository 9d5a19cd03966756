"""Kernel functions that issue SEAMCALLs: leaf and arguments."""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING, Final

from tdxtrace.tdx.facts import facts, records

if TYPE_CHECKING:
    import polars as pl

# The same names are columns of ``seamcalls``.
PAGES: Final = ("page", "page_2", "page_3")
"""Words of wrappers.csv for the page arguments of a call, in the order of its parameters."""
# 6ad0badd765c and 4c7a1247646c "Use PFN directly for (un)mapping guest private memory": the KVM
# pull of June 2026 for 7.2-rc1.  A tree of 7.1-rc (5b25f249be32) still passes struct page.
_NEWER_FORM: Final = (7, 2)


@cache
def wrapper_table() -> pl.DataFrame:
    """Return the kernel functions that issue SEAMCALLs, one row per function.

    Returns:
        Columns function, leaf (UInt16; null: any), version (UInt8; null: 0), arguments (words in
        order), arguments_7_2 (from Linux 7.2 on, if different), source.
    """
    import polars as pl

    return facts("wrappers", leaf=pl.UInt16, version=pl.UInt8)


@cache
def signature(function: str, kernel: str | None = None) -> tuple[str, ...]:
    """Return the meaning of each argument of a wrapper, in order.

    The words: ``td`` and ``vp`` are addresses of struct tdx_td and tdx_vp, ``gpa`` is a guest
    physical address in bytes, ``level`` counts from :func:`level_base`, ``page`` is an address of a
    struct page and ``pfn`` a page frame number, ``page_2`` and ``page_3`` are further pages,
    ``ext_err1`` and ``ext_err2`` are pointers to which RCX and RDX are written, ``fn`` is RAX at
    entry and ``args`` the address of a struct tdx_module_args (rcx, rdx, r8, ...).

    Args:
        function: Name in the kernel, such as tdh_mem_page_aug.
        kernel: Kernel release; below 7.2 the signature of 6.16 to 7.1.  None: that signature too,
            or the newer one if the function did not exist before.

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
    """Return the source of each function that issues SEAMCALLs, such as "Linux 6.16"."""
    return {str(function): row["source"] or "" for function, row in _rows().items()}


@cache
def leaf_of(function: str) -> int | None:
    """Return the leaf that a kernel function issues.

    Args:
        function: Name in the kernel.

    Returns:
        The leaf number; None if the function is unknown or issues any leaf (__seamcall).  The leaf
        of a function that is not in wrappers.csv is derived from its name.
    """
    row = _rows().get(function)
    if row is None:
        return functions_named_as_leaves().get(function)
    leaf = row["leaf"]
    return None if leaf is None else int(leaf, 0)


@cache
def functions_named_as_leaves() -> dict[str, int]:
    """Return leaves by the name of their wrapper, for wrappers that are not in wrappers.csv.

    Every function in wrappers.csv is named after its leaf, so wrappers of out-of-tree kernels, such
    as tdh_mem_sept_rd, are recognised by their names.  Their arguments are unknown unless a probe
    names them.
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
        0 or 1; None for a kernel that is not in kernels.csv.
    """
    row = _kernel(kernel)
    return None if row is None else int(row["level_base"] or 0)


def _release(kernel: str) -> tuple[int, int]:
    """Parse major and minor number of a kernel release; (0, 0) if it does not begin with them."""
    found = re.match(r"^(\d+)\.(\d+)", kernel)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _kernel(kernel: str) -> dict[str, str | None] | None:
    """Return the row of kernels.csv for ``kernel``; None if no row matches."""
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
