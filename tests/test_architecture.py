"""The floor plan, held against the code."""

import ast
from pathlib import Path

import pytest

import tdxtrace
from tdxtrace.tables.catalog import TABLES
from tdxtrace.tables.contract import REPORT, render, render_report

PACKAGE = Path(tdxtrace.__file__).parent
ROOT = PACKAGE.parent
MODULES = sorted(PACKAGE.rglob("*.py"))

# A room may import itself and the rooms named here; nothing else of tdxtrace.
FACTS = {"errors", "tdx", "tables", "compiler"}
ROOMS = {"ingest", "analysis", "report"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "compiler": set(),
    "tdx": set(),
    "tables": {"errors", "tdx"},
    "intervals": set(),
    **dict.fromkeys(ROOMS, FACTS),
    "analysis": FACTS | {"intervals"},
    "recommend": FACTS | {"intervals"},
    "simulate": {"errors", "tables"},
    "capture": FACTS,
    "watch": FACTS | {"ingest", "analysis"},
    "pipeline": FACTS | {"analysis", "recommend"},
    "validate": FACTS | ROOMS | {"pipeline", "simulate"},
    "cli": FACTS | ROOMS | {"capture", "watch", "pipeline", "recommend", "simulate", "validate"},
}
MAX_MODULE_LINES = 300
MAX_FUNCTION_LINES = 40


def _room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imported_rooms(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            assert node.module is not None
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    rooms = {name.split(".")[1] for name in names if name.startswith("tdxtrace.")}
    return rooms - {"__version__"}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_rooms_import_only_what_they_may(path: Path) -> None:
    room = _room(path)
    if not room.startswith("__"):
        strays = _imported_rooms(path) - MAY_IMPORT[room] - {room}
        assert not strays, f"{room} may not import {sorted(strays)}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_modules_say_what_they_answer_and_stay_small(path: Path) -> None:
    text = path.read_text("utf-8")
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "no module docstring"
    assert len(text.splitlines()) <= MAX_MODULE_LINES
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    for node in [*tree.body, *(member for owner in classes for member in owner.body)]:
        if isinstance(node, ast.FunctionDef):
            body = [s for s in node.body if not isinstance(s, ast.Expr) or s is not node.body[0]]
            lines = (node.end_lineno or 0) - body[0].lineno + 1 if body else 0
            assert lines <= MAX_FUNCTION_LINES, f"{node.name} has {lines} lines"
            if not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{node.name} has no docstring"


def test_no_module_is_named_for_nothing() -> None:
    assert not {p.stem for p in MODULES} & {"utils", "helpers", "common", "core", "misc"}


def test_contracts_are_up_to_date() -> None:
    folder = ROOT / "schemas"
    contracts = {table.name: render(table) for table in TABLES} | {REPORT: render_report()}
    assert {p.stem for p in folder.glob("*.json")} == set(contracts)
    for name, contract in contracts.items():
        assert (folder / f"{name}.json").read_text("utf-8") == contract, (
            f"schemas/{name}.json is stale: run python -m tdxtrace.tables.contract"
        )


def test_public_names_are_few_and_exist() -> None:
    assert len(tdxtrace.__all__) <= 10
    assert all(hasattr(tdxtrace, name) for name in tdxtrace.__all__)
