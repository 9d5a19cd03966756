"""The public interface of the library."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import polars as pl
import pyarrow as pa
import pytest
from support.running import SAMPLES
from support.story import story
from support.texts import ONE_CALL, read_text

import tdxtrace
from tdxtrace import Findings, TdxtraceError, Trace
from tdxtrace.errors import FormatError, InputError, QueryError, TableError
from tdxtrace.tables.events import EVENT_TABLES
from tdxtrace.tables.findings import FINDING_TABLES

SAMPLE = SAMPLES / "contended.txt"


@pytest.fixture(scope="module")
def trace() -> Trace:
    return tdxtrace.read_trace(SAMPLE)


@pytest.fixture(scope="module")
def findings(trace: Trace) -> Findings:
    return tdxtrace.analyze(trace)


def test_three_lines_give_retry_chains(findings: Findings) -> None:
    chains = findings.retry_chains
    assert isinstance(chains, pl.DataFrame)
    assert chains["n_attempts"].max() == 64
    assert {"leaf", "tid", "td_id", "gpa", "start_ns", "end_ns"} <= set(chains.columns)


@pytest.mark.parametrize("path", [SAMPLE, str(SAMPLE)])
def test_a_path_may_be_text(path: str) -> None:
    assert tdxtrace.read_trace(path).seamcalls.height == 2011


def test_every_table_is_an_attribute(trace: Trace, findings: Findings) -> None:
    tables = (*EVENT_TABLES, *FINDING_TABLES)
    assert {*trace.tables(), *findings.tables()} == {table.name for table in tables}
    for bundle in (trace, findings):
        for name, frame in bundle.tables().items():
            assert getattr(bundle, name) is frame


def test_arrow_holds_the_same_rows(trace: Trace, findings: Findings) -> None:
    for bundle in (trace, findings):
        arrow = bundle.to_arrow()
        assert list(arrow) == list(bundle.tables())
        for name, table in arrow.items():
            assert isinstance(table, pa.Table)
            frame = bundle.tables()[name]
            assert table.column_names == frame.columns
            assert pl.DataFrame(table).equals(frame)


def test_tables_with_many_chunks_are_rechunked(trace: Trace) -> None:
    many = dataclasses.replace(
        trace, seamcalls=pl.concat(list(trace.seamcalls.iter_slices(100)), rechunk=False)
    )
    assert many.seamcalls.n_chunks() > 1
    tdxtrace.analyze(many)
    assert many.seamcalls.n_chunks() == 1
    assert many.seamcalls.equals(trace.seamcalls)


def test_the_provenance_is_plain_data(trace: Trace) -> None:
    result = trace.provenance.to_dict()
    (source,) = result["sources"]
    assert source["path"] == str(SAMPLE)
    assert source["format"] == "ftrace"
    assert source["n_lines"] == 4034
    assert source["events"]["tdh_mem_page_aug_enter"] > 100
    assert result["tdxtrace"] == tdxtrace.__version__
    assert result["level_base"] == 0


def test_bundles_are_immutable(trace: Trace, findings: Findings) -> None:
    for bundle in (trace, findings, trace.provenance, trace.provenance.sources[0]):
        name = dataclasses.fields(bundle)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(bundle, name, None)


def test_check_names_the_invalid_table() -> None:
    scenario = story("B S").trace
    scenario.check()
    broken = dataclasses.replace(scenario, seamcalls=scenario.seamcalls.vstack(scenario.seamcalls))
    with pytest.raises(TableError, match=r"'seamcalls'.*key is unique"):
        broken.check()


# Display.


def test_a_bundle_shows_its_tables_and_their_grain(trace: Trace, findings: Findings) -> None:
    text = repr(trace)
    assert text.splitlines()[0] == f"Trace of {SAMPLE}"
    row = next(line for line in text.splitlines() if line.lstrip().startswith("seamcalls"))
    assert row.split()[:2] == ["seamcalls", "2,011"]
    assert "one row per SEAMCALL attempt" in row
    assert repr(findings).splitlines()[0] == f"Findings on {SAMPLE}"
    assert all(name in repr(findings) for name in findings.tables())


def test_a_bundle_is_an_html_table_in_a_notebook(findings: Findings) -> None:
    shown = findings._repr_html_()
    assert shown.count("<table>") == shown.count("</table>") == 1
    assert shown.count("<tr>") == len(findings.tables()) + 1
    assert "<code>retry_chains</code>" in shown
    assert ">503<" in shown


HOSTILE = "<script>alert(1)</script>\x1b[31m&"


def test_untrusted_file_names_are_escaped() -> None:
    scenario = story("B S").trace
    source = dataclasses.replace(scenario.provenance.sources[0], path=HOSTILE)
    provenance = dataclasses.replace(scenario.provenance, sources=(source,))
    bundle = dataclasses.replace(scenario, provenance=provenance)
    for shown in (bundle, tdxtrace.analyze(bundle)):
        markup = shown._repr_html_()
        assert "<script>" not in markup
        assert "&lt;script&gt;alert(1)" in markup
        assert "\x1b" not in markup
        assert "\x1b" not in repr(shown)
        assert all(line.isprintable() for line in repr(shown).splitlines())


def test_an_empty_trace_gives_empty_findings() -> None:
    findings = tdxtrace.analyze(story("").trace)
    findings.check()
    assert all(rows.is_empty() for rows in findings.tables().values())
    assert "retry_chains" in repr(findings)


# Errors.


def test_errors_have_a_common_base() -> None:
    kinds = (InputError, FormatError, TableError, QueryError)
    assert all(issubclass(kind, TdxtraceError) for kind in kinds)
    with pytest.raises(tdxtrace.TdxtraceError, match="no such trace"):
        tdxtrace.read_trace("nothing-here")
    with pytest.raises(tdxtrace.TdxtraceError, match="no SEAMCALL"):
        read_text(ONE_CALL.replace("tdh_mem_page_aug", "x").replace("aug", "y"))


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = tdxtrace.nothing
    assert not hasattr(tdxtrace, "polars")


@pytest.mark.parametrize("name", tdxtrace.__all__)
def test_every_public_name_can_be_imported(name: str) -> None:
    assert getattr(tdxtrace, name) is not None


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout.strip()


def test_the_package_imports_nothing_slow() -> None:
    code = (
        "import sys, tdxtrace; tdxtrace.__version__; slow = {'polars', 'pyarrow', 'numpy', "
        "'rich', 'typer', 'zstandard'}; print(sorted(slow & set(sys.modules)))"
    )
    assert run(code) == "[]"


def test_the_recorder_imports_nothing_slow() -> None:
    # What it costs to start is part of what a recording costs.
    code = (
        "import sys, tdxtrace.capture.choose, tdxtrace.capture.recorder; "
        "from tdxtrace.tdx import wrappers; "
        "assert wrappers.leaf_of('tdh_mem_page_aug') == 6; "
        "assert wrappers.level_base('6.18') == 0; "
        "print(sorted({'polars', 'pyarrow', 'numpy', 'rich'} & set(sys.modules)))"
    )
    assert run(code) == "[]"


def test_public_names_are_offered_for_completion() -> None:
    assert set(run("import tdxtrace; print(*dir(tdxtrace))").split()) >= {"read_trace", "analyze"}
