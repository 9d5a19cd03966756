"""Threshold of the TDX module's zero-step mitigation."""

from __future__ import annotations

from typing import Final

# Counted EPT violations at one RIP before the module logs pages, from the next one
# on: STEPPING_EPF_THRESHOLD, TDX module 1.0.00 to 1.5.25, td_exit_stepping.h.
STEPPING_EPF_THRESHOLD: Final = 6
