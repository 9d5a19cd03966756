"""The two ways of reading text, to compare them: line by line, and in the loop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tdxtrace.compiler import Runner, compiled
from tdxtrace.ingest.batch import SLOTS, RecordBatch, concatenate
from tdxtrace.ingest.events.registry import EventRegistry
from tdxtrace.ingest.source import Block, block_of
from tdxtrace.ingest.stats import SourceStats
from tdxtrace.ingest.text.reader import LineReader, TextReader, to_batch


@dataclass(frozen=True)
class Made:
    """All that was made of some lines."""

    columns: dict[str, Any]
    account: dict[str, Any]
    clock: tuple[int, bool]
    names: list[str]
    entries: dict[tuple[str, str], tuple[int | None, int]] = field(compare=False)
    """What the account merges."""


def account(stats: SourceStats) -> dict[str, Any]:
    """All that a stats holds, so that two can be compared.

    Of a probe whose function is unknown the loop reads no more than the name: a line
    of it that is cut is ``unmapped`` there, ``noise`` for the line-at-a-time reader.
    """
    entries: dict[tuple[str, str], tuple[int, int]] = {}
    for (kind, detail), e in stats.entries.items():
        key = "passed over" if kind in ("noise", "unmapped") else kind, detail
        line_no, n = entries.get(key, (e.line_no, 0))
        assert e.line_no is not None
        assert line_no is not None
        entries[key] = min(line_no, e.line_no), n + e.n_lines
    return {
        "headers": stats.n_headers,
        "events": dict(stats.events),
        "entries": entries,
        "gaps": [(g.line_no, g.cpu, g.start_ns, g.end_ns, g.n_events) for g in stats.gaps],
        "threads": stats.threads,
        "cpus": stats.cpus(),
        "times": [(int(stats.first_ns[c]), int(stats.last_ns[c])) for c in stats.cpus()],
        "span": stats.span(),
    }


def columns(batch: RecordBatch, names: list[str]) -> dict[str, Any]:
    """The columns of events, with None where a field was not seen."""
    found: dict[str, Any] = {
        name: getattr(batch, name).tolist() for name in ("line", "ts_ns", "tid", "tgid", "cpu")
    }
    found["in_irq"] = batch.in_irq.tolist()
    found["event"] = [names[i] for i in batch.event.tolist()]
    for slot in SLOTS:
        value, there = batch.get(slot)
        if there.any():
            words = zip(value.tolist(), there.tolist(), strict=True)
            found[slot] = [word if seen else None for word, seen in words]
    return found


def _made(batch: RecordBatch, reader: LineReader) -> Made:
    names = [event.name for event in reader.registry.events]
    clock = reader.resolution_ns, reader.has_integer_clock
    entries = {key: (e.line_no, e.n_lines) for key, e in reader.stats.entries.items()}
    names_known = account(reader.stats)
    return Made(columns(batch, names), names_known, clock, sorted(set(names)), entries)


def by_line(lines: Sequence[bytes], form: str) -> Made:
    """What the line-at-a-time reader makes of the lines."""
    reader = LineReader(form, EventRegistry(), SourceStats())
    found = [line for n, text in enumerate(lines, 1) if (line := reader.line(n, text)) is not None]
    reader.flush_timestamps()
    return _made(to_batch(found, reader.layouts), reader)


def blocks_of(lines: Sequence[bytes], sizes: Sequence[int]) -> Iterator[Block]:
    """Blocks of so many lines, in turn; lines come without their newlines."""
    at, turn = 0, 0
    while at < len(lines):
        size = sizes[turn % len(sizes)]
        yield block_of([b"\n".join(lines[at : at + size]), b"\n"])
        at, turn = at + size, turn + 1


def by_block(
    lines: Sequence[bytes], form: str, sizes: Sequence[int], run: Runner[Any] = compiled
) -> Made:
    """What is made of them in blocks of so many lines; ``interpreted``: one line at a time."""
    reader = LineReader(form, EventRegistry(), SourceStats())
    batches = list(TextReader(reader).batches(blocks_of(lines, sizes), run))
    assert reader.stats.n_lines == len(lines)
    return _made(concatenate(batches), reader)


def same(lines: Sequence[bytes], form: str, sizes: Sequence[int] = (200,)) -> None:
    """Both ways must give the same."""
    by_lines, from_loop = by_line(lines, form), by_block(lines, form, sizes)
    for slot in by_lines.columns.keys() | from_loop.columns.keys():
        one, other = by_lines.columns.get(slot), from_loop.columns.get(slot)
        if one != other:
            assert one is not None, slot
            assert other is not None, slot
            at = next(i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)
            number = by_lines.columns["line"][at]
            assert (slot, lines[number - 1], one[at]) == (slot, lines[number - 1], other[at])
    assert by_lines == from_loop
