"""Text in blocks: the fast path for lines like those seen, the general one for the rest."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tdxtrace.ingest.raw import BoolArray, RawEvents, U64Array, concatenate
from tdxtrace.ingest.stream import MAX_LINE_BYTES, Block, block_of
from tdxtrace.ingest.text import fast
from tdxtrace.ingest.text.bytewise import At, Text
from tdxtrace.ingest.text.fast import Parsed
from tdxtrace.ingest.text.knowledge import Knowledge
from tdxtrace.ingest.text.lines import Line, LineReader, Quick, in_irq, to_raw
from tdxtrace.ingest.text.templates import template_of

# Blocks parsed while others are decoded.  numpy lets go of the interpreter while it
# computes, but not between its calls: a second thread gained nothing
# (tests/bench/ingest_text.py).
_WORKERS: Final = 1
# Lines that are read one by one before the fast path is asked again, so that one
# new event name does not send a whole block the slow way.
_LESSON: Final = 64
_ODD: Final = np.uint64(0x9E3779B97F4A7C15)
# Threads to know of, where an input never ends.
_MOST_THREADS: Final = 1 << 16
_NOT_ROWS: Final = ("noise", "unmapped")


@dataclass(slots=True)
class _Block:
    """A block on its way through the fast path."""

    work: Future[tuple[Text, Parsed, At]]
    lessons: int
    """How much was known when it was parsed."""


@dataclass(slots=True)
class TextReader:
    """Reads blocks of lines into raw events, in order, and counts the rest."""

    lines: LineReader
    knowledge: Knowledge = field(default_factory=Knowledge)
    _lessons: int = 0
    _keys: U64Array = field(default_factory=lambda: np.zeros(0, np.uint64))
    """Hashes of the threads and names that were noted."""

    def read(self, blocks: Iterator[Block]) -> Iterator[RawEvents]:
        """Yield the events of each block; blocks are parsed ahead in threads."""
        with ThreadPoolExecutor(_WORKERS, "tdxtrace-text") as pool:
            ahead: list[_Block] = []
            for block in blocks:
                ahead.append(self._submit(pool, block))
                if len(ahead) > _WORKERS:
                    yield self._finish(ahead.pop(0))
            for waiting in ahead:
                yield self._finish(waiting)

    def forget_threads(self) -> None:
        """Forget which threads were noted if they are many: they are noted again."""
        if len(self._keys) > _MOST_THREADS:
            self._keys = np.zeros(0, np.uint64)

    def _submit(self, pool: ThreadPoolExecutor, block: Block) -> _Block:
        work = pool.submit(_parse, block, self.knowledge.copy(), self._has_fields())
        return _Block(work, self._lessons)

    def _has_fields(self) -> BoolArray:
        events = self.lines.vocabulary.events
        return np.array([e.kind not in _NOT_ROWS for e in events] or [False], np.bool_)

    def _finish(self, block: _Block) -> RawEvents:
        """Read what the fast path left, learn from it, and put both in order."""
        text, parsed, left = block.work.result()
        first = self.lines.tally.n_lines + 1
        self.lines.tally.n_lines += len(text)
        while len(left) > _LESSON and (block.lessons < self._lessons or self._teach(text, left)):
            block.lessons = self._lessons
            parsed, left = fast.parse(text, self.knowledge, self._has_fields())
        slow = self._slowly(first, text, parsed, left)
        self._account(first, parsed)
        return _merged(first, parsed.events, slow)

    def _teach(self, text: Text, left: At) -> bool:
        """Learn from lines spread over what was left; return whether there was anything new."""
        some = left[np.unique(np.linspace(0, len(left) - 1, _LESSON).astype(np.intp))]
        learned = [self._learn(text.line(int(row))) for row in some]
        return any(learned)

    def _learn(self, line: bytes) -> bool:
        head = self.lines.head(line.decode("latin-1"))
        if head is None or not head.event:
            return False
        vocabulary = self.lines.vocabulary
        index = vocabulary.index_of(head.event, head.args)
        event = vocabulary.events[index]
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

    def _slowly(self, first: int, text: Text, parsed: Parsed, left: At) -> RawEvents:
        """Read lines one by one, and let the tally hear of those of both paths in order."""
        found: list[Line] = []
        self.lines.quick = Quick(parsed.rows + first, parsed.cpu, parsed.ts_ns)
        for row in left.tolist():
            line = text.line(row)
            whole = line if len(line) <= MAX_LINE_BYTES else line[:80]
            read = self.lines.line(first + row, whole)
            if read is not None:
                found.append(read)
        self.lines.tell_seen()
        return to_raw(found)

    def _account(self, start: int, parsed: Parsed) -> None:
        """Count events by name and note threads, of lines that the fast path read."""
        tally, events = self.lines.tally, self.lines.vocabulary.events
        counts = np.bincount(parsed.event, minlength=len(events))
        for index in np.flatnonzero(counts).tolist():
            event, n = events[index], int(counts[index])
            if event.kind in _NOT_ROWS:
                first = int(parsed.rows[np.argmax(parsed.event == index)])
                tally.count(event.kind, event.name, start + first, n)
            else:
                tally.events[event.name] += n
        for digits in parsed.digits:
            self.lines.note_digits(digits)
        self._note_threads(parsed)

    def _note_threads(self, parsed: Parsed) -> None:
        raw = parsed.events
        if not len(raw):
            return
        # A thread that was met without its process is met again when that is known.
        tids = raw.tid.astype(np.uint64) ^ (raw.tgid.astype(np.uint64) << np.uint64(32))
        key = parsed.comm[0] ^ (parsed.comm[1] * _ODD) ^ tids
        # The same thread often comes again on the next line.
        changed = np.concatenate([[0], np.flatnonzero(key[1:] != key[:-1]) + 1])
        if len(self._keys):
            place = np.minimum(np.searchsorted(self._keys, key[changed]), len(self._keys) - 1)
            changed = changed[self._keys[place] != key[changed]]
        new, first = np.unique(key[changed], return_index=True)
        self._keys = np.union1d(self._keys, new)
        for at in changed[first].tolist():
            words = int(parsed.comm[0][at]), int(parsed.comm[1][at])
            tid, tgid = int(raw.tid[at]), int(raw.tgid[at])
            name = b"".join(word.to_bytes(8, "little") for word in words)
            comm = name.strip(b" \t").decode("utf-8", "replace")
            self.lines.tally.meet(tid, comm, tgid)


def _parse(block: Block, knowledge: Knowledge, has_fields: BoolArray) -> tuple[Text, Parsed, At]:
    text = Text(block)
    if (text.data[text.ends - 1] == ord("\r")).any():
        text = Text(block_of([block.tobytes().replace(b"\r\n", b"\n")]))
    return text, *fast.parse(text, knowledge, has_fields)


def _merged(first: int, quick: RawEvents, slow: RawEvents) -> RawEvents:
    """Events of both paths in the order of their lines."""
    quick.line = quick.line + first
    if not len(slow):
        return quick
    both = concatenate([quick, slow])
    order: NDArray[np.intp] = np.argsort(both.line, kind="stable")
    return both.take(order)
