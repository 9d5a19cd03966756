"""Axes that several charts have: durations with their unit, shares in percent."""

from __future__ import annotations

from typing import Any, Final

# Labels of an axis of nanoseconds; "u" for micro, as in the tables.
_DURATION_LABELS: Final = (
    "datum.value < 1e3 ? format(datum.value, '~g') + ' ns' : "
    "datum.value < 1e6 ? format(datum.value / 1e3, '~g') + ' us' : "
    "datum.value < 1e9 ? format(datum.value / 1e6, '~g') + ' ms' : "
    "format(datum.value / 1e9, '~g') + ' s'"
)


def durations(low: float, high: float, **more: Any) -> dict[str, Any]:  # noqa: ANN401
    """Return an axis of nanoseconds on a logarithmic scale, with a label at each power of ten."""
    return {
        "values": powers(low, high),
        "labelExpr": _DURATION_LABELS,
        "labelOverlap": "greedy",
        **more,
    }


# Labels of an axis of seconds: 5ms, 1.2s; "u" for micro.
_SECONDS_LABELS: Final = "replace(format(datum.value, '~s'), 'µ', 'u') + 's'"


def time() -> dict[str, Any]:
    """Return an axis of seconds, with as many labels as there is room for."""
    return {
        "labelExpr": _SECONDS_LABELS,
        "tickCount": {"expr": "width / 90"},
        "labelOverlap": "greedy",
    }


def counts(high: float) -> list[int]:
    """Return 1, 2, 5, 10, 20, ... to beyond ``high``, for a logarithmic axis of counts."""
    return [step * power for power in powers(1, high) for step in (1, 2, 5)]


def powers(low: float, high: float) -> list[int]:
    """Return the powers of ten from below ``low`` to above ``high``."""
    powers_: list[int] = [1]
    while powers_[-1] < high:
        powers_.append(powers_[-1] * 10)
    return [p for p in powers_ if p * 10 > low]
