"""Lock generations that the user or the trace rule out."""

from __future__ import annotations

import pytest
from support.story import story

from tdxtrace.analysis.causes.conflicts import names_of
from tdxtrace.analysis.causes.evidence import gather_evidence
from tdxtrace.analysis.causes.generation import chosen_generations
from tdxtrace.errors import QueryError

BEFORE = "9/enterH 9/S5 8/blockS7 8/removeS7"


def proven(text: str, before: str = BEFORE) -> str:
    (evidence,) = gather_evidence(story(f"{before} {text}").trace)
    return names_of(evidence.mask)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2/block(1 B1 2/)S", "ABC"),
        ("removeK1", "ABC"),  # 1.0 names a page by RCX
        ("K1", "BC"),  # 1.0 has no lock of an entry
        # AUGs that keep each other out, again and again: only 1.0 takes the tree alone.
        ("2/(1 B2 2/)S _ " * 3, "A"),
        ("2/(1 B2 2/)S _ " * 2, "ABC"),  # one or two may be calls that the capture missed
        ("lost " + "2/(1 B2 2/)S _ " * 3, "A"),
        ("_ B1 _ B2 _ B3", "ABC"),  # none has a holder: nothing is proven
    ],
)
def test_a_trace_rules_out_what_cannot_explain_it(text: str, expected: str) -> None:
    assert proven(text) == expected


def test_a_capture_that_lacks_holders_does_not_determine_the_generation() -> None:
    assert proven("2/(1 B2 2/)S _ " * 3, "9/enterH 9/S5") == "ABC"
    assert proven("2/(1 B2 2/)S _ " * 3, "9/S5 8/blockS7") == "ABC"


@pytest.mark.parametrize(
    ("module", "generation", "expected"),
    [
        (None, None, "ABC"),
        ("1.5.16", None, "B"),
        ("1.5.20.00.972", None, "C"),
        ("1.0.03", None, "A"),
        (None, "c", "C"),
        ("1.5.16", "B", "B"),
    ],
)
def test_module_or_generation_may_be_given(
    module: str | None, generation: str | None, expected: str
) -> None:
    assert names_of(chosen_generations(module, generation)) == expected


@pytest.mark.parametrize(("module", "generation"), [("7", None), (None, "X"), ("1.5.16", "C")])
def test_unknown_or_contradictory_choices_are_refused(
    module: str | None, generation: str | None
) -> None:
    with pytest.raises(QueryError):
        chosen_generations(module, generation)
