"""Answers to the questions of the kernel mailing list."""

from __future__ import annotations

from support.story import story

from tdxtrace.pipeline import analyze
from tdxtrace.report.questions import questions


def answers(text: str) -> dict[str, str]:
    return dict(questions(analyze(story(text).trace)))


def test_abandoned_requests_are_not_counted_as_needing_more() -> None:
    # Nine requests are given up at the third busy answer.
    text = " ".join(f"B{p} B{p} B{p}" if p % 5 == 0 else f"S{p}" for p in range(1, 49))
    said = answers(text)
    assert "not known beyond 3, where 19 % were last seen busy" in said["16 attempts or 1024?"]
    assert "No request was seen to need more than 16" in said["16 attempts or 1024?"]
    assert "only a recording without a limit can show" in said["16 attempts or 1024?"]
    assert "not known beyond 3" in said["What breaks with 5?"]


def test_the_consequence_of_a_limit_is_given_for_each_leaf() -> None:
    text = " ".join(f"{f'blockB{p} ' * 6}blockS{p} {f'B{p} ' * 3}S{p}" for p in range(1, 9))
    said = answers(text)
    assert "none would have reached a limit of 1024" in said["16 attempts or 1024?"]
    broken = said["What breaks with 5?"]
    assert "MEM.RANGE.BLOCK, 8 requests: 100 % needed more than 5" in broken
    assert "KVM_BUG_ON, the VM is dead" in broken
    assert "MEM.PAGE.AUG, 8 requests: none needed more than 5" in broken
    assert "-EBUSY, and the guest's fault is taken again" in broken
    assert (
        "Reaching a limit for MEM.RANGE.BLOCK kills the VM"
        in said["One limit, or one for each leaf?"]
    )


def test_requests_that_were_never_busy_bound_what_needs_a_second_attempt() -> None:
    assert answers("S1 S2 S3 trackS") == {
        "16 attempts or 1024?": "MEM.PAGE.AUG, 3 requests: none needed more than 1 (at most 64 %); "
        "MEM.TRACK, 1 request: none needed more than 1 (at most 95 %). "
        "No request was retried, so no limit would have been reached."
    }


def test_a_question_that_the_trace_does_not_answer_says_so() -> None:
    assert answers("") == {
        "16 attempts or 1024?": "No request was answered: this trace cannot answer it."
    }
    said = answers("B1 B1 S1")
    assert said["Is one mmu_lock round trip enough for TDH.VP.ENTER?"].startswith("Not known")
    assert "only MEM.PAGE.AUG was retried" in said["One limit, or one for each leaf?"]
