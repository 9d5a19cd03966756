"""Score of the causes of zero-step episodes: counts of true and found causes."""

from __future__ import annotations

from collections import Counter
from typing import Any, Final

from tdxtrace.simulate.journal import Episode
from tdxtrace.tables.findings import STEP_CAUSES
from tdxtrace.tables.truth import TRUE_STEP_CAUSES
from tdxtrace.validate.captured import CapturedRun, Score
from tdxtrace.validate.truth import Truth

# Right answers by true cause.
_ANSWERS: Final[dict[str, tuple[str, ...]]] = {
    "memory_fault": ("memory_fault_ignored",),
    # block_undone is no accusation: another call was made in between, or may have been lost.
    "churned": ("block_churn", "block_undone"),
    # The first split or merge of a churning host, if the capture does not show a second one, is no
    # evidence of churning.
    "not yet churned": ("invalidation", "block_undone"),
    "invalidated": ("invalidation", "memslot_change", "block_undone"),
    "raced": ("frozen_spte",),
    "left_loop": ("left_loop",),
    "pending": ("pending_page",),
    "served": ("many_pages",),
}
# Faults on more than this number of pages at one RIP arm the mitigation, even if each was served:
# the module's STEPPING_EPF_THRESHOLD is 6.
_MANY_PAGES: Final = 6
TRUE_CAUSES: Final = (*TRUE_STEP_CAUSES, "mixed", "not yet churned", "no episode")
_ACTOR_OF_SLOTS: Final = "delete_slot"


def score_step_causes(captured: CapturedRun) -> Score:
    """Compare the cause of every found episode with that of the simulated one.

    An answer is right if it is the cause of the episode's faults until the mitigation was armed.
    The first split or merge of a churning host counts as ``not yet churned`` if the capture does
    not show the second, because it cannot be distinguished from a legitimate one.  ``unknown`` is
    not scored.  Rows of weak strength that are no episode have no true cause; their answers are
    counted separately, because no verdict depends on them.
    """
    score = Score()
    truth = Truth(captured)
    steps = {
        (row["source"], row["first_seq"], row["form"]): row
        for row in captured.findings.zero_steps.iter_rows(named=True)
    }
    for row in captured.findings.zero_step_causes.iter_rows(named=True):
        step = steps[row["source"], row["first_seq"], row["form"]]
        episode = truth.episode_of(step)
        true = "no episode" if episode is None else _true_cause(truth, episode)
        score.counts[f"cause {true} {row['cause']}"] += 1
        if row["cause"] == "unknown":
            continue
        if episode is None:
            score.counts["of no episode"] += 1
            continue
        is_right = _is_right(truth, episode, row["cause"])
        score.counts["right" if is_right else "wrong"] += 1
        if not is_right:
            score.add_example(f"cause {row['cause']} of {row['first_seq']}, truly {true}")
    return score


def _true_cause(truth: Truth, episode: Episode) -> str:
    """Return the true cause; ``not yet churned`` if the capture shows no repetition."""
    cause = str(truth.step_cause(episode)[0])
    return "not yet churned" if cause == "churned" and truth.shows_no_turns(episode) else cause


def _is_right(truth: Truth, episode: Episode, answer: str) -> bool:
    """Return whether an answer names the cause that kept the episode's vCPU out."""
    cause, n_pages, *_, blocker, _ = truth.step_cause(episode)
    if answer == "many_pages":
        return bool(n_pages > _MANY_PAGES)
    if answer == "memslot_change":
        actor = truth.actors.get((blocker, "host"))
        kinds = {a.kind for a in truth.actors.values()} if actor is None else {actor.kind}
        return cause == "invalidated" and _ACTOR_OF_SLOTS in kinds
    return answer in _ANSWERS.get(_true_cause(truth, episode), ())


def confusion_rows(counts: Counter[str]) -> list[list[str]]:
    """Return table rows for display: a heading, one row per true cause.

    Args:
        counts: Sums of the counts of :func:`score_step_causes`.
    """
    rows = [["zero-step cause", *STEP_CAUSES]]
    for true in TRUE_CAUSES:
        found = [counts[f"cause {true} {name}"] for name in STEP_CAUSES]
        if any(found):
            rows.append([true, *(str(n) if n else "-" for n in found)])
    return rows


def judge_hostile(truth: Truth, row: dict[str, Any]) -> bool:
    """Return whether a hostile actor caused the episode of a zero_steps row."""
    episode = truth.episode_of(row)
    return episode is not None and bool(truth.step_cause(episode)[-1])
