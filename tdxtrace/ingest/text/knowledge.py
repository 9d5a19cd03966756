"""What the general path has taught the fast one: layouts, names, shapes of events."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tdxtrace.ingest.raw import BoolArray, I32Array, U64Array
from tdxtrace.ingest.text import bytewise
from tdxtrace.ingest.text.bytewise import At, Text, Words
from tdxtrace.ingest.text.layouts import Layout, layout_of
from tdxtrace.ingest.text.templates import Template

# Length of an event's name with its group and colon: the kernel allows 64 bytes for
# each (MAX_EVENT_NAME_LEN, Linux kernel/trace/trace.h), recipes use far less.
_NAME_WORDS: Final = 6
# Layouts and shapes that are tried on every line; a capture has a few.
_MAX_LAYOUTS: Final = 8
_MAX_TEMPLATES: Final = 32
# Of them, those that hold addresses as they were: more, and the addresses do change.
_MAX_NARROW: Final = 12
_MAX_NAMES: Final = 4096
# First bytes of an event's text by which it is recognised, and how many such are kept: a
# name, and after it what is the same in many lines, as the address of a function.
_BEGIN_WORDS: Final = 4
_MAX_BEGINNINGS: Final = 256
_MIX: Final = np.uint64(0x9E3779B97F4A7C15)  # 2^64 divided by the golden ratio: Knuth, TAOCP 6.4
_8: Final = np.uint64(8)


@dataclass(slots=True)
class Knowledge:
    """Learned from lines that the general path has read; grows while reading."""

    layouts: list[Layout] = field(default_factory=list)
    templates: dict[tuple[int, int], list[Template]] = field(default_factory=dict)
    """For each event and length of its arguments, their shapes."""
    flags: dict[int, int] = field(default_factory=dict)
    """Flag characters as a word: whether they mean hard interrupt context."""
    names: dict[int, int] = field(default_factory=dict)
    """Hash of a name: the event's place in the registry."""
    spellings: dict[int, bytes] = field(default_factory=dict)
    """The name behind each hash, so that two names cannot pass for one."""

    beginnings: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Hash of the first bytes of an event's text: the event, and where its arguments begin."""
    version: int = 0
    """Counts what was learned."""

    def copy(self) -> Knowledge:
        """What is known now: a thread may use it while more is learned."""
        return Knowledge(
            list(self.layouts),
            {key: list(shapes) for key, shapes in self.templates.items()},
            dict(self.flags),
            dict(self.names),
            self.spellings,
            dict(self.beginnings),
            self.version,
        )

    def learn_head(self, line: bytes, flags: str, in_irq: int) -> bool:
        """Learn the head of a line; return whether anything was new."""
        layout = layout_of(line)
        if layout is None or len(self.layouts) >= _MAX_LAYOUTS:
            return False
        word = int.from_bytes(flags.encode("latin-1"), "little")
        new = layout not in self.layouts or word not in self.flags
        if layout not in self.layouts:
            self.layouts.append(layout)
        self.flags[word] = in_irq
        self.version += new
        return new

    def learn_name(self, token: bytes, event: int) -> bool:
        """Learn which event a name (with its colon) is; return whether it was new."""
        if len(token) >= 8 * _NAME_WORDS or len(self.names) >= _MAX_NAMES:
            return False
        key = _hash_of(token)
        if self.spellings.setdefault(key, token) != token or key in self.names:
            return False
        self.names[key] = event
        self.version += 1
        return True

    def learn_beginning(self, line: bytes, event: int, args_at: int) -> None:
        """Learn how the text of an event begins, if its arguments are reached by then."""
        layout = layout_of(line)
        if layout is None or len(self.beginnings) >= _MAX_BEGINNINGS:
            return
        text = line[layout.event :][: 8 * _BEGIN_WORDS]
        if args_at - layout.event < len(text) == 8 * _BEGIN_WORDS:
            words = np.frombuffer(text, "<u8").reshape(-1, 1)
            self.beginnings.setdefault(int(_begin(words)[0]), (event, args_at - layout.event))
            self.version += 1

    def learn_template(
        self, event: int, n_bytes: int, make: Callable[[bool], Template | None]
    ) -> bool:
        """Learn a shape of an event's arguments; return whether it was new.

        Args:
            event: Which.
            n_bytes: Length of its arguments, with the newline.
            make: Gives the shape; is told whether it shall be narrow.
        """
        known = self.templates.setdefault((event, n_bytes), [])
        if len(known) >= _MAX_TEMPLATES:
            return False
        template = make(len(known) < _MAX_NARROW)
        if template is None or template in known:
            return False
        known.append(template)
        self.version += 1
        return True

    def events_of(self, text: Text, at: At) -> tuple[I32Array, At]:
        """Say which event's name begins at each place, and where its arguments begin.

        Returns:
            Places in the registry, -1 where the name is not known; and offsets.
        """
        event, length = self._by_beginning(text.load(at, _BEGIN_WORDS))
        args = at + length
        rest = np.flatnonzero(event < 0)
        if len(rest):
            event[rest], args[rest] = self._by_name(text, at[rest])
        return event, args

    def _by_beginning(self, words: Words) -> tuple[I32Array, At]:
        """Events and offsets of their arguments by the first bytes; -1 where not known."""
        n = words.shape[1]
        if not self.beginnings:
            return np.full(n, -1, np.int32), np.zeros(n, np.intp)
        known = np.array(sorted(self.beginnings), np.uint64)
        key = _begin(words)
        place = np.searchsorted(known[1:], key, side="right")
        event = np.array([self.beginnings[int(k)][0] for k in known], np.int32)[place]
        length = np.array([self.beginnings[int(k)][1] for k in known], np.intp)[place]
        event[known[place] != key] = -1
        return event, length

    def _by_name(self, text: Text, at: At) -> tuple[I32Array, At]:
        key, length = _hashes(text.load(at, _NAME_WORDS))
        known = np.array(sorted(self.names), np.uint64)
        events = np.array([self.names[int(k)] for k in known], np.int32)
        if not len(known):
            return np.full(len(at), -1, np.int32), at
        place = np.minimum(np.searchsorted(known, key), len(known) - 1)
        event = np.where(known[place] == key, events[place], -1)
        args = at + length.astype(np.intp)
        args += text.data[args] == ord(" ")
        while (blank := text.data[args] == ord(" ")).any():
            step = bytewise.spaces(text.load(args, 1)[0]).astype(np.intp)
            args = args + np.where(blank, step, 0)
        return event.astype(np.int32), args

    def in_irq(self, flags: U64Array) -> tuple[NDArray[np.int8], BoolArray]:
        """What each flag word means, and whether it is known."""
        known = np.array(sorted(self.flags), np.uint64)
        place = np.minimum(np.searchsorted(known, flags), len(known) - 1)
        meaning = np.array([self.flags[int(k)] for k in known], np.int8)
        return meaning[place], known[place] == flags


def _begin(words: Words) -> U64Array:
    """Hash of the first bytes at each place."""
    key: U64Array = words[0] * _MIX
    for word in words[1:_BEGIN_WORDS]:
        key = ((key ^ (key >> np.uint64(29))) + word) * _MIX
    return key


def _hashes(words: Words) -> tuple[U64Array, U64Array]:
    """Hash and length of the name that each run of words begins with; hash 0 if it is too long."""
    n = bytewise.token_length(words[0])
    key, length, going = _mixed(np.uint64(0), bytewise.keep(words[0], n)), n, n == _8
    for word in words[1:]:
        if not going.any():
            break
        n = np.where(going, bytewise.token_length(word), np.uint64(0))
        key = np.where(going, _mixed(key, bytewise.keep(word, n)), key)
        length = length + n
        going = going & (n == _8)
    return np.where(going, np.uint64(0), key), length


def _mixed(key: U64Array | np.uint64, word: U64Array) -> U64Array:
    mixed = (key ^ word) * _MIX
    return mixed ^ (mixed >> np.uint64(29))


def _hash_of(token: bytes) -> int:
    words = np.frombuffer(token.ljust(8 * _NAME_WORDS), "<u8").reshape(-1, 1)
    return int(_hashes(words)[0][0])
