"""Chart of the runs of faults that exceed each zero-step threshold."""

from __future__ import annotations

from typing import TYPE_CHECKING

import polars as pl

from tdxtrace.report.charts.theme import light, themed
from tdxtrace.report.units import count
from tdxtrace.tdx.exit_reasons import STEPPING_EPF_THRESHOLD

if TYPE_CHECKING:
    import altair as alt


def runs_above(step_thresholds: pl.DataFrame) -> alt.Chart | alt.LayerChart:
    """Draw the number of runs that exceed each threshold, the module's threshold darker."""
    import altair as alt  # noqa: PLC0415

    rows = threshold_rows(step_thresholds).select(
        threshold=pl.col("threshold").cast(pl.String),
        n="n_runs",
        own=pl.when(pl.col("threshold") == STEPPING_EPF_THRESHOLD).then(0.95).otherwise(0.45),
        **{
            "runs above": pl.col("n_runs").map_elements(count, return_dtype=pl.String),
            "faults above": pl.col("n_faults").map_elements(count, return_dtype=pl.String),
            "vCPUs": pl.col("n_vcpus").map_elements(count, return_dtype=pl.String),
        },
    )
    names = rows["threshold"].to_list()
    base = alt.Chart(rows).encode(
        alt.X("threshold:N", title="threshold", sort=names, axis=alt.Axis(labelAngle=0)),
        alt.Y("n:Q", title="runs above", axis=alt.Axis(format="~s", tickCount=4)),
        opacity=alt.Opacity("own:Q", scale=None),
        tooltip=["threshold", "runs above", "faults above", "vCPUs"],
    )
    return themed(base.mark_bar(color=light("purple")), height=140)


def threshold_rows(step_thresholds: pl.DataFrame) -> pl.DataFrame:
    """Return threshold, n_runs, n_faults, n_vcpus and max_run over all sources, lowest first."""
    return (
        step_thresholds.group_by("threshold")
        .agg(pl.col("n_runs", "n_faults").sum(), pl.col("n_vcpus").sum(), pl.col("max_run").max())
        .sort("threshold")
    )
