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
        steps: One row per entry or page wanted, vCPU after vCPU, each in the order of time.
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
    rows = steps.with_columns(
        is_fault=is_fault, _first=begins_vcpu(), _moved=moved.shift().fill_null(False)
    )
    rows = rows.with_columns(
        _settled=_last_known(settled, since=pl.col("_first")),
        page=_last_known(pl.when("installs").then("gpa"), since=pl.col("_first")),
    )
    got_it = pl.col("is_fault") & (pl.col("_settled").shift() == 1).fill_null(False)
    rows = rows.with_columns(_ends=~pl.col("_first") & (pl.col("_moved") | got_it))
    # Runs that ended so far: those of the vCPU alone where its first row's number is taken off.
    ended = pl.col("_ends").cum_sum().cast(pl.Int64)
    before = pl.when("_first").then(ended).forward_fill()
    return rows.with_columns(
        run=(pl.col("_first") | pl.col("_ends")).cum_sum(), whole=ended > before
    ).drop("_first", "_moved", "_settled", "_ends")


def begins_vcpu() -> pl.Expr:
    """Whether a row is the first of its vCPU, where those of each follow each other."""
    changes = [pl.col(name).ne_missing(pl.col(name).shift()) for name in _VCPU]
    return pl.any_horizontal(*changes, pl.int_range(pl.len()) == 0)


def _last_known(value: pl.Expr, since: pl.Expr) -> pl.Expr:
    """The last value that is not null, up to each row, from the last row with ``since`` on."""
    place = pl.int_range(pl.len())
    known = pl.when(value.is_not_null()).then(place).forward_fill()
    first = pl.when(since).then(place).forward_fill()
    return pl.when(known >= first).then(value.forward_fill())
