"""Commands about retry limits: attempts, policies, recommend."""

from __future__ import annotations

import io
import json
from pathlib import Path

import polars as pl
import pytest
from support.contracts import breaches
from support.running import SAMPLES, answered, refused

from tdxtrace.ingest.read import read_trace
from tdxtrace.pipeline import analyze
from tdxtrace.tables.limits import ATTEMPTS, LATENCIES, LIMIT_STATEMENTS, LIMITS, POLICIES
from tdxtrace.tables.schema import Table

SAMPLE = SAMPLES / "contended.txt"
COMMANDS = {
    ("attempts",): ATTEMPTS,
    ("attempts", "--unit", "ns", "--by", "resource"): ATTEMPTS,
    ("attempts", "--latencies"): LATENCIES,
    ("policies",): POLICIES,
    ("recommend",): LIMIT_STATEMENTS,
    ("recommend", "--target", "0.1"): LIMITS,
}


@pytest.mark.parametrize(("words", "table"), COMMANDS.items(), ids=map(" ".join, COMMANDS))
def test_each_prints_its_table_in_every_form(
    words: tuple[str, ...], table: Table, chains: Path, tmp_path: Path
) -> None:
    verb, *options = words
    parquet = answered(verb, chains, *options, "--format", "parquet").stdout
    rows = table.check(pl.read_parquet(io.BytesIO(parquet)))
    assert not rows.is_empty()
    as_json = json.loads(answered(verb, chains, *options, "--format", "json").stdout)
    assert len(as_json) == rows.height
    assert breaches(table, as_json) == []
    head = answered(verb, chains, *options, "--format", "csv").lines[0]
    assert head.split(",") == [column.name for column in table.columns]
    path = tmp_path / "out.txt"
    answered(verb, chains, *options, "--output", path)
    assert path.read_text() == answered(verb, chains, *options).text


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("columns", [60, 80, 160])
def test_what_is_printed_is_no_wider_than_the_terminal(
    words: tuple[str, ...], columns: int, chains: Path
) -> None:
    done = answered(words[0], chains, *words[1:], columns=columns)
    assert max(map(len, done.lines)) <= columns
    assert all(line.isprintable() for line in done.lines)


def test_the_attempts_of_one_leaf_are_a_curve() -> None:
    done = answered("attempts", SAMPLE, "--leaf", "TDH.MEM.PAGE.AUG", columns=120)
    assert "done_ratio" in done.lines[0]
    first = done.lines[1].split()
    assert first[0] == "TDH.MEM.PAGE.AUG"
    assert "0.6486" in first


def test_policies_say_what_would_have_been_and_what_is_not_known() -> None:
    text = answered("policies", SAMPLE).text
    row = next(line for line in text.splitlines() if line.startswith("v1-series"))
    # The policy kills the VM on the way: later requests are not counted as exceeding it.
    assert row.split()[:4] == ["v1-series", "MEM.PAGE.AUG", "17", "10-7?+116?"]
    assert "16 x2 to 1024" in text
    assert "2 + kick" in text
    whole = " ".join(text.split())
    assert "recorded after this policy had killed the VM" in whole
    assert "host priority keeps guests off the lock" in whole
    assert "another policy would change which calls conflict" in whole


def test_chosen_policies_come_in_the_order_asked_for(tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text("[policy.seven]\ncalls = 7\nleaves = ['TDH.MEM.PAGE.AUG']\n")
    words = ("--policy", "seven", "--policy", "fixed-3", "--policies", mine)
    done = answered("policies", SAMPLE, *words, "--format", "csv")
    rows = pl.read_csv(io.BytesIO(done.stdout), infer_schema_length=None)
    assert rows["policy"].unique(maintain_order=True).to_list() == ["seven", "fixed-3"]
    assert rows.filter(pl.col("policy") == "seven")["leaf"].to_list() == [6]
    default = answered("policies", SAMPLE, "--policies", mine, "--format", "csv").text
    assert "\nseven," in default
    assert "\nmainline," in default


def test_a_recommendation_says_what_it_rests_on() -> None:
    text = " ".join(answered("recommend", SAMPLE, "--target", "0.05").text.split())
    assert "at most 5 % of the requests may need more, with 95 % confidence for each leaf" in text
    assert "based on 503 requests" in text
    assert "1 TD, no losses" in text
    assert "valid only for this workload, module" in text


def test_without_a_target_it_says_what_the_trace_supports_and_how_long_to_record() -> None:
    done = answered("recommend", SAMPLE)
    assert done.lines[0].startswith(
        "upper bounds of the share that needs more, in %, each with 95 %"
    )
    assert done.lines[1].split() == ("TDH. 10us 100us 1ms 10ms 1 2 5 16 64 1024 attempts".split())
    assert done.lines[2].split()[:7] == ["MEM.PAGE.AUG", "34", "24", "13", "2.7", "46", "44"]
    assert "MEM.PAGE.AUG            185      65 2.7 % 6.3ms 4.2 %       60" in done.text
    text = " ".join(done.text.split())
    assert "MEM.PAGE.AUG: no number of requests would do: 1.2 % were last seen busy at 64" in text
    assert "VP.ENTER: record about 56 min at this rate (32,000,000 requests)" in text
    assert "a traced attempt takes longer than one on a bare kernel" in text


def test_an_unsupported_target_is_reported() -> None:
    text = " ".join(answered("recommend", SAMPLE, "--at-most", "1 VM per year").text.split())
    assert "for 4 leaves together with 95 % confidence" in text
    assert "too long for one recording: 10,000 hosts for" in text


def test_traces_are_merged() -> None:
    words = ("--target", "0.1", "--format", "json")
    one = json.loads(answered("recommend", SAMPLE, *words).stdout)
    two = json.loads(answered("recommend", SAMPLE, SAMPLE, *words).stdout)
    assert [row["n_requests"] for row in two] == [2 * row["n_requests"] for row in one]
    assert two[0]["observed_s"] == pytest.approx(2 * one[0]["observed_s"])


def test_a_rate_is_turned_into_a_target_for_each_leaf() -> None:
    done = answered("recommend", SAMPLE, "--at-most", "1 per hour", "--format", "json")
    rows = {row["leaf"]: row for row in json.loads(done.stdout)}
    findings = analyze(read_trace(SAMPLE))
    n_leaves = findings.retry_chains["leaf"].n_unique()
    hours = rows[6]["observed_s"] / 3600
    assert rows[6]["target"] == pytest.approx(hours / n_leaves / rows[6]["n_requests"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("recommend", SAMPLE, "--target", "0"), "choose one above 0 and below 1"),
        (("recommend", SAMPLE, "--confidence", "2"), "choose one from 0.5 to below 1"),
        (("recommend", SAMPLE, "--at-most", "1 VM per yaer"), "nearest: year"),
        (
            ("recommend", SAMPLE, "--at-most", "1 VM per day", "--target", "0.1"),
            "choose one",
        ),
        (("policies", SAMPLE, "--policy", "mainlin"), "nearest: mainline"),
        (("attempts", SAMPLE, "--leaf", "TDH.MEM.PAGE.AUGG"), "TDH.MEM.PAGE.AUG"),
    ],
)
def test_wrong_arguments_are_reported_in_one_line(words: tuple[str | Path, ...], said: str) -> None:
    assert said in refused(2, *words)


def test_a_typo_in_a_file_gets_one_clear_line(tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text("[policy.x]\ncals = 7\n")
    assert "nearest: calls" in refused(2, "policies", SAMPLE, "--policies", mine)
    assert "cannot read" in refused(1, "policies", SAMPLE, "--policies", tmp_path / "none")
