"""Where a policy stops in the busy answers of each request, and how long each request waited."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

NONE: Final = -1
GOES_ON: Final = 0
STOP: Final = 1
KICK: Final = 2
# Bits of ``kind``: what a busy answer is.
IS_BUSY: Final = 1
BUSY_IS_RETRIED: Final = 2
SEPT_IS_RETRIED: Final = 4

_Rows = NDArray[np.int64]
_Bits = NDArray[np.uint8]
_Flags = NDArray[np.bool_]


def longest_waits(
    first: _Rows, waited_ns: _Rows, kind: _Bits, longest_ns: _Rows, held_ns: _Rows
) -> None:
    """Write how long each request was seen to wait.

    Args:
        first: Place of each request's first answer; one more: the number of answers.
        waited_ns: By answer: time from the request's first attempt to it.
        kind: By answer: its bits.
        longest_ns: By request: written, the longest of these times.
        held_ns: By request: written, the longest until an answer that is a busy operand; NONE.
    """
    for request in range(len(longest_ns)):
        longest = waited_ns[first[request]]
        held = np.int64(NONE)
        for answer in range(first[request], first[request + 1]):
            longest = max(longest, waited_ns[answer])
            if kind[answer] & IS_BUSY:
                held = max(held, waited_ns[answer])
        longest_ns[request] = longest
        held_ns[request] = held


def first_events(
    first: _Rows,
    waited_ns: _Rows,
    kind: _Bits,
    is_fatal: _Flags,
    goes_on_unkicked: _Flags,
    calls: int,
    budget_ns: int,
    retried: int,
    kicks: bool,
    answer_of: _Rows,
    event_of: _Bits,
) -> None:
    """Write the first answer of each request after which the recording no longer tells.

    Args:
        first: Place of each request's first answer; one more: the number of answers.
        waited_ns: By answer: time from the request's first attempt to it.
        kind: By answer: its bits.
        is_fatal: By answer: whether it meets the fatal limit.
        goes_on_unkicked: By request: whether it has further calls that may have followed a kick.
        calls: Calls that the policy makes at most.
        budget_ns: Time after which it makes no further call.
        retried: Bit of the answers that it retries; 0: all.
        kicks: Whether it kicks the vCPUs before its last call.
        answer_of: By request: written, the place of the answer; NONE if the policy goes on.
        event_of: By request: written, STOP if the policy makes no further call; KICK if a kick
            lies between what the policy does next and what was recorded next; else GOES_ON.
    """
    for request in range(len(answer_of)):
        answer_of[request] = NONE
        event_of[request] = GOES_ON
        for answer in range(first[request], first[request + 1]):
            is_last = answer - first[request] + 1 >= calls
            is_last = is_last or waited_ns[answer] > budget_ns or is_fatal[answer]
            if kicks and is_last:
                event_of[request] = KICK
            elif is_last or (retried != 0 and not kind[answer] & retried):
                event_of[request] = STOP
            elif goes_on_unkicked[request] and not kicks:
                event_of[request] = KICK
            if event_of[request] != GOES_ON:
                answer_of[request] = answer
                break
