"""The truth tables of a run, as rows and as CSV.

CSV, because a Parquet file contains the version of the library that wrote it, and the files of a
run must have the same bytes everywhere.  The columns are declared in ``tables.truth``.

Tables by the result of an analysis that they verify:

- a retry chain: ``truth_chains``, ``truth_attempts``;
- the holder that made an attempt busy: ``truth_busy``, ``truth_holders``;
- a broken rule and its rows: ``truth_broken_rules`` (by ``true_rules``);
- a zero-step episode and its cause: ``truth_zero_steps`` (by ``true_step_cause``);
- an actor, and whether it attacks: ``truth_actors``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Final

from tdxtrace.simulate.engine import Run
from tdxtrace.simulate.journal import RETRYABLE, Request
from tdxtrace.simulate.module.abi import HIGH_HALF, LEAF, OPERAND_BUSY
from tdxtrace.simulate.module.state import Call
from tdxtrace.simulate.record.symbols import CLOCK_START_NS, td_address
from tdxtrace.simulate.true_causes import true_step_cause
from tdxtrace.simulate.true_rules import true_rules

Row = tuple[object, ...]
Places = dict[int, tuple[int, int]]
"""Chain and attempt of each call that belongs to a chain, by the id of the call."""
_LOW_HALF: Final = 0xFFFF
_NOWHERE: Final = (None, None)


def rows_of(run: Run) -> dict[str, list[Row]]:
    """Return the rows of every truth table of a run, by table name, in column order."""
    journal = run.journal
    places = places_of(journal.requests)
    return {
        "truth_chains": [_chain_row(request) for request in journal.requests],
        "truth_attempts": [row for request in journal.requests for row in _attempt_rows(request)],
        "truth_busy": [row for request in journal.requests for row in _busy_rows(request)],
        "truth_holders": [
            row for request in journal.requests for row in _holder_rows(request, places)
        ],
        "truth_broken_rules": list(_broken_rows(run, places)),
        "truth_actors": list(_actor_rows(run)),
        "truth_zero_steps": list(_episode_rows(run)),
        "truth_epochs": [
            (_clock(ts_ns), td_address(td), epoch)
            for ts_ns, td, epoch in journal.epochs
            if ts_ns <= run.end_ns
        ],
        "truth_stale_returns": [
            (_clock(c.end_ns), c.thread.tid, td_address(c.td.number), c.vcpu.number, c.status)
            for c in journal.stale_returns
            if c.thread is not None and c.td is not None and c.vcpu is not None
        ],
        "truth_actions": list(_action_rows(run)),
    }


def places_of(requests: Iterable[Request]) -> Places:
    """Return the chain and the attempt of every call of some requests, by the call's id."""
    return {
        id(call): (request.number, number)
        for request in requests
        for number, call in enumerate(request.calls, 1)
    }


def csv_of(columns: list[str], rows: list[Row]) -> str:
    """Return rows as CSV; values never need quotes."""
    lines = [",".join(columns)]
    lines += [",".join(_text(value) for value in row) for row in rows]
    return "\n".join(lines) + "\n"


def _text(value: object) -> str:
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _clock(ns: int) -> int:
    return CLOCK_START_NS + ns


def _is_retryable(call: Call) -> bool:
    return call.status & HIGH_HALF in RETRYABLE


def _chain_row(request: Request) -> Row:
    calls = request.calls
    has_page = request.level >= 0
    return (
        request.number,
        LEAF[request.leaf],
        request.thread.tid,
        request.thread.tgid,
        td_address(request.td),
        request.vcpu if request.vcpu >= 0 else None,
        request.gpa if has_page else None,
        request.level if has_page else None,
        _clock(calls[0].start_ns),
        _clock(calls[-1].end_ns),
        len(calls),
        len({call.wrapper_call for call in calls}) if calls[0].wrapper_call else len(calls),
        sum(_is_retryable(call) for call in calls),
        request.segments,
        request.outcome,
        calls[-1].status,
        calls[0].in_irq,
    )


def _attempt_rows(request: Request) -> Iterator[Row]:
    for number, call in enumerate(request.calls, 1):
        times = (_clock(call.start_ns), _clock(call.end_ns))
        executed = call.executed if call.leaf == "TDH.VP.ENTER" else None
        yield request.number, number, call.wrapper_call, call.cpu, *times, call.status, executed


def _busy_rows(request: Request) -> Iterator[Row]:
    for number, call in enumerate(request.calls, 1):
        if not _is_retryable(call):
            continue
        reason = call.busy_reason
        holders = () if reason is None else reason.holders
        is_busy = call.status & HIGH_HALF == OPERAND_BUSY
        yield (
            request.number,
            number,
            _clock(call.end_ns),
            reason.resource if reason is not None else "",
            call.status & _LOW_HALF if is_busy else 0,
            len(holders),
            *_holder(holders[0] if holders else None),
        )


def _holder(call: object) -> Row:
    if not isinstance(call, Call):
        return (None,) * 6
    has_vcpu = call.vcpu is not None and (call.guest or call.leaf.startswith("TDH.VP."))
    return (
        call.leaf,
        call.thread.tid if call.thread is not None else None,
        call.vcpu.number if has_vcpu and call.vcpu is not None else None,
        _clock(call.start_ns),
        call.guest,
        call.armed,
    )


def _holder_rows(request: Request, places: Places) -> Iterator[Row]:
    for number, call in enumerate(request.calls, 1):
        reason = call.busy_reason
        if reason is None or not _is_retryable(call):
            continue
        holders = (holder for holder in reason.holders if isinstance(holder, Call))
        for n, holder in enumerate(holders, 1):
            leaf, *rest = _holder(holder)
            place = places.get(id(holder), _NOWHERE)
            yield request.number, number, n, reason.resource, *place, leaf, *rest


def _broken_rows(run: Run, places: Places) -> Iterator[Row]:
    """Yield broken rules whose call returned before the run ended."""
    shown = [broken for broken in true_rules(run) if id(broken.call) in places]
    for rule, call, evidence in sorted(shown, key=lambda broken: broken.call.end_ns):
        assert call.thread is not None
        assert call.td is not None
        by = evidence.thread if evidence is not None else None
        yield (
            rule,
            *places[id(call)],
            _clock(call.end_ns),
            LEAF[call.leaf],
            call.thread.tid,
            td_address(call.td.number),
            *places.get(id(evidence), _NOWHERE),
            evidence.leaf if evidence is not None else None,
            by.tid if by is not None else None,
        )


def _actor_rows(run: Run) -> Iterator[Row]:
    caused: Counter[tuple[int, int, str]] = Counter()
    for request in run.journal.requests:
        for call in request.calls:
            holders = call.busy_reason.holders if call.busy_reason is not None else ()
            first = holders[0] if holders else None
            if _is_retryable(call) and isinstance(first, Call) and first.thread is not None:
                side = "guest" if first.guest else "host"
                td = first.td.number if first.td is not None else -1
                caused[first.thread.tid, td, side] += 1
    for actor in run.journal.actors:
        n, first_ns, last_ns = run.journal.acts.get((actor.tid, actor.side), (0, None, None))
        yield (
            actor.tid,
            td_address(actor.td),
            actor.vcpu if actor.vcpu >= 0 else None,
            *(actor.side, actor.kind, actor.conduct, n),
            *(None if ns is None else _clock(ns) for ns in (first_ns, last_ns)),
            caused[actor.tid, actor.td, actor.side],
        )


def _episode_rows(run: Run) -> Iterator[Row]:
    actors = {(a.tid, a.side): a for a in run.journal.actors}
    for e in run.journal.episodes:
        if e.armed_ns > run.end_ns:
            continue
        form = "busy_sept" if e.n_busy else "emulated_ept_violation"
        times = (e.first_refused_ns, e.last_refused_ns, e.cleared_ns)
        yield (
            e.thread.tid,
            td_address(e.td),
            e.vcpu,
            e.gpa,
            e.rip,
            _clock(e.armed_ns),
            *(None if ns is None else _clock(ns) for ns in times),
            e.n_faults,
            e.n_busy,
            e.n_emulated,
            form if e.n_busy or e.n_emulated else "armed_only",
            *true_step_cause(e, actors),
        )


def _action_rows(run: Run) -> Iterator[Row]:
    seen: set[Row] = set()
    for a in run.journal.actions:
        key = (a.ts_ns, a.thread.tid, a.action)
        if a.ts_ns <= run.end_ns and key not in seen:
            seen.add(key)
            when = _clock(a.ts_ns)
            yield when, a.thread.tid, td_address(a.td), a.action, LEAF[a.leaf], a.detail
