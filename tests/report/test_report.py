"""The report: its sentences, safety, size and reproducibility."""

from __future__ import annotations

import hashlib
import html
import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import polars as pl
import pytest
from support.contracts import report_breaches
from support.hostile import NAMES, hostile
from support.running import SAMPLES, answered, refused, tdxtrace
from support.story import story

from tdxtrace.ingest.read import read_trace
from tdxtrace.pipeline import analyze
from tdxtrace.report.charts import MAX_MARKS
from tdxtrace.report.charts.causes import contention_rows
from tdxtrace.report.charts.limits import curve_rows, label_lines, policy_rows
from tdxtrace.report.charts.theme import MEANINGS, PALETTE
from tdxtrace.report.counts import facts
from tdxtrace.report.html import _vega, spec_of
from tdxtrace.report.outline import sections
from tdxtrace.report.render import picture, report, save_charts
from tdxtrace.report.section import Section
from tdxtrace.report.sections import times
from tdxtrace.report.units import share
from tdxtrace.tables.text import one_line
from tdxtrace.tables.trace import Findings

ZERO_STEPS = SAMPLES / "zerostep.txt"
FORMS = ("html", "md", "json")
FIGURES = (
    *("accept_rates", "attempts", "busy_causes", "contention", "leaf_stats", "policies"),
    *("rate", "step_thresholds", "timeline", "times"),
)
# Stories, and sentences that the report on each must contain.
STORIES = {
    "": ["No SEAMCALL was captured, and no entry of a vCPU", "No request was captured"],
    "S1": ["1 SEAMCALL served 1 request; none was answered busy.", "Retried: none of 1 request"],
    "S1 S2 >X trackS": ["none was answered busy", "No episode in 1 entry"],
    "B1 B1 S1": ["retried: 1 (100 %)", "up to 3 attempts", "Unknown: no entry of a vCPU"],
    "B1": ["Cut: 1 of 1 request, 1 by the start or end of the trace."],
    ">X ?3 >H": ["only KVM's own events", "1 vCPU: 0 of 2 entries refused."],
    "S1 lost@0 S2": ["The input reports events lost.", "Events were lost"],
}


@pytest.fixture(scope="module")
def findings() -> Findings:
    return analyze(read_trace(ZERO_STEPS))


@pytest.fixture(scope="module")
def shown(findings: Findings) -> list[Section]:
    """Its sections."""
    return sections(findings)


@cache
def of_story(text: str) -> Findings:
    """Findings on a story, whose tables are made once for all tests."""
    return analyze(story(text).trace)


@pytest.mark.parametrize("text", STORIES)
@pytest.mark.parametrize("form", FORMS)
def test_a_report_contains_the_expected_sentences(text: str, form: str) -> None:
    told = report(of_story(text), form).decode()
    words = " ".join(html.unescape(told).split())
    for sentence in STORIES[text]:
        assert sentence in words
    assert "None" not in re.sub(r"<script.*?</script>", "", told, flags=re.DOTALL)


@pytest.mark.parametrize("text", STORIES)
def test_no_chart_is_empty(text: str) -> None:
    for section in sections(of_story(text)):
        assert section.says
        for figure in section.figures:
            spec = figure.draw().to_dict()
            assert any(rows for rows in spec["datasets"].values())


def test_problems_are_first_then_limits_then_how_often(shown: list[Section]) -> None:
    names = [section.name for section in shown]
    assert names[:4] == ["short", "verdicts", "limits", "leaf_stats"]
    assert [section.is_detail for section in shown] == [False] * 12 + [True] * (len(shown) - 12)
    first = shown[0].says
    result = answered("analyze", "log", ZERO_STEPS).lines[0].partition(": tdxtrace")[0]
    assert first[0] == result[0].upper() + result[1:] + "."
    assert first[1] == "2,843 SEAMCALLs served 968 requests; retried: 60 (6 %)."
    assert "Maximum attempts of one request: 170 (TDH.VP.ENTER)." in first
    assert "Zero-step mitigation refused entries of a vCPU in 8 episodes." in first


def test_numbers_are_those_of_the_tables(findings: Findings, shown: list[Section]) -> None:
    leaves = next(s for s in shown if s.name == "leaf_stats")
    (grid,) = leaves.grids
    rows = {row[0]: row[1:3] for row in grid.rows}
    assert rows["VP.ENTER"] == ("670", "29 (4 %)")
    assert rows["MEM.RANGE.BLOCK"] == ("20", "18 (90 %)")
    assert len(grid.rows) == findings.leaf_stats.height


def test_worst_chains_name_their_rows(shown: list[Section]) -> None:
    chains = next(s for s in shown if s.name == "retry_chains")
    (grid,) = chains.grids
    assert grid.rows[0][:2] == ("VP.ENTER", "-")
    assert grid.rows[0][3:6] == ("170", "8.97 ms", "3797 to 5698")
    assert grid.more == "48 more (tdxtrace retry-chains)"


# Safety.


@cache
def of_hostile(form: str) -> str:
    return report(analyze(hostile()), form).decode()


@pytest.mark.parametrize("form", FORMS)
def test_untrusted_names_are_escaped(form: str) -> None:
    shown = of_hostile(form)
    assert "\x1b" not in shown
    assert "\u202e" not in shown
    assert "49 in" not in shown
    if form == "html":
        policy, _, rest = shown.partition("<style>")
        assert rest.count("<script>") == 2
        assert "<img" not in rest.replace(_vega(), "")
        assert rest.count("</style>") == 1
        assert "{{ 7 * 7 }}" in html.unescape(policy + rest)
    if form == "md":
        assert "<" not in shown
        assert not re.search(r"(?<!\\)\]\(", shown)
        assert r"a\|b-4" in shown
    if form == "json":
        assert json.loads(shown)["provenance"]["sources"][0]["path"] == NAMES[0]


def test_escaped_names_are_readable() -> None:
    shown = html.unescape(of_hostile("html"))
    for name in NAMES[:4]:
        assert one_line(name, 24) in shown


# The page.


def test_two_runs_give_the_same_bytes(findings: Findings) -> None:
    again = analyze(read_trace(ZERO_STEPS))
    for form in FORMS:
        assert report(again, form) == report(findings, form)


def test_a_report_can_be_made_again_byte_by_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    first = answered("report", ZERO_STEPS, "--format", "md").stdout
    words = [sys.executable, "-m", "tdxtrace", "report", str(ZERO_STEPS), "--format", "md"]
    other = subprocess.run(words, capture_output=True, check=True, timeout=120).stdout
    assert other == first
    assert b"2023-11-14 22:13 UTC" in first
    assert hashlib.sha256(ZERO_STEPS.read_bytes()).hexdigest().encode() in first
    assert b"--format md" in first


def test_a_page_is_self_contained(findings: Findings) -> None:
    page = report(findings, "html").decode()
    assert len(page) < 5_000_000
    own = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"""(?:src|href)=(?!["']?(?:#|data:))""", own)
    assert "@import" not in own
    assert "url(" not in own
    assert page.count(_vega()) == 1
    assert "default-src 'none'" in html.unescape(page)


def test_charts_use_the_colours_of_the_page(shown: list[Section]) -> None:
    for section in shown:
        for figure in section.figures:
            text = json.dumps(spec_of(figure.draw()))
            assert "var(--" in text
            assert not [white for white, _ in PALETTE.values() if f'"{white}"' in text]


def _luminance(colour: str) -> float:
    """WCAG 2.1, relative luminance."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("place", [0, 1])
def test_every_colour_has_enough_contrast(place: int) -> None:
    paper = _luminance(PALETTE["paper"][place])
    for name, pair in PALETTE.items():
        light, dark = sorted((paper, _luminance(pair[place])), reverse=True)
        needed = {"paper": 1, "line": 1.1, "ink": 7, "muted": 4.5}.get(name, 3)
        assert (light + 0.05) / (dark + 0.05) >= needed, name


def test_a_chart_has_at_most_max_marks_and_says_what_is_left_out() -> None:
    busy = " ".join(f"{n % 40 + 1}/B{n} {n % 40 + 1}/S{n}" for n in range(2 * MAX_MARKS))
    findings = analyze(story(busy).trace)
    chains = times.section(findings)
    for figure in chains.figures:
        spec = figure.draw().to_dict()
        assert sum(map(len, spec["datasets"].values())) <= MAX_MARKS
    caption = next(f.caption for f in chains.figures if f.name == "timeline")
    assert "The 2,000 with most attempts of 4,000 retried requests" in caption
    assert "on the 32 threads with most busy answers of 40" in caption


# The command.


def test_the_format_follows_from_the_suffix(tmp_path: Path) -> None:
    trace = tmp_path / "t.txt"
    trace.write_text("".join(ZERO_STEPS.read_text().splitlines(keepends=True)[:60]))
    for name, begin in (("r.html", b"<!DOCTYPE"), ("r.md", b"# TDX"), ("r.json", b"{")):
        path = tmp_path / name
        done = tdxtrace("report", trace, "-o", path)
        assert (done.status, done.stdout) == (0, b"")
        assert done.stderr == f"tdxtrace: wrote {path}\n"
        assert path.read_bytes().startswith(begin)
    message = refused(1, "report", trace, "-o", tmp_path / "r.md")
    assert message.endswith("exists; use --force to overwrite")
    message = refused(2, "report", trace, "-o", tmp_path / "r.pdf")
    assert message == ("unknown suffix: r.pdf: name the file .html, .md or .json, or use --format")


def test_markdown_fits_the_width_of_a_mail(findings: Findings) -> None:
    text = report(findings, "md").decode()
    assert max(len(line) for line in text.splitlines() if not line.startswith("|")) <= 75
    assert max(map(len, text.splitlines())) <= 96


@pytest.mark.parametrize("name", ["lost.dat.xz", "qemu.perf.txt.xz"])
def test_json_satisfies_its_schema(name: str) -> None:
    result = json.loads(answered("report", SAMPLES / name, "--format", "json").text)
    assert report_breaches(result) == []
    assert result["n_rows"]["retry_chains"] >= len(result["tables"]["retry_chains"])
    assert report_breaches(result | {"sections": 3}) != []


def test_charts_are_saved_as_images_with_titles(
    findings: Findings, shown: list[Section], tmp_path: Path
) -> None:
    assert save_charts(findings, tmp_path, "svg", force=False) == len(FIGURES)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{name}.svg" for name in FIGURES]
    titles = {f.name: f.title for s in shown for f in s.figures}
    for path in tmp_path.iterdir():
        image = path.read_text()
        assert image.startswith("<svg")
        assert "var(--" not in image
        assert html.escape(titles[path.stem], quote=False) in image


def test_a_chart_is_saved_as_png() -> None:
    chart = next(f for s in sections(analyze(story("B1 S1").trace)) for f in s.figures)
    assert picture(chart.draw(), "png", chart.title).startswith(b"\x89PNG")


def test_the_attempts_curve_is_that_of_the_table(findings: Findings) -> None:
    rows = curve_rows(findings.attempts)
    enter = rows.filter(leaf="VP.ENTER", within=1)
    assert enter["ratio"].item() == pytest.approx(29 / 670, rel=1e-4)
    assert enter["low"].item() < 29 / 670 < enter["high"].item()
    assert (rows["ratio"] > 0).all()


def test_policies_are_shown_with_their_intervals(findings: Findings) -> None:
    rows = policy_rows(findings.policies)
    mainline = rows.filter(policy="mainline", leaf="VP.ENTER").row(0, named=True)
    result = findings.policies.filter(policy="mainline", leaf=0).row(0, named=True)
    assert mainline["ratio"] == pytest.approx(result["exceeding_ratio"])
    assert mainline["share"] == share(result["n_exceeding"], result["n_requests"])
    low, high = mainline["ends"].removesuffix(" %").split(" to ")
    assert float(low) == pytest.approx(100 * result["exceeding_low"], rel=0.05, abs=0.005)
    assert float(high) == pytest.approx(100 * result["exceeding_high"], rel=0.05)
    assert not [ends for ends in rows["ends"] if "e-" in ends]


def test_contention_has_observed_and_possible_conflicts(findings: Findings) -> None:
    rows = contention_rows(findings.scan("busy_causes"), findings.leaf_stats)
    both = rows.filter(busy="VP.ENTER", holder="MEM.TRACK")
    assert "conflict in generation A, B, C" in both["expected"].item()
    answers = findings.busy_causes.filter(pl.col("rank") == 1)["holder_leaf"].count()
    shown = [int(text.replace(",", "")) for text in rows["text"] if text != "·"]
    assert sum(shown) == answers > 0


@pytest.fixture(scope="module")
def contended() -> Findings:
    return analyze(read_trace(SAMPLES / "contended.txt"))


@pytest.fixture(scope="module")
def of_contended(contended: Findings) -> list[Section]:
    """Its sections."""
    return sections(contended)


def test_each_problem_has_evidence_a_rule_and_what_to_do(of_contended: list[Section]) -> None:
    assert of_contended[0].says[0] == "2 problems: 2 BUG; 3 kinds of findings undecided."
    lock, track = of_contended[1].problems
    assert lock.where.startswith("80 busy answers of MEM.PAGE.AUG, MEM.RANGE.BLOCK, MEM.PAGE.R")
    assert lock.what.count("mmu_lock is held for writing") == 1
    assert lock.evidence.count("busy_causes, rows") == 3
    assert track.where.startswith("41 busy answers of MEM.TRACK, TD 0x")
    assert track.what.startswith("41 busy answers of TDH.MEM.TRACK")
    assert track.evidence == "busy_causes, rows 1326 1379 1439 1464 1466 and others"
    assert track.rule.startswith("track_without_kick: Linux 6.16")
    assert track.look.endswith("contended.txt --seq 1326")
    assert [grid.summary.split(",")[0] for grid in of_contended[1].grids] == [
        *("10 UNDECIDED groups", "4 EXPECTED groups")
    ]
    assert not of_contended[1].grids[0].rows[2][-1].endswith("\u2026"), "sentences are not cut"


def test_sections_without_content_are_named_only(contended: Findings) -> None:
    text = report(contended, "md").decode()
    assert "## Loops without progress" not in text
    assert "Not shown: " in text
    assert "Loops without progress (" in text.split("Not shown: ")[1].replace("\n", " ")


@pytest.mark.parametrize("name", ["findings", "contended"])
def test_the_brief_fits_a_mail(name: str, request: pytest.FixtureRequest) -> None:
    lines = report(request.getfixturevalue(name), "brief").decode().splitlines()
    assert len(lines) <= 40
    assert max(len(line) for line in lines if not line.startswith("|")) <= 75
    assert max(map(len, lines)) <= 80
    assert next(line for line in lines if line.startswith("| TDH."))
    assert lines[-1].startswith("tdxtrace ")


@pytest.mark.parametrize("text", STORIES)
def test_the_brief_of_an_empty_trace_is_short(text: str) -> None:
    assert 5 < len(report(of_story(text), "brief").splitlines()) < 30


def test_json_has_every_row(contended: Findings) -> None:
    tables = json.loads(report(contended, "json"))["tables"]
    assert {name: len(rows) for name, rows in tables.items()} == {
        name: rows.height for name, rows in contended.tables().items()
    }
    assert len(tables["busy_causes"]) > 1000
    assert tables["retry_chains"] == contended.retry_chains.to_dicts()


def test_counts_are_those_of_the_screen(findings: Findings) -> None:
    result = answered("analyze", "log", ZERO_STEPS).text
    for fact in facts(findings):
        assert fact in result


def test_each_colour_is_named_by_its_meaning(
    shown: list[Section], of_contended: list[Section]
) -> None:
    drawn = {
        colour
        for section in (*shown, *of_contended)
        for figure in section.figures
        for colour in re.findall(r"var\(--(\w+)\)", json.dumps(spec_of(figure.draw())))
    }
    assert drawn - {"paper", "ink", "muted", "line"} <= set(MEANINGS)
    assert set(MEANINGS) | {"paper", "ink", "muted", "line"} == set(PALETTE)


def test_names_of_limits_do_not_overlap() -> None:
    labels = [(0.0, 60.0), (30.0, 60.0), (70.0, 10.0), (95.0, 5.0)]
    lines = label_lines(labels)
    for n, (left, _) in enumerate(labels):
        for m in range(n):
            assert lines[m] != lines[n] or sum(labels[m]) <= left
    assert lines == [0, 1, 0, 0]


def test_limits_say_what_the_trace_supports(of_contended: list[Section]) -> None:
    said = " ".join(of_contended[2].says)
    assert "need more (each with 95 % confidence): of TDH.MEM.PAGE.AUG 2.7 % more than 6.3" in said
    assert "No limit is recommended (at most 1 request in 1,000,000 to need more" in said
    assert "no number of requests would do: 1.2 % were last seen busy at 64 attempts" in said


def test_filters_are_in_the_report() -> None:
    text = answered("report", ZERO_STEPS, "--leaf", "TDH.MEM.TRACK", "--since", "+0.001").text
    assert "Filtered: leaves TDH.MEM.TRACK, since +0.001." in text
    assert "| VP.ENTER" not in text
