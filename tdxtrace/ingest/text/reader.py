"""Text in blocks: the fast path for lines like those seen, the general one for the rest."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from tdxtrace.ingest.compiled import pays
from tdxtrace.ingest.raw import BoolArray, RawEvents, U64Array, concatenate
from tdxtrace.ingest.source import MAX_LINE_BYTES, Block, block_of
from tdxtrace.ingest.text import fast
from tdxtrace.ingest.text.bytewise import At, Text
from tdxtrace.ingest.text.fast import Met, Parsed
from tdxtrace.ingest.text.knowledge import Knowledge
from tdxtrace.ingest.text.lines import Line, LineReader, Quick, in_irq, to_raw
from tdxtrace.ingest.text.templates import template_of

if TYPE_CHECKING:
    from tdxtrace.ingest.text.looped import Desk, Packed

# Blocks of a file that are read and parsed ahead: decoding takes now longer, now less.
_AHEAD: Final = 3
# Of those that compiled loops parse, which are twice as large: 1, 2 and 3 of them took 2.4, 2.0
# and 2.1 s for 12 million lines.
_LARGE_AHEAD: Final = 2
# Threads that parse with compiled loops, which take twice as long as decoding.  With numpy
# a second gains nothing: it lets go of the interpreter while it computes, but not between
# its calls (tests/bench/ingest_text.py).
_PARSERS: Final = 2
# Lines that are read one by one before the fast path is asked again, so that one
# new event name does not send a whole block the slow way.
_LESSON: Final = 64
# Threads to know of, where an input never ends.
_MOST_THREADS: Final = 1 << 16
_NOT_ROWS: Final = ("noise", "unmapped")


@dataclass(slots=True)
class _Known:
    """What is known at one time, as a thread may use it while more is learned."""

    knowledge: Knowledge
    has_fields: BoolArray
    packed: Packed | None
    """The same as compiled loops take it, if they pay."""
    desks: list[Desk]
    """Memory that these work in."""

    def parse(self, block: Block) -> tuple[Text, Parsed]:
        """Read a block as far as it fits what is known."""
        made = self._looped(block, may_end_in_cr=True)
        return self.parse_text(_text_of(block)) if made is None else made

    def parse_text(self, text: Text) -> tuple[Text, Parsed]:
        """Read lines of a block that have no carriage return at their ends, or shall keep it."""
        made = self._looped(text.block, may_end_in_cr=False)
        return (text, fast.parse(text, self.knowledge, self.has_fields)) if made is None else made

    def _looped(self, block: Block, *, may_end_in_cr: bool) -> tuple[Text, Parsed] | None:
        if self.packed is None:
            return None
        from tdxtrace.ingest.text import looped  # noqa: PLC0415 - imports numba: see pays

        return looped.parse(block, self.packed, self.desks, may_end_in_cr=may_end_in_cr)


@dataclass(slots=True)
class _Block:
    """A block on its way through the fast path."""

    work: Future[tuple[Text, Parsed] | None]
    """None: there was no block."""
    lessons: int
    """How much was known when it was parsed."""


@dataclass(slots=True)
class TextReader:
    """Reads blocks of lines into raw events, in order, and counts the rest."""

    lines: LineReader
    size: int | None = None
    """Bytes of the input if it is a file: then its blocks are taken in a thread."""
    knowledge: Knowledge = field(default_factory=Knowledge)
    _lessons: int = 0
    _n_bytes: int = 0
    _known: _Known | None = None
    _desks: list[Desk] = field(default_factory=list)
    _keys: U64Array = field(default_factory=lambda: np.zeros(0, np.uint64))
    """Hashes of the threads and names that were noted."""

    def read(self, blocks: Iterator[Block]) -> Iterator[RawEvents]:
        """Yield the events of each block; blocks are parsed ahead in a thread."""
        n_parsers = n_ahead = 1
        if self.size:
            n_parsers, n_ahead = (_PARSERS, _LARGE_AHEAD) if pays(self.size) else (1, _AHEAD)
        with (
            ThreadPoolExecutor(1, "tdxtrace-lines") as taker,
            ThreadPoolExecutor(n_parsers, "tdxtrace-text") as parsers,
        ):
            ahead: deque[_Block] = deque()
            is_over = False
            while ahead or not is_over:
                while not is_over and len(ahead) <= n_ahead:
                    block = self._submit(taker, parsers, blocks)
                    is_over = block is None
                    ahead += [] if block is None else [block]
                if ahead:
                    block = ahead.popleft()
                    made = block.work.result()
                    is_over |= made is None
                    if made is not None:
                        yield self._finish(*made, block.lessons)

    def forget_threads(self) -> None:
        """Forget which threads were noted if they are many: they are noted again."""
        if len(self._keys) > _MOST_THREADS:
            self._keys = np.zeros(0, np.uint64)

    def _submit(
        self, taker: ThreadPoolExecutor, parsers: ThreadPoolExecutor, blocks: Iterator[Block]
    ) -> _Block | None:
        """Have a block parsed; None if there are no more."""
        known = self._now_known()
        if self.size:
            taken = taker.submit(next, blocks, None)
            return _Block(parsers.submit(_parse_taken, taken, known), self._lessons)
        block = next(blocks, None)
        return None if block is None else _Block(parsers.submit(known.parse, block), self._lessons)

    def _now_known(self) -> _Known:
        """What is known, as it was given to a thread before if nothing was learned since."""
        known, has_fields = self._known, self._has_fields()
        is_large = pays(max(self.size or 0, self._n_bytes))
        if (
            known is None
            or known.knowledge.version != self.knowledge.version
            or len(known.has_fields) != len(has_fields)
            or (known.packed is not None) != is_large
        ):
            knowledge = self.knowledge.copy()
            packed = _packed(knowledge, has_fields) if is_large else None
            known = self._known = _Known(knowledge, has_fields, packed, self._desks)
        return known

    def _has_fields(self) -> BoolArray:
        events = self.lines.registry.events
        return np.array([e.kind not in _NOT_ROWS for e in events] or [False], np.bool_)

    def _finish(self, text: Text, parsed: Parsed, lessons: int) -> RawEvents:
        """Read what the fast path left, learn from it, and put both in order."""
        first = self.lines.stats.n_lines + 1
        self.lines.stats.n_lines += len(text)
        self._n_bytes += len(text.block)
        while len(parsed.left) > _LESSON and (
            lessons < self._lessons or self._teach(text, parsed.left)
        ):
            lessons = self._lessons
            text, parsed = self._now_known().parse_text(text)
        slow = self._slowly(first, text, parsed)
        self._account(first, parsed)
        return _merged(first, parsed.events, slow)

    def _teach(self, text: Text, left: At) -> bool:
        """Learn from lines spread over what was left; return whether there was anything new."""
        some = left[np.unique(np.linspace(0, len(left) - 1, _LESSON).astype(np.intp))]
        learned = [self._learn(text.line(int(row))) for row in some]
        return any(learned)

    def _learn(self, line: bytes) -> bool:
        head = self.lines.head(line.decode("latin-1")) if len(line) <= MAX_LINE_BYTES else None
        if head is None or not head.event:
            return False
        registry = self.lines.registry
        index = registry.event_id(head.event, head.args)
        event = registry.events[index]
        if event.name != head.event:
            return False
        if event.kind in _NOT_ROWS and self.lines.may_be_probe(event.name):
            # Other lines of the name may be calls: the general path tells them apart.
            return False
        if event.kind == "noise" and head.args[:1] in ("", "("):
            return False  # maybe a probe's line, cut
        new = self.knowledge.learn_head(line, head.flags, in_irq(head.flags))
        new |= self.knowledge.learn_name(head.event.encode("latin-1") + b":", index)
        if event.kind not in _NOT_ROWS:
            fields = self.lines.understood(event, head.args)
            if fields is not None:
                make = partial(template_of, head.args, fields)
                new |= self.knowledge.learn_template(index, len(head.args) + 1, make)
        self.knowledge.learn_beginning(line, index, head.args_at)
        self._lessons += new
        return new

    def _slowly(self, first: int, text: Text, parsed: Parsed) -> RawEvents:
        """Read lines one by one, and let the stats hear of those of both paths in order."""
        found: list[Line] = []
        stats = self.lines.stats
        if not len(parsed.left) and parsed.heard is not None and not stats.has_open_gaps:
            for heard in parsed.heard:
                stats.extend_cpu_span(*heard)
            return to_raw(found)
        self.lines.quick = Quick(parsed.rows + first, parsed.cpu, parsed.ts_ns)
        for row in parsed.left.tolist():
            read = self.lines.line(first + row, text.line(row))
            if read is not None:
                found.append(read)
        self.lines.tell_seen()
        return to_raw(found)

    def _account(self, start: int, parsed: Parsed) -> None:
        """Count events by name and note threads, of lines that the fast path read."""
        stats, events = self.lines.stats, self.lines.registry.events
        for index, n, first in parsed.counts:
            event = events[index]
            if event.kind in _NOT_ROWS:
                stats.count(event.kind, event.name, start + first, n)
            else:
                stats.events[event.name] += n
        for digits in parsed.digits:
            self.lines.note_digits(digits)
        self._note_threads(parsed.met)

    def _note_threads(self, met: Met) -> None:
        # A thread that was met without its process is met again when that is known.
        key = met.keys()
        if len(self._keys):
            place = np.minimum(np.searchsorted(self._keys, key), len(self._keys) - 1)
            new = self._keys[place] != key
            key, met = key[new], met.take(new)
        new_keys, first = np.unique(key, return_index=True)
        if len(new_keys):
            self._keys = np.union1d(self._keys, new_keys)
        met = met.take(first)
        columns = met.tid.tolist(), met.tgid.tolist(), met.first.tolist(), met.second.tolist()
        for tid, tgid, *words in zip(*columns, strict=True):
            name = b"".join(word.to_bytes(8, "little") for word in words)
            comm = name.strip(b" \t").decode("utf-8", "replace")
            self.lines.stats.record_thread(tid, comm, tgid)


def _packed(knowledge: Knowledge, has_fields: BoolArray) -> Packed:
    from tdxtrace.ingest.text import looped  # noqa: PLC0415 - imports numba: see pays

    return looped.packed(knowledge, has_fields)


def _parse_taken(taken: Future[Block | None], known: _Known) -> tuple[Text, Parsed] | None:
    block = taken.result()
    return None if block is None else known.parse(block)


def _text_of(block: Block) -> Text:
    """The lines of a block, without carriage returns at their ends."""
    text = Text(block)
    if (text.data[text.ends - 1] == ord("\r")).any():
        text = Text(block_of([block.tobytes().replace(b"\r\n", b"\n")]))
    return text


def _merged(first: int, quick: RawEvents, slow: RawEvents) -> RawEvents:
    """Events of both paths in the order of their lines."""
    quick.line += first
    if not len(slow):
        return quick
    both = concatenate([quick, slow])
    order: NDArray[np.intp] = np.argsort(both.line, kind="stable")
    return both.take(order)
