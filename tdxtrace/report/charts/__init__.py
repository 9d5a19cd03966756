"""Charts: a frame in, an Altair chart out; one theme, a few thousand marks at most."""

from __future__ import annotations

from typing import Final

MAX_MARKS: Final = 2000
"""Most marks of one chart: more make a page slow and a picture grey; the rest is summed up."""
