"""Output of analyze, attempts, policies and recommend for a histogram instead of a recording."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tdxtrace.errors import QueryError

if TYPE_CHECKING:
    from tdxtrace.cli.query_options import PrintOptions, QueryOptions
    from tdxtrace.ingest.histogram import Histogram

_FIXED: Final = re.compile(r"fixed-\d{1,7}", re.ASCII)


def histogram_of(query: QueryOptions) -> Histogram | None:
    """Return the histogram if it is the only input; None: the inputs are recordings.

    Raises:
        TdxtraceError: If it cannot be read, or is combined with other inputs or a selection.
    """
    from tdxtrace.ingest.histogram import is_histogram, read_histogram

    paths = [Path(path) for path in query.traces if str(path) != "-"]
    if not any(is_histogram(path) for path in paths):
        return None
    if len(query.inputs) > 2 or len(paths) > 1:
        raise QueryError("a histogram must be the only input: its counts have no source")
    if query.selection.to_dict():
        raise QueryError("a histogram has no single calls to select; omit --vm and --since")
    return read_histogram(paths[0])


def show_histogram(found: Histogram, query: QueryOptions, printing: PrintOptions) -> None:
    """Print the requests of a histogram, as text, or as the table ``request_counts``."""
    from tdxtrace.cli.options import OutputFormat
    from tdxtrace.recommend.counted import counted_attempts
    from tdxtrace.report.histogram_text import HistogramFacts, histogram_text

    if printing.form is not OutputFormat.table:
        printing.show(found.requests, query)
        return
    length = found.last_ns - found.first_ns
    about = HistogramFacts(found.kernel, length, found.cannot, found.n_not_kept, found.is_whole)
    text = histogram_text(found.requests, counted_attempts(found.requests), about)
    printing.write_text(text, query)


def show_counted(found: Histogram, query: QueryOptions, printing: PrintOptions) -> None:
    """Print the table ``counted_attempts``: the share of requests that exceed each limit."""
    from tdxtrace.recommend.counted import counted_attempts

    printing.show(counted_attempts(found.requests), query)


def show_policies(
    found: Histogram, query: QueryOptions, printing: PrintOptions, names: Sequence[str]
) -> None:
    """Print the outcome of policies with a fixed number of attempts."""
    from tdxtrace.recommend.counted import counted_attempts
    from tdxtrace.tables.attempt_cells import EXACT_LIMITS

    numbers = [int(name.removeprefix("fixed-")) for name in names if _FIXED.fullmatch(name)]
    supported = sorted({n for n in numbers if n in EXACT_LIMITS})
    left_out = [name for name in names if name not in {f"fixed-{n}" for n in supported}]
    if left_out:
        query.notify(f"these policies need single calls, not a histogram: {', '.join(left_out)}")
    if not supported:
        raise QueryError("a histogram supports fixed-1 to fixed-64, fixed-127, fixed-255, ...")
    printing.show(counted_attempts(found.requests, supported), query)


def show_limits(
    found: Histogram, query: QueryOptions, printing: PrintOptions, target: float | None
) -> None:
    """Print the smallest limit of each leaf that at most a share ``target`` of requests exceeds.

    None: the default share of :class:`Target`.
    """
    from tdxtrace.cli.options import OutputFormat
    from tdxtrace.recommend.counted import counted_attempts
    from tdxtrace.recommend.target import Target
    from tdxtrace.report.histogram_text import limit_lines

    table = counted_attempts(found.requests)
    if printing.form is not OutputFormat.table:
        printing.show(table, query)
        return
    printing.write_text(limit_lines(table, Target().ratio if target is None else target), query)
