"""Identity of a request: the operands that identify it, and which of them were captured."""

from __future__ import annotations

from functools import cache
from typing import Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tdxtrace.analysis.loops.linking import BY_PAGE, BY_TD, GPA, LEVEL, PAGE, TD, VP
from tdxtrace.tables.findings import IDENTITIES
from tdxtrace.tdx import leaves

_N_LEAVES: Final = 1 << 16
# Operands that identify a request, by request kind in the leaf table.  A level also distinguishes
# requests for one page, but an uncaptured level is implied.
_IDENTIFIED_BY: Final = {"gpa": TD | GPA, "td": TD, "vcpu": VP, "page": PAGE}
U16 = NDArray[np.uint16]
U8 = NDArray[np.uint8]


@cache
def identifying_operands() -> U16:
    """Return for each leaf the operands that identify its requests, as bits."""
    found = _whole_identity().copy()
    found[leaves_of_kind("gpa")] |= LEVEL
    return found


@cache
def second_callers() -> U8:
    """Return for each leaf how another thread can make the same request: BY_PAGE, BY_TD or 0.

    A second thread can request the same page and level of a TD, or the same TD.  It cannot request
    the same vCPU, which one thread runs, nor a reclaimed or written-back page, which has one owner.
    """
    found = np.zeros(_N_LEAVES, np.uint8)
    found[leaves_of_kind("gpa")] = BY_PAGE
    found[leaves_of_kind("td")] = BY_TD
    return found


def identity(leaf: U16, flags: U16) -> pl.Series:
    """Return what identified the attempts: the whole request, a part of it, or only the thread.

    Args:
        leaf: Leaf of each chain.
        flags: Operands recorded in the first call of each chain, as bits.
    """
    whole = _whole_identity()[leaf]
    found = np.full(len(leaf), IDENTITIES.index("thread"), np.uint8)
    of_page = second_callers()[leaf] == BY_PAGE
    found[of_page & (flags & TD != 0)] = IDENTITIES.index("td")
    found[of_page & (flags & GPA != 0)] = IDENTITIES.index("gpa")
    found[whole & ~flags == 0] = IDENTITIES.index("request")
    return pl.Series(found).cat.to(pl.Enum(IDENTITIES))


@cache
def _whole_identity() -> U16:
    found = np.zeros(_N_LEAVES, np.uint16)
    for kind, operands in _IDENTIFIED_BY.items():
        found[leaves_of_kind(kind)] = operands
    return found


@cache
def leaves_of_kind(kind: str) -> list[int]:
    """Return the numbers of the leaves with this request kind in the leaf table."""
    table = leaves.leaf_table()
    return table.filter(pl.col("request") == kind)["leaf"].to_list()
