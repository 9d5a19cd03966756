"""Lines of text, damaged at random."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Final

# What stands in traces, and what never does.
ODD_BYTES: Final = b"\0\r\t\x0b\x7f\x80\xff -.:[]()<>=/x0189afAFg`@\xc3"


def damaged(line: bytes, rng: random.Random) -> bytes:
    """The line with other, more or fewer bytes somewhere; never with a newline."""
    made = bytearray(line)
    at = rng.randrange(len(made) + 1)
    kind = rng.randrange(8)
    if kind < 3:
        made[at : at + 1] = bytes([rng.choice(ODD_BYTES)])
    elif kind == 3:
        del made[at:]
    elif kind == 4:
        del made[at : at + rng.randrange(1, 4)]
    elif kind == 5:
        made[at:at] = bytes(rng.choice(ODD_BYTES) for _ in range(rng.randrange(1, 5)))
    elif kind == 6:
        made[at:at] = rng.choice((b"0", b"9", b"f", b" ", b"x")) * rng.choice((1, 9, 17, 600))
    else:
        made += b"\r"
    return bytes(made)


def partly_damaged(lines: Sequence[bytes], seed: int, n: int) -> list[bytes]:
    """The lines twice, ``n`` times one of them damaged: what is learned from some comes again."""
    rng = random.Random(seed)
    made = [*lines, *lines]
    for _ in range(n):
        which = rng.randrange(len(made))
        made[which] = damaged(made[which], rng)
    return made
