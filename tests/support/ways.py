"""The ways in which text is read, to compare them: line by line, with numpy, with loops."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from tdxtrace.ingest import compiled
from tdxtrace.ingest.events.registry import EventRegistry
from tdxtrace.ingest.raw import RawEvents, concatenate
from tdxtrace.ingest.source import Block, block_of
from tdxtrace.ingest.stats import SourceStats
from tdxtrace.ingest.text.lines import LineReader, to_raw
from tdxtrace.ingest.text.reader import TextReader


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

    Of a probe whose function is unknown the fast path reads no more than the name: a line
    of it that is cut is ``unmapped`` there, ``noise`` for the general path.
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


def columns(raw: RawEvents, names: list[str]) -> dict[str, Any]:
    """The columns of events, with None where a field was not seen."""
    found: dict[str, Any] = {
        name: getattr(raw, name).tolist() for name in ("line", "ts_ns", "tid", "tgid", "cpu")
    }
    found["in_irq"] = raw.in_irq.tolist()
    found["event"] = [names[i] for i in raw.event.tolist()]
    for slot in sorted(raw.values):
        there = raw.has(slot)
        if there.any():
            words = zip(raw.value(slot).tolist(), there.tolist(), strict=True)
            found[slot] = [word if seen else None for word, seen in words]
    return found


def _made(raw: RawEvents, reader: LineReader) -> Made:
    names = [event.name for event in reader.registry.events]
    clock = reader.resolution_ns, reader.has_integer_clock
    entries = {key: (e.line_no, e.n_lines) for key, e in reader.stats.entries.items()}
    told = account(reader.stats)
    return Made(columns(raw, names), told, clock, sorted(set(names)), entries)


def by_line(lines: Sequence[bytes], form: str) -> Made:
    """What the general path makes of the lines, one after the other."""
    reader = LineReader(form, EventRegistry(), SourceStats())
    found = [line for n, text in enumerate(lines, 1) if (line := reader.line(n, text)) is not None]
    reader.tell_seen()
    return _made(to_raw(found), reader)


def by_block(
    lines: Sequence[bytes], form: str, sizes: Sequence[int], *, is_large: bool = False
) -> Made:
    """What the fast path makes of them, in blocks of so many lines.

    Args:
        lines: Without their newlines.
        form: The format.
        sizes: Lines of each block, in turn.
        is_large: Whether it does so with compiled loops.
    """

    def blocks() -> Iterator[Block]:
        at, turn = 0, 0
        while at < len(lines):
            size = sizes[turn % len(sizes)]
            yield block_of([b"\n".join(lines[at : at + size]), b"\n"])
            at, turn = at + size, turn + 1

    reader = LineReader(form, EventRegistry(), SourceStats())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "LARGE_BYTES", 0 if is_large else 1 << 60)
        raw = concatenate(list(TextReader(reader).read(blocks()))).settled()
    assert reader.stats.n_lines == len(lines)
    for slot, value in raw.values.items():
        assert not value[~raw.has(slot)].any()
    return _made(raw, reader)


def both_fast(lines: Sequence[bytes], form: str, sizes: Sequence[int] = (200,)) -> Made:
    """Read lines with numpy and with compiled loops, which must give the same."""
    quick = by_block(lines, form, sizes)
    looped = by_block(lines, form, sizes, is_large=True)
    assert looped == quick
    assert looped.entries == quick.entries
    return quick


def same(lines: Sequence[bytes], form: str, sizes: Sequence[int] = (200,)) -> None:
    """All three ways must give the same."""
    slow, quick = by_line(lines, form), both_fast(lines, form, sizes)
    for slot in slow.columns.keys() | quick.columns.keys():
        one, other = slow.columns.get(slot), quick.columns.get(slot)
        if one != other:
            assert one is not None, slot
            assert other is not None, slot
            at = next(i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)
            number = slow.columns["line"][at]
            assert (slot, lines[number - 1], one[at]) == (slot, lines[number - 1], other[at])
    assert slow == quick
