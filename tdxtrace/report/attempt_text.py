"""One attempt as text: its cause, and a timeline of the threads around it."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any, Final, Protocol

import polars as pl

from tdxtrace.report.units import plural, seconds, short_duration, word
from tdxtrace.tables.text import one_line
from tdxtrace.tdx.leaves import leaf_name, parse_leaf
from tdxtrace.tdx.locks import bug_rule_table
from tdxtrace.tdx.status import describe_status
from tdxtrace.tdx.word import is_busy

WIDTH: Final = 80
_NAME: Final = 22
_MAX_THREADS: Final = 10
_MAX_CALLS: Final = 14
_VP_ENTER: Final = parse_leaf("TDH.VP.ENTER")[0]
_THIS, _HOLDS, _BUSY, _UNKNOWN, _WORKS, _GUEST = "X", "#", "B", "?", "=", "-"
# Precedence of marks where several calls fall on one column.
_ORDER: Final = "X#B?=-"


class SurroundingsLike(Protocol):
    """Input of :func:`attempt_text`: ``analysis.causes.surroundings.Surroundings``."""

    @property
    def attempt(self) -> dict[str, Any]:
        """Row of the attempt."""

    @property
    def answers(self) -> list[dict[str, Any]]:
        """Rows of the attempt in ``busy_causes``, the most likely cause first."""

    @property
    def chain(self) -> dict[str, Any] | None:
        """Row of the attempt's retry chain."""

    @property
    def calls(self) -> pl.DataFrame:
        """Calls of all threads in the time shown."""

    @property
    def first_ns(self) -> int:
        """Start of the time shown."""

    @property
    def last_ns(self) -> int:
        """End of the time shown."""

    @property
    def names(self) -> dict[int, str]:
        """Thread names by thread ID: untrusted text."""


def attempt_text(around: SurroundingsLike) -> str:
    """Return the attempt, its cause and the timeline, as lines of at most WIDTH columns."""
    lines = [*_heading(around), *_answer(around), "", *_picture(around), "", *_calls(around)]
    return "\n".join(line.rstrip() for line in lines)


def _heading(around: SurroundingsLike) -> Iterator[str]:
    attempt = around.attempt
    yield from _wrapped(
        f"seq {attempt['seq']}: {_leaf(attempt['leaf'])} by {_thread(around, attempt['tid'])} "
        f"at {seconds(attempt['begins'])} s"
    )
    about = [("td", "td_id"), ("gpa", "gpa"), ("vp", "vp_id")]
    facts = [f"{name} {word(attempt[c])}" for name, c in about if attempt[c] is not None]
    if facts:
        yield from _wrapped("  on " + ", ".join(facts))
    took = f" after {short_duration(attempt['ends'] - attempt['begins'])}"
    yield from _wrapped(f"  answered {_status(attempt)}{took if attempt['certain'] else ''}")
    chain = around.chain
    if chain is not None and chain["n_attempts"] > 1:
        yield from _wrapped(
            f"  one of {chain['n_attempts']} attempts, seq {chain['first_seq']} to "
            f"{chain['last_seq']}: {chain['outcome']} ({chain['n_busy']} busy)"
        )


def _answer(around: SurroundingsLike) -> Iterator[str]:
    if not around.answers:
        yield "  not busy: nothing to explain"
        return
    best, *others = around.answers
    yield from _wrapped(f"  cause: {best['cause']}, {_confidence(best)}")
    yield from _wrapped(_evidence(around, best), 4)
    if best["rule"] is not None:
        rules = dict(bug_rule_table().select("rule", "statement").iter_rows())
        yield from _wrapped(f"  rule {best['rule']}: {rules[best['rule']]}")
    for other in others:
        if other["holder_seq"] is not None:
            yield from _wrapped(f"  or by {_holder(around, other)}")


def _evidence(around: SurroundingsLike, answer: dict[str, Any]) -> str:
    """Return the evidence for a cause: the lock holder, no holder, or the missing input."""
    if answer["cause"] == "unexplained":
        return f"  missing {answer['lacks']}: {one_line(answer['advice'])}"
    tid = answer["holder_tid"]
    if answer["cause"] == "guest":
        one = f"one of {answer['n_tied']} vCPUs that were"
        whose = one if tid is None else f"{_thread(around, tid)}, the only vCPU that was"
        return f"  no host call held the entry: {whose} in the guest"
    if answer["holder_seq"] is None:
        return "  held by no recorded call"
    return f"  held by {_holder(around, answer)}"


def _confidence(answer: dict[str, Any]) -> str:
    tied = f", {answer['n_tied']} candidates tied" if answer["n_tied"] > 1 else ""
    which = f", module generation {' or '.join(answer['generations'])}"
    return f"confidence {answer['confidence']}{tied}{which if answer['generations'] else ''}"


def _holder(around: SurroundingsLike, row: dict[str, Any]) -> str:
    text = f"{_leaf(row['holder_leaf'])} of {_thread(around, row['holder_tid'])}, "
    text += f"seq {row['holder_seq']}"
    if row["lock"] is not None and row["holder_mode"] is not None:
        text += f": {row['lock']} {row['holder_mode']}, wanted {row['mode']}"
    if row["overlap_ns"] is not None:
        text += f"; overlap {short_duration(max(row['overlap_ns'], 0))}"
    return text


def _picture(around: SurroundingsLike) -> Iterator[str]:
    """Yield the timeline: a line per thread, with a mark for each call, and the legend."""
    room = WIDTH - _NAME - 3
    span = max(around.last_ns - around.first_ns, 1)
    length = short_duration(span)
    yield f"{'':{_NAME}} |{'0':<{room - len(length) - 1}}{length}|"
    threads = _threads(around)
    for tid in threads[:_MAX_THREADS]:
        line = [" "] * room
        own_calls = around.calls.filter(pl.col("tid").eq_missing(tid))
        for call in own_calls.iter_rows(named=True):
            left, right = (
                min(max((call[at] - around.first_ns) * room // span, 0), room - 1)
                for at in ("begins", "ends")
            )
            mark = _mark(around, call)
            for place in range(left, right + 1):
                if line[place] == " " or _ORDER.index(mark) < _ORDER.index(line[place]):
                    line[place] = mark
        yield f"{_thread(around, tid, _NAME):{_NAME}} |{''.join(line)}|"
    if len(threads) > _MAX_THREADS:
        yield f"… and {plural(len(threads) - _MAX_THREADS, 'more thread')}"
    yield "X this call, # holder, B busy, = other call, - vCPU entered, ? bounds unknown"


def _threads(around: SurroundingsLike) -> list[int | None]:
    """Return thread IDs: of the attempt, of its candidates, of its TD, then all others."""
    near = [around.attempt["tid"], *(row["holder_tid"] for row in around.answers)]
    here = around.calls.sort(pl.col("td_id").eq_missing(around.attempt["td_id"]), descending=True)
    found = [*(tid for tid in near if tid is not None), *here["tid"]]
    return list(dict.fromkeys(found))


def _mark(around: SurroundingsLike, call: dict[str, Any]) -> str:
    if call["seq"] == around.attempt["seq"]:
        return _THIS
    if not call["certain"]:
        return _UNKNOWN
    if around.answers and call["seq"] == around.answers[0]["holder_seq"]:
        return _HOLDS
    if pl.select(is_busy(pl.lit(call["status"], pl.UInt64))).item():
        return _BUSY
    return _GUEST if call["leaf"] == _VP_ENTER else _WORKS


def _calls(around: SurroundingsLike) -> Iterator[str]:
    """Yield the attempt, its candidates and the calls nearest in time, as a list."""
    wanted = {around.attempt["seq"], *(row["holder_seq"] for row in around.answers)}
    middle = around.attempt["begins"]
    rows = around.calls.sort(
        ~pl.col("seq").is_in(list(wanted - {None})), (pl.col("begins") - middle).abs()
    ).head(_MAX_CALLS)
    yield "times relative to the left edge:"
    for call in rows.sort("begins", "seq").iter_rows(named=True):
        begins, ends = (
            short_duration(abs(call[at] - around.first_ns)) for at in ("begins", "ends")
        )
        begins = f"-{begins}" if call["begins"] < around.first_ns else begins
        mark = _mark(around, call)
        page = f" {word(call['gpa'])}" if call["gpa"] is not None else ""
        text = (
            f" {mark} {begins:>8} to {ends:>7}  {call['tid'] or '-':>7}  "
            f"{_leaf(call['leaf']).removeprefix('TDH.')}{page} {_status(call)}"
        )
        yield one_line(text)
    if around.calls.height > rows.height:
        yield f"… and {plural(around.calls.height - rows.height, 'more call')}"


def _leaf(leaf: int | None) -> str:
    named = pl.select(leaf_name(pl.lit(leaf, pl.UInt16))).item()
    return str(named or f"leaf {leaf}")


def _status(call: dict[str, Any]) -> str:
    if call["status"] is None:
        return "no recorded return"
    row = pl.DataFrame(
        {"s": [call["status"]], "l": [call["leaf"]]}, schema={"s": pl.UInt64, "l": pl.UInt16}
    )
    return str(row.select(describe_status(pl.col("s"), pl.col("l"))).item())


def _thread(around: SurroundingsLike, tid: int | None, width: int = 40) -> str:
    if tid is None:
        return "an unknown thread"
    number = str(tid)
    name = one_line(around.names.get(tid, "?"), width - len(number) - 1)
    return f"{name} {number}"


def _wrapped(text: str, indent: int = 4) -> Iterator[str]:
    """Yield lines of at most WIDTH columns; all but the first are indented."""
    yield from textwrap.wrap(
        text,
        WIDTH,
        subsequent_indent=" " * indent,
        drop_whitespace=True,
        initial_indent="",
        break_long_words=True,
    )
