"""Loops over the busy answers of requests: where a policy stops, and how long requests waited."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

NONE: Final = -1
NO_EVENT: Final = 0
STOP: Final = 1
KICK: Final = 2
# Bits of ``kind``, the class of a busy answer.
IS_BUSY: Final = 1
BUSY_IS_RETRIED: Final = 2
SEPT_IS_RETRIED: Final = 4

_Rows = NDArray[np.int64]
_Bits = NDArray[np.uint8]
_Flags = NDArray[np.bool_]


def longest_waits(
    first: _Rows, waited_ns: _Rows, kind: _Bits, longest_ns: _Rows, held_ns: _Rows
) -> None:
    """Write the longest wait of each request.

    Args:
        first: Index of each request's first answer, followed by the number of answers.
        waited_ns: By answer: time from the request's first attempt to the answer.
        kind: By answer: bits of its class.
        longest_ns: Output, by request: largest ``waited_ns``.
        held_ns: Output, by request: largest ``waited_ns`` of answers OPERAND_BUSY; NONE if none.
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
    may_follow_kick: _Flags,
    calls: int,
    budget_ns: int,
    retried: int,
    kicks: bool,
    answer_of: _Rows,
    event_of: _Bits,
) -> None:
    """Write the first answer of each request after which the policy diverges from the recording.

    Args:
        first: Index of each request's first answer, followed by the number of answers.
        waited_ns: By answer: time from the request's first attempt to the answer.
        kind: By answer: bits of its class.
        is_fatal: By answer: whether it reaches the fatal limit.
        may_follow_kick: By request: whether its further calls may have followed a kick.
        calls: Maximum number of calls of the policy.
        budget_ns: Time after which the policy makes no further call.
        retried: Bit of the answers that the policy retries; 0: all.
        kicks: Whether the policy kicks the vCPUs before its last call.
        answer_of: Output, by request: index of the answer; NONE if the policy never diverges.
        event_of: Output, by request: STOP if the policy makes no further call; KICK if the policy
            kicks the vCPUs before its next call, or if it does not and the recorded kernel may
            have; else NO_EVENT.
    """
    for request in range(len(answer_of)):
        answer_of[request] = NONE
        event_of[request] = NO_EVENT
        for answer in range(first[request], first[request + 1]):
            is_last = answer - first[request] + 1 >= calls
            is_last = is_last or waited_ns[answer] > budget_ns or is_fatal[answer]
            if kicks and is_last:
                event_of[request] = KICK
            elif is_last or (retried != 0 and not kind[answer] & retried):
                event_of[request] = STOP
            elif may_follow_kick[request] and not kicks:
                event_of[request] = KICK
            if event_of[request] != NO_EVENT:
                answer_of[request] = answer
                break
