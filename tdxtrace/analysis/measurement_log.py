"""The ``measurement_log`` table: the calls that built each TD's MRTD, in order."""

from __future__ import annotations

from typing import Final

import polars as pl

from tdxtrace.analysis.threads import infer_td
from tdxtrace.tables.builds import MEASUREMENT_LOG
from tdxtrace.tables.events import SEAMCALLS
from tdxtrace.tdx import word
from tdxtrace.tdx.leaves import numbers_of, parse_leaf

# The leaves that update TDCS.MRTD: Intel TDX module base architecture specification, "TD
# measurement"; intel/tdx-module 1.5.01 src/vmm_dispatcher/api_calls/tdh_mng_init.c,
# tdh_mem_page_add.c, tdh_mr_extend.c, tdh_mr_finalize.c.
_MEASURED: Final = ("TDH.MNG.INIT", "TDH.MEM.PAGE.ADD", "TDH.MR.EXTEND", "TDH.MR.FINALIZE")
_INIT: Final = parse_leaf("TDH.MNG.INIT")[0]
_BUILD: Final = ("source", "td_id", "build")


def measurement_log(seamcalls: pl.DataFrame) -> pl.DataFrame:
    """Return the measured calls, each with its position in its TD's build.

    A failed call measured nothing and is omitted; a call without a recorded return is kept
    with a null status.  The TD is that of the call, else the only one of its thread, process or
    input.  Calls of one TD are ordered by their ends: the module runs them one after the
    other (each locks the TD's OP_STATE or its measurement exclusively).  Absence: a leaf that was
    not probed is not in the log, but may have been called.

    Args:
        seamcalls: The ``seamcalls`` table.

    Returns:
        The ``measurement_log`` table, by source, TD, build and number.

    Raises:
        TableError: If an argument lacks a column or has one of another type.

    Example:
        >>> from tdxtrace.tables.events import SEAMCALLS
        >>> measurement_log(SEAMCALLS.empty()).height
        0
    """
    calls = SEAMCALLS.conform(seamcalls)
    own = calls.filter(
        pl.col("leaf").is_in(numbers_of(list(_MEASURED))),
        word.is_success(pl.col("status")).fill_null(True),
    )
    rows = (
        infer_td(own, calls)
        .with_columns(ts_ns=pl.coalesce("end_ns", "start_ns"))
        .sort("source", "td_id", "ts_ns", "seq")
        .with_columns(
            build=(pl.col("leaf") == _INIT).cum_sum().over("source", "td_id").cast(pl.UInt32)
        )
        .with_columns(number=pl.int_range(1, pl.len() + 1, dtype=pl.UInt32).over(_BUILD))
    )
    return MEASUREMENT_LOG.conform(rows)
