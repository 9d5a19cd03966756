"""Score of verdicts, broken rules and progress loops, by the rows of their evidence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import polars as pl

from tdxtrace.simulate.journal import BrokenRule, Request
from tdxtrace.simulate.module import abi
from tdxtrace.simulate.module.state import Call
from tdxtrace.validate.captured import CapturedRun, Score
from tdxtrace.validate.step_causes import judge_hostile
from tdxtrace.validate.truth import Truth

_LOOPS: Final = {
    abi.INTERRUPTED_RESUMABLE: "resumable",
    abi.INTERRUPTED_RESTARTABLE: "restartable",
    abi.INTERRUPTED_BUSY: "interrupted",
    abi.RND_NO_ENTROPY: "entropy",
}
ACCUSATIONS: Final = ("BUG", "HOSTILE")
_SURE: Final = ("proof", "strong")
_RULE_OF_CONSEQUENCE: Final = {
    "host_priority_timeout": "host_priority_timeout",
    "later_call_failed": "dropped_block",
}


def score_verdicts(captured: CapturedRun) -> Score:
    """Compare accusations and progress loops with the truth at their rows.

    BUG is right if the call at each row of its evidence truly broke the named rule; HOSTILE is
    right if a hostile actor truly caused the finding of each row.  A broken rule is right if its
    call broke it and the other named call proves it.
    """
    score = Score()
    truth = Truth(captured)
    _score_loops(score, captured)
    _score_rules(score, captured, truth)
    _score_accusations(score, captured, truth)
    return score


def _score_rules(score: Score, captured: CapturedRun, truth: Truth) -> None:
    """Score the ``broken_rules`` table, and count the truly broken rules in the capture."""
    found: set[tuple[str, int]] = set()
    for row in captured.findings.broken_rules.iter_rows(named=True):
        rule, seq = row["rule"], row["seq"]
        sure = "sure" if row["confidence"] in _SURE else "unsure"
        is_right = truth.breaks(rule, seq, row["evidence_seq"])
        score.counts[f"{sure} {rule} {'right' if is_right else 'wrong'}"] += 1
        if not is_right:
            score.add_example(f"{sure} broken rule is wrong: {row}")
        found |= {(rule, line) for line in (seq, row["evidence_seq"]) if line is not None}
    if not captured.cell.shows_causes:
        return
    for rule, lines in _shown_rules(captured, truth):
        score.counts[f"rule {rule} shown"] += 1
        score.counts[f"rule {rule} found"] += any((rule, line) in found for line in lines)


def _shown_rules(captured: CapturedRun, truth: Truth) -> Iterator[tuple[str, list[int]]]:
    """Yield each captured call that breaks a rule, with the captured lines of all its pairs."""
    by_call: dict[tuple[str, int], list[BrokenRule]] = {}
    for broken in truth.broken:
        by_call.setdefault((broken.rule, id(broken.call)), []).append(broken)
    for (rule, _), pairs in by_call.items():
        calls = [pairs[0].call, *(b.evidence for b in pairs if b.evidence is not None)]
        lines = [captured.returns[id(call)] for call in calls if id(call) in captured.returns]
        if id(pairs[0].call) in captured.returns:
            yield rule, lines


def _score_accusations(score: Score, captured: CapturedRun, truth: Truth) -> None:
    for row in captured.findings.verdicts.iter_rows(named=True):
        verdict = row["verdict"]
        score.counts[verdict] += 1
        if verdict not in ACCUSATIONS:
            continue
        judge = _JUDGES.get((verdict, row["evidence_table"]))
        lines = [int(seq) for seq in row["evidence"].split()]
        right = judge is not None and bool(lines)
        if judge is not None:
            right = right and all(judge(captured, truth, row["rule"], line) for line in lines)
        score.counts[f"{verdict}_false"] += not right
        score.counts[f"{verdict} {row['subject']} {'right' if right else 'wrong'}"] += 1
        if not right:
            score.add_example(f"accused: {row['sentence']} ({row['rule']}: {row['evidence']})")
    _score_attacks(score, captured, truth)


def _score_attacks(score: Score, captured: CapturedRun, truth: Truth) -> None:
    """Count whether the capture has a certain episode of an attack, and whether it is named."""
    sure = captured.findings.zero_steps.filter(pl.col("strength") != "weak")
    if any(judge_hostile(truth, row) for row in sure.iter_rows(named=True)):
        named = captured.findings.verdicts.filter(verdict="HOSTILE", subject="zero_step")
        score.counts["hostile_shown"] += 1
        score.counts["hostile_named"] += not named.is_empty()


def _bug_by_cause(captured: CapturedRun, truth: Truth, rule: str, seq: int) -> bool:
    del captured
    return truth.breaks(rule, seq)


def _bug_by_rule(captured: CapturedRun, truth: Truth, rule: str, seq: int) -> bool:
    rows = captured.findings.broken_rules.filter(pl.col("seq") == seq, pl.col("rule") == rule)
    given = rows["evidence_seq"].to_list()
    return bool(given) and all(truth.breaks(rule, seq, other) for other in given)


def _bug_by_request(captured: CapturedRun, truth: Truth, rule: str, first_seq: int) -> bool:
    """Return whether an abandoned request truly had the consequence that it is blamed for."""
    del rule
    rows = captured.findings.abandoned_requests.filter(first_seq=first_seq)
    blamed = rows.filter(pl.col("consequence").is_in(list(_RULE_OF_CONSEQUENCE)))
    call = truth.call_at(first_seq)
    request = truth.requests.get(id(call))
    if request is None or blamed.is_empty():
        return False
    own_calls = {id(one) for one in request.calls}
    return all(
        any(
            broken.rule == _RULE_OF_CONSEQUENCE[row["consequence"]]
            and id(broken.evidence) in own_calls
            and broken.call is truth.call_at(row["effect_seq"])
            for broken in truth.broken
        )
        for row in blamed.iter_rows(named=True)
    )


def _hostile_guest(captured: CapturedRun, truth: Truth, rule: str, seq: int) -> bool:
    del captured, rule
    return truth.guest_attacks(seq)


def _hostile_host(captured: CapturedRun, truth: Truth, rule: str, first_seq: int) -> bool:
    del rule
    rows = captured.findings.zero_steps.filter(first_seq=first_seq).iter_rows(named=True)
    return any(judge_hostile(truth, row) for row in rows)


# Function that tests whether a row supports a verdict, by verdict and table of the row.
_JUDGES: Final[dict[tuple[str, str], Callable[[CapturedRun, Truth, str, int], bool]]] = {
    ("BUG", "busy_causes"): _bug_by_cause,
    ("BUG", "broken_rules"): _bug_by_rule,
    ("BUG", "abandoned_requests"): _bug_by_request,
    ("HOSTILE", "busy_causes"): _hostile_guest,
    ("HOSTILE", "zero_steps"): _hostile_host,
}


def _score_loops(score: Score, captured: CapturedRun) -> None:
    """Compare the loops in the capture with the found loops; a request may make several."""
    truth: dict[tuple[int, str], tuple[Request, int]] = {}
    for request in captured.run.journal.requests:
        shown = _answers(captured, request)
        for loop, n in Counter(shown.values()).items():
            truth[min(shown), loop] = request, n
    score.counts["loops_shown"] += len(truth)
    rows = captured.findings.progress_loops.filter(pl.col("loop") != "local_retry")
    lines = {
        line: first
        for (first, _), (request, _) in truth.items()
        for line in _lines(captured, request)
    }
    for row in rows.iter_rows(named=True):
        first = lines.get(row["first_seq"], 0)
        _score_loop(score, row, truth.get((first, row["loop"])), captured.cell.is_clean)


def _lines(captured: CapturedRun, request: Request) -> list[int]:
    return [
        captured.returns[id(call)] for call in request.calls if id(call) in captured.returns
    ] + [captured.entries[id(call)] for call in request.calls if id(call) in captured.entries]


def _answers(captured: CapturedRun, request: Request) -> dict[int, str]:
    """Return kind by line of each readable answer of a request that causes a loop."""
    last: dict[int, Call] = {}
    for call in request.calls:
        line = captured.returns.get(id(call))
        if line is not None and line != captured.partial_line:
            last[line] = call
    return {
        line: _LOOPS[call.status & abi.HIGH_HALF]
        for line, call in last.items()
        if call.status & abi.HIGH_HALF in _LOOPS
    }


def _score_loop(
    score: Score,
    row: dict[str, Any],
    true: tuple[Request, int] | None,
    is_clean: bool,
) -> None:
    score.counts["loops_found"] += 1
    if true is None:
        score.counts["loops_false"] += 1
        score.add_example(f"no such loop: {row}")
        return
    request, n = true
    seen = request.outcome in ("succeeded", "resolved_elsewhere")
    wrong = (row["progress"] == "seen") != seen and row["progress"] != "unknown"
    # If lines were lost, a chain is cut and has only some of the answers.
    wrong |= is_clean and row["n_repeats"] != n
    score.counts["loops_wrong"] += wrong
    score.counts["loops_right"] += not wrong
    if wrong:
        score.add_example(f"loop {row}, truly x {n}, {request.outcome}")


def false_accusations(counts: Counter[str]) -> list[str]:
    """Return a line for each kind of wrong accusation or loop; none if all are right.

    Args:
        counts: Sums of the counts of :func:`score_verdicts`.
    """
    wrong = [
        f"{counts[f'{verdict}_false']} verdicts {verdict} are false"
        for verdict in ACCUSATIONS
        if counts[f"{verdict}_false"]
    ]
    wrong += [
        f"{n} broken rules {name.split()[1]} are wrong"
        for name, n in sorted(counts.items())
        if name.startswith("sure ") and name.endswith(" wrong")
    ]
    if counts["loops_wrong"] + counts["loops_false"]:
        wrong.append(f"{counts['loops_wrong'] + counts['loops_false']} progress loops are wrong")
    return wrong


def accusation_rows(counts: Counter[str]) -> list[list[str]]:
    """Return table rows for display: a heading, one row per kind of accusation.

    ``shown`` and ``found`` count calls that truly broke the rule, in complete captures.

    Args:
        counts: Sums of the counts of :func:`score_verdicts`.
    """
    kinds = {name.split()[1] for name in counts if name.split()[0] in _OF_RULES}
    rows = [["accusation", "right", "wrong", "unsure right", "unsure wrong", "shown", "found"]]
    for rule in sorted(kinds):
        judged_names = [f"{sure} {rule} {what}" for sure in ("sure", "unsure") for what in _JUDGED]
        names = [*judged_names, f"rule {rule} shown", f"rule {rule} found"]
        rows.append([f"rule {rule}", *(_number(counts[name]) for name in names)])
    given = {name.rsplit(" ", 1)[0] for name in counts if name.split(" ")[0] in ACCUSATIONS}
    for kind in sorted(given - set(ACCUSATIONS) - {f"{name}_false" for name in ACCUSATIONS}):
        judged = (_number(counts[f"{kind} {what}"]) for what in _JUDGED)
        rows.append([kind, *judged, *["-"] * 4])
    attacks = (_number(counts[name]) for name in ("hostile_shown", "hostile_named"))
    return [*rows, ["captures of a zero-step attack", *["-"] * 4, *attacks]]


_OF_RULES: Final = ("sure", "unsure", "rule")
_JUDGED: Final = ("right", "wrong")


def _number(n: int) -> str:
    return str(n) if n else "-"


_SHOWN: Final = (
    ("loops right", "loops_right", "loops_shown"),
    ("hostile named", "hostile_named", "hostile_shown"),
)


def verdict_score_rows(parts: dict[str, Counter[str]]) -> Sequence[list[str]]:
    """Return table rows for display: a heading, then one row per scenario.

    Args:
        parts: Sums of the counts by scenario.
    """
    head = ["verdicts", *(title for title, _, _ in _SHOWN), "BUG false", "HOSTILE false"]
    head += ["UNDECIDED", "EXPECTED"]
    rows = [head]
    for name, counts in parts.items():
        shares = [f"{counts[n]}/{counts[of]}" if counts[of] else "-" for _, n, of in _SHOWN]
        accused = [f"{counts[f'{v}_false']}/{counts[v]}" if counts[v] else "-" for v in ACCUSATIONS]
        rows.append([name, *shares, *accused, *(str(counts[v]) for v in ("UNDECIDED", "EXPECTED"))])
    return rows
