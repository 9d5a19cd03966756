"""Lines of text, damaged at random."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Final

# What stands in traces, and what never does.
ODD: Final = b"\0\r\t\x0b\x7f\x80\xff -.:[]()<>=/x0189afAFg`@\xc3"


def damaged(line: bytes, luck: random.Random) -> bytes:
    """The line with other, more or fewer bytes somewhere; never with a newline."""
    made = bytearray(line)
    at = luck.randrange(len(made) + 1)
    kind = luck.randrange(8)
    if kind < 3:
        made[at : at + 1] = bytes([luck.choice(ODD)])
    elif kind == 3:
        del made[at:]
    elif kind == 4:
        del made[at : at + luck.randrange(1, 4)]
    elif kind == 5:
        made[at:at] = bytes(luck.choice(ODD) for _ in range(luck.randrange(1, 5)))
    elif kind == 6:
        made[at:at] = luck.choice((b"0", b"9", b"f", b" ", b"x")) * luck.choice((1, 9, 17, 600))
    else:
        made += b"\r"
    return bytes(made)


def partly_damaged(lines: Sequence[bytes], seed: int, n: int) -> list[bytes]:
    """The lines twice, ``n`` times one of them damaged: what is learned from some comes again."""
    luck = random.Random(seed)
    made = [*lines, *lines]
    for _ in range(n):
        which = luck.randrange(len(made))
        made[which] = damaged(made[which], luck)
    return made
