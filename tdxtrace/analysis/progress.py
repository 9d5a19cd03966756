"""Whether a vCPU moved on between two entries, as far as a trace can show."""

from __future__ import annotations

from typing import Final

import polars as pl

from tdxtrace.tdx.exit_reasons import exit_reason_number

_EPT_VIOLATION: Final = exit_reason_number("EPT_VIOLATION") or 0
_NOT_ENTERED: Final = 0xFFFF_FFFF  # kvm_exit's reason -1, see zero_steps
_VCPU: Final = ("source", "tid")


def no_progress_run(steps: pl.DataFrame, standing: list[int]) -> pl.DataFrame:
    """Number the runs of steps in which a vCPU gave no sign of progress.

    A run ends at an exit that only an executed instruction makes, and where the
    vCPU faults again after the page it asked for was installed: then it asks for
    another one, so the guest got past the first.

    Args:
        steps: One row per entry or page wanted, ordered within each vCPU by time.
        standing: Exit reasons that a vCPU can make without executing anything.

    Returns:
        The same rows with ``run`` (unique over the table), ``is_fault`` (an EPT
        violation), ``page`` (the page that was wanted last) and ``whole`` (the run
        does not begin where the vCPU's record does).
    """
    moved = pl.col("reason").is_not_null() & ~pl.col("reason").is_in([*standing, _NOT_ENTERED])
    is_fault = (pl.col("reason") == _EPT_VIOLATION).fill_null(False)
    # What the vCPU was last seen to want: still missing (0) or there by now (1).
    settled = pl.when(is_fault).then(0).when("installs").then(pl.col("installed").cast(pl.Int32))
    got_it = is_fault & (settled.forward_fill().shift().over(_VCPU) == 1).fill_null(False)
    first = pl.int_range(pl.len()).over(_VCPU) == 0
    ends = moved.shift().over(_VCPU).fill_null(False) | got_it
    return steps.with_columns(
        run=(first | ends).cum_sum(),
        is_fault=is_fault,
        page=pl.when("installs").then("gpa").forward_fill().over(_VCPU),
        whole=ends.cum_max().over(_VCPU),
    )
