"""Histograms from a pipe: counts that grow from print to print."""

from __future__ import annotations

from dataclasses import dataclass

from tdxtrace.ingest.histogram import Counts, Histogram, HistogramReader


@dataclass(frozen=True, slots=True)
class CountTick:
    """Counts since the histogram began."""

    histogram: Histogram
    """Statuses, times, and what could not be counted; its table holds the last interval only."""
    requests: Counts
    """Requests by process, leaf, outcome and attempts: keys of the map ``@requests``."""


class CountTicker:
    """Reader of the prints of a histogram; of earlier prints nothing is kept."""

    def __init__(self, shown: str) -> None:
        """Start; error messages name the input ``shown``."""
        self._reader = HistogramReader(shown)

    def tick(self, text: bytes) -> CountTick:
        """Read complete lines and return the newest counts.

        Raises:
            FormatError: If a line is damaged.
        """
        for line in text.splitlines(keepends=True):
            self._reader.read_line(line)
        del self._reader.prints[:-1]
        requests = self._reader.prints[-1][1] if self._reader.prints else {}
        return CountTick(self._reader.result(), requests)
