"""Charts: functions from data frames to Altair charts, with one theme."""

from __future__ import annotations

from typing import Final

MAX_MARKS: Final = 2000
"""Maximum marks of a chart, so that a page stays fast; the caption states what is left out."""
