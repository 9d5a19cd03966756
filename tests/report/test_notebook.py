"""The starter notebook: it runs, and displays tables and charts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support.hostile import hostile
from support.running import SAMPLES, refused, tdxtrace
from support.story import story

import tdxtrace as package
from tdxtrace.ingest.read import read_trace
from tdxtrace.report.notebook import notebook

nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
STARTER = SAMPLES / "starter.ipynb"


def executed(path: Path, folder: Path) -> list[dict[str, str]]:
    """Run a notebook in a folder; return what each code cell shows, by kind."""
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    client = nbclient.NotebookClient(
        book, timeout=300, resources={"metadata": {"path": str(folder)}}
    )
    client.execute()
    shown = []
    for cell in book.cells:
        if cell.cell_type == "code":
            shows: dict[str, str] = {}
            for output in cell.outputs:
                shows |= dict(output.get("data", {}))
            shown.append(shows)
    return shown


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path) -> None:
    shutil.copy(SAMPLES / "zerostep.txt", tmp_path)
    shown = executed(STARTER, tmp_path)
    assert (tmp_path / "report.html").exists()
    texts = "\n".join(shows.get("text/html", "") for shows in shown)
    assert "<code>seamcalls</code>" in texts
    assert "<code>retry_chains</code>" in texts
    assert "TDH.VP.ENTER" in texts
    charts = [shows["image/svg+xml"] for shows in shown if "image/svg+xml" in shows]
    assert len(charts) == 2


def test_without_a_trace_it_simulates_one() -> None:
    own, given = (json.loads(notebook(trace))["cells"] for trace in (None, "simulated.txt"))
    command = "!{sys.executable} -m tdxtrace simulate zero_step_attack --seed 7 -o simulated.txt"
    assert own[1]["source"][2] == f"{command} --force\n"
    assert own[1]["source"][3:] == given[1]["source"]
    assert own[2:] == given[2:]


def test_the_sample_equals_the_output_of_the_command() -> None:
    assert STARTER.read_text() == notebook("zerostep.txt")


def test_the_command_does_not_overwrite(tmp_path: Path) -> None:
    path = tmp_path / "n.ipynb"
    done = tdxtrace("notebook", 'it\'s "mine".txt', "-o", path)
    assert done.status == 0
    assert "jupyter lab" in done.stderr
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    code = [cell.source for cell in book.cells if cell.cell_type == "code"]
    for cell in code:
        compile(cell, "cell", "exec")
    assert """read_trace('it\\'s "mine".txt')""" in code[0]
    assert "exists" in refused(1, "notebook", "-o", path)


def test_charts_are_listed_before_they_are_drawn() -> None:
    findings = package.analyze(read_trace(SAMPLES / "zerostep.txt"))
    charts = package.charts(findings)
    assert "timeline" in charts
    assert len(charts) == len(list(charts)) == 10
    assert "  timeline         Retried requests and zero-step" in repr(charts)
    assert charts._repr_html_().count("<tr>") == len(charts)
    assert charts["timeline"].to_dict()["width"] == 720
    assert len(package.charts(package.analyze(story("").trace))) == 0


def test_leaves_and_statuses_are_named() -> None:
    trace = story("B1 S1").trace
    calls = trace.named("seamcalls")
    assert set(calls["leaf"]) == {"TDH.MEM.PAGE.AUG"}
    assert calls["status"].to_list() == ["TDX_OPERAND_BUSY", "TDX_SUCCESS"]
    assert trace.named(trace.seamcalls).equals(calls)
    with pytest.raises(package.TdxtraceError, match="nearest: seamcalls"):
        trace.named("seamcall")


def test_the_starter_counts_only_busy_answers() -> None:
    cells = [cell.source for cell in nbformat.read(STARTER, as_version=4).cells]
    assert not [cell for cell in cells if "status != 0" in cell]
    assert not [cell for cell in cells if "from tdxtrace." in cell]


def test_untrusted_names_are_escaped_in_a_notebook() -> None:
    trace = hostile()
    for shown in (trace, package.analyze(trace)):
        assert "<script" not in shown._repr_html_()
        assert "\x1b" not in repr(shown)
